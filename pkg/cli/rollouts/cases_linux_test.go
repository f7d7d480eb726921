package rollouts_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// shops are hosts where any shop may be deployed, each by a key with a forced command.
func (y *yard) shops(names ...string) {
	y.t.Helper()
	for _, name := range names {
		y.write(name+"/.keep", "")
		y.write(name+".yaml", fmt.Sprintf("app: shop\nto: %s\nrestart: ['*']\nhealth: ['*']\nhooks: ['*']\ndrain: ['*']\n", y.path(name)))
		y.host(name, fmt.Sprintf(`restrict,command="echo >>%s; exec %s apply --app shop --policy %s --who %s"`, y.path("logins"), y.culvert, y.path(name+".yaml"), name+"-key"))
	}
}

// file writes the project's, with the page and what else there is to say.
func (y *yard) file(page, more string) {
	y.t.Helper()
	y.write("project/dist/page", page)
	y.write("project/culvert.yaml", "app: shop\nfrom: dist\n"+more)
}

// deploy is the line.
func (y *yard) deploy(commit string, more ...string) []string {
	return append([]string{"deploy", "-F", y.path("ssh_config"), "--commit", commit}, more...)
}

func (y *yard) lacks(r result, words ...string) {
	y.t.Helper()
	for _, w := range words {
		if !strings.Contains(table(r.out+r.err), w) {
			y.t.Errorf("%q is not in\n%s%s", w, r.out, r.err)
		}
	}
}

// One of five hosts cannot be reached: it is said which, and nobody is touched. Hosts are logged
// in to once each, whatever is done to them.
func TestOneOfFive(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	names := []string{"web-1", "web-2", "web-3", "web-4", "web-5"}
	y.shops(names...)
	y.serve()
	y.file("one", "hosts: {web: ['web-[1:5]']}\n")
	good := y.read("ssh_config")
	y.write("ssh_config", "Host web-3\n  Port 1\n"+good)
	r := y.does(1, "culvert: error: web-3: ", y.deploy("1111111")...)
	y.lacks(r, "refused", "web-1 web - untouched", "web-2 web - untouched", "web-3 web - unreachable", "web-4 web - untouched", "web-5 web - untouched")
	for _, name := range names {
		if left, err := os.ReadDir(y.path(name)); err != nil || len(left) != 1 {
			t.Errorf("%s: %v, %v", name, left, err)
		}
	}
	y.write("ssh_config", good)
	y.write("logins", "")
	// nobody begins before all have the release, and hosts of a batch are at it at the same time
	y.file("one", `hosts: {web: ['web-[1:5]']}
batch: [100%]
timeout: 1m
hooks:
  pre_release: |
    for n in 1 2 3 4 5; do test -d "$CULVERT_TO/../web-$n/releases/$CULVERT_RELEASE"; done
    touch "$CULVERT_TO/waits"
    for n in 1 2 3 4 5; do until test -e "$CULVERT_TO/../web-$n/waits"; do sleep 0.02; done; done
`)
	y.does(0, "5 hosts switched", y.deploy("1111111")...)
	y.shows("one", names...)
	if n := strings.Count(y.read("logins"), "\n"); n != len(names) {
		t.Errorf("%d logins", n)
	}
}

// What hooks do wrong: they fail, hang, print a megabyte; and what others do wrong to them.
func TestHooksOverSSH(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.shops("web-1", "web-2")
	y.serve()
	const hosts = "hosts: [web-1, web-2]\n"
	y.file("one", hosts)
	y.does(0, "2 hosts switched", y.deploy("1111111")...)
	for _, c := range []struct{ name, hooks, words, last string }{
		{"fails", "pre_release: 'echo so what >&2; exit 7'", "exit status 7", "so what"},
		{"hangs", "post_release: 'echo waiting; sleep 1000'", "it took too long: 3s", "waiting"},
		{"prints a megabyte", "post_release: \"yes 'a line of some length' | head -c 1000000; echo; echo the end; false\"", "exit status 1", "the end"},
		{"is not there", "post_release: there-is-no-such-program", "exit status 127", "not found"},
	} {
		more := ""
		if c.name == "hangs" {
			more = "timeout: 3s\n"
		}
		y.file(c.name, hosts+more+"hooks: {"+c.hooks+"}\n")
		r := y.does(1, c.words, y.deploy("2222222")...)
		y.lacks(r, "web-1 - ID restored", "web-2 - ID untouched", "web-1 said last:", c.last)
		if _, shown, _ := strings.Cut(r.out, "said last:\n"); strings.Count(shown, "\n") > 20 {
			t.Errorf("%s: %d lines are shown", c.name, strings.Count(shown, "\n"))
		}
		y.shows("one", "web-1", "web-2")
	}
	// walle has each " be \"; here nothing is anything but what was written
	// hooks of the build machine: in their order, and their exit status is not ours
	const here = "hooks: {pre_deploy: 'rm -rf dist; echo 1 $CULVERT_ENV$CULVERT_APP >said', post_deploy: 'echo 3 >>said; cp page dist/page'}\nbuild: 'echo 2 >>said; mkdir dist'\n"
	y.write("project/page", "two")
	y.file("", hosts+strings.Replace(here, "cp page dist/page", "exit 4", 1))
	y.does(1, "post_deploy: sh: exit status 4", y.deploy("2222222")...)
	y.shows("one", "web-1", "web-2")
	y.file("", hosts+here)
	y.does(0, "2 hosts switched", y.deploy("2222222")...)
	y.shows("two", "web-1", "web-2")
	if got := y.read("project/said"); got != "1 shop\n2\n3\n" {
		t.Errorf("the build machine's hooks: %q", got)
	}
	y.file("three", hosts+`hooks:
  post_release: |
    printf '%s|' "a \"b\"" 'c "d" $HOME \' \$x "$(echo "in")" `+"`echo 'tick'`"+` >"$CULVERT_TO/said"
    printf '%s' 'it''s' "%d%%" "é ; & | < >" >>"$CULVERT_TO/said" # "
`)
	y.does(0, "2 hosts switched", y.deploy("3333333")...)
	for _, host := range []string{"web-1", "web-2"} {
		if got, want := y.read(host+"/said"), `a "b"|c "d" $HOME \|$x|in|tick|its%d%%é ; & | < >`; got != want {
			t.Errorf("%s has %q, want %q", host, got, want)
		}
	}
}

// running starts a verb, and returns when it has said something on stderr.
func (y *yard) running(words string, args ...string) (end func() (code int)) {
	y.t.Helper()
	cmd := exec.CommandContext(y.t.Context(), y.culvert, args...)
	cmd.Dir, cmd.Env = y.path("project"), []string{"PATH=" + os.Getenv("PATH"), "HOME=" + y.path("me")}
	said, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		y.t.Fatal(err)
	}
	in, all := bufio.NewScanner(said), ""
	for !strings.Contains(all, words) && in.Scan() {
		all += in.Text() + "\n"
	}
	if !strings.Contains(all, words) {
		y.t.Errorf("culvert %q has not said %q: %s", args, words, all)
	}
	return func() int {
		for in.Scan() {
		}
		_ = cmd.Wait()
		return cmd.ProcessState.ExitCode()
	}
}

// Two deploys at once, as people and jobs make them: one is told who is at it, one waits, and
// nobody has to unlock anything after one that failed.
func TestTwoDeploysOverSSH(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.shops("web-1", "web-2")
	y.serve()
	if err := syscall.Mkfifo(y.path("gate"), 0o600); err != nil {
		t.Fatal(err)
	}
	y.file("one", "hosts: [web-1, web-2]\nhooks: {pre_release: 'test ! -e ../../../closed || cat ../../../gate'}\n")
	y.write("closed", "")
	first := y.running("web-1: pre_release", y.deploy("1111111", "-v")...)
	r := y.does(1, "is locked by web-", y.deploy("2222222")...)
	y.lacks(r, "-key, release ID, since 20", "culvert: hint: culvert deploy -F ", "--wait 10m")
	y.lacks(y.does(0, "PROBLEMS", y.deploy("2222222", "--plan")...), "just now with web-1-key, release ID")
	y.does(0, "", "releases", "-F", y.path("ssh_config"))
	second := y.running("waiting for web-", y.deploy("3333333", "--wait", "1m")...)
	if err := os.Remove(y.path("closed")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(y.path("gate"), nil, 0); err != nil { // opens it for who reads
		t.Fatal(err)
	}
	if code := first(); code != 0 {
		t.Errorf("the first: %d", code)
	}
	if code := second(); code != 0 {
		t.Errorf("the second: %d", code)
	}
	y.file("bad", "hosts: [web-1, web-2]\nhooks: {pre_release: 'false'}\n")
	y.does(1, "web-1: pre_release: ", y.deploy("4444444")...)
	y.file("good", "hosts: [web-1, web-2]\n")
	y.does(0, "2 hosts switched", y.deploy("5555555")...)
}

// Apply is killed in each of its phases, over ssh: the deployer finds out what became of that, and
// the same line again ends well.
func TestApplyKilledOverSSH(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.shops("web-1")
	y.serve()
	at := func(phase, then string) string {
		return fmt.Sprintf(`if rm "$CULVERT_TO/../kill-%s" 2>/dev/null; then kill -9 $PPID; exec sleep 1000; fi; %s`, phase, then)
	}
	more := fmt.Sprintf("hosts: [web-1]\ndrain: {cmd: '%s', undo: '%s'}\nrestart: 'cmd %s'\nhealth: {cmd: '%s'}\nhooks: {pre_release: '%s', post_release: '%s'}\n",
		at("drain", `touch "$CULVERT_TO/drained"`), at("undrain", `rm -f "$CULVERT_TO/drained"`), at("restart", `cp page "$CULVERT_TO/runs"`), at("health", `cmp page "$CULVERT_TO/runs"`),
		at("pre_release", ":"), at("post_release", ":"))
	y.file("first", more)
	y.does(0, "1 host switched", y.deploy("1111111")...)
	for phase, passed := range map[string]bool{"drain": false, "pre_release": false, "restart": false, "health": false, "undrain": true, "post_release": true} {
		y.file("page of "+phase, more)
		y.write("kill-"+phase, "")
		if passed {
			y.lacks(y.does(0, "the connection was lost", y.deploy("2222222")...), "web-1 - ID deployed")
		} else {
			y.lacks(y.does(1, "its apply was killed", y.deploy("2222222")...), "web-1 - ID restored")
		}
		if page, runs := y.read("web-1/current/page"), y.read("web-1/runs"); page != runs {
			t.Errorf("killed in %s: %q is current, and %q runs", phase, page, runs)
		}
		y.does(0, "shop ", y.deploy("2222222")...)
		y.shows("page of "+phase, "web-1")
		if _, err := os.Stat(y.path("web-1/drained")); err == nil {
			t.Errorf("killed in %s: it is drained", phase)
		}
	}
}

// The session's sshd is killed, or a terminal's hangup comes, while apply is at it: it goes on to
// the end, and the deployer hears of that.
func TestSessionKilled(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.shops("web-1")
	y.serve()
	for i, how := range []string{
		`session=$(cut -d" " -f4 /proc/$PPID/stat); grep -q sshd /proc/$session/comm; kill -9 $session; while [ -e /proc/$session/exe ]; do sleep 0.02; done; echo a word to nobody; sleep 0.5`,
		`kill -HUP $PPID; sleep 0.5`,
	} {
		page := fmt.Sprint("page ", i)
		y.file(page, "hosts: [web-1]\nhooks: {pre_release: '"+how+"', post_release: 'touch \"$CULVERT_TO/post-"+fmt.Sprint(i)+"\"'}\n")
		y.lacks(y.does(0, "1 host switched", y.deploy("1111111")...), "web-1 - ID deployed")
		y.shows(page, "web-1")
		y.read(fmt.Sprintf("web-1/post-%d", i))
	}
}

// A person with a job's key is told what it is for.
func TestKeyTriedByHand(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.shops("web-1")
	y.host("open", "")
	y.serve("SetEnv PATH=" + filepath.Dir(y.culvert) + ":/usr/bin:/bin")
	const words = "this is a host's side of culvert deploy"
	for _, args := range [][]string{{"web-1"}, {"open", "culvert apply --app shop"}, {"-tt", "open", "culvert apply --app shop"}} {
		out, err := exec.CommandContext(t.Context(), "ssh", append([]string{"-F", y.path("ssh_config"), "-o", "BatchMode=yes"}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), words) {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
	// who has a terminal, and was given none, sees it without a word of his own
	cmd := exec.CommandContext(t.Context(), "ssh", "-F", y.path("ssh_config"), "-o", "BatchMode=yes", "web-1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	y.background(cmd, words)
	in.Close()
}

// An installed culvert of another wire is passed over. Where a key always runs that one, it is
// said which versions there are, and what to do.
func TestAnotherWire(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	answer := `{"error":{"code":"version","text":"the deployer speaks version 7 of the wire, the culvert of this host version 6"}}`
	y.write("answer", string(binary.BigEndian.AppendUint32(nil, uint32(len(answer))))+"\x01"+answer)
	y.write("bin/culvert", fmt.Sprintf(`#!/bin/sh
case "$2 $SSH_ORIGINAL_COMMAND" in
*culvert\ apply*) ;;
--help*) exit 0 ;;
?*\ ?*) echo 'culvert: error: this key is for culvert deploy, not for "…"' >&2; exit 3 ;;
esac
echo >>%s
cat %s -
`, y.path("asked"), y.path("answer")))
	if err := os.Chmod(y.path("bin/culvert"), 0o755); err != nil {
		t.Fatal(err)
	}
	y.host("plain", "")
	y.host("forced", fmt.Sprintf(`restrict,command="%s apply --app shop"`, y.path("bin/culvert")))
	y.write("home/.keep", "")
	y.write("srv/.keep", "")
	y.serve("SetEnv HOME="+y.path("home")+" PATH="+y.path("bin")+":/usr/bin:/bin", "PermitUserEnvironment no")
	y.file("one", "to: "+y.path("srv/shop")+"\nhosts: [plain]\n")
	y.does(0, "plain: is sent culvert, ", y.deploy("1111111")...)
	y.shows("one", "srv/shop")
	y.file("two", "to: "+y.path("srv/shop")+"\nhosts: [plain]\n")
	y.does(0, "1 host switched", y.deploy("2222222")...)
	if got := y.read("asked"); got != "\n" {
		t.Errorf("the other one was asked %d times", len(got))
	}
	y.file("three", "to: "+y.path("srv/shop")+"\nhosts: [forced]\n")
	y.lacks(y.does(1, "forced: the deployer speaks version 7 of the wire, the culvert of this host version 6, and the one that deploys could not be brought there (this key is for", y.deploy("3333333")...),
		"install it there, or deploy by one of the host's version", "forced - - failed")
}

// A folder from before is not deployed beside, and neither is a real one replaced that is called
// current: the hint is a line that makes releases of them.
func TestFoldersFromBefore(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.shops("web-1", "web-2")
	y.serve()
	y.write("web-1/index.html", "old")
	y.write("web-2/current/index.html", "old")
	y.file("new", "hosts: [web-1, web-2]\n")
	hint := regexp.MustCompile(`(?m)^culvert: hint: (cd .*)$`)
	for _, words := range []string{"web-1 is no folder of releases: index.html is in it", "web-2/current is not a link"} {
		y.does(1, words, y.deploy("1111111", "--plan")...)
		r := y.does(1, words, y.deploy("1111111")...)
		line := hint.FindStringSubmatch(r.err)
		if line == nil {
			t.Fatalf("no hint: %s", r.err)
		}
		if out, err := exec.CommandContext(t.Context(), "sh", "-ec", line[1]).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line[1], err, out)
		}
	}
	for _, host := range []string{"web-1", "web-2"} {
		if got := y.read(host + "/current/index.html"); got != "old" {
			t.Errorf("%s serves %q", host, got)
		}
	}
	y.lacks(y.does(0, "2 hosts switched", y.deploy("1111111")...), "was before")
	y.shows("new", "web-1", "web-2")
	y.does(0, "rolled-back", "rollback", "-F", y.path("ssh_config"), "before")
}

// The disk is full in the middle: nothing that runs is lost, and the same line goes on when there
// is room.
func TestDiskFullOverSSH(t *testing.T) {
	resolvertest.InMachine(t, func(t *testing.T) {
		y := newYard(t)
		y.shops("web-1", "web-2")
		y.shell(`ip link set lo up; mkdir disk; mount -t tmpfs -o size=8m tmpfs disk; mkdir disk/1 disk/2; mount --bind disk/1 web-1; mount --bind disk/2 web-2; mkdir -p /run/sshd`)
		t.Cleanup(func() {
			for _, at := range []string{"web-1", "web-2", "disk"} {
				if err := syscall.Unmount(y.path(at), syscall.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}
		})
		y.serve()
		const hosts = "hosts: [web-1, web-2]\n"
		y.file("one", hosts)
		y.does(0, "2 hosts switched", y.deploy("1111111")...)
		y.file("two", hosts)
		y.shell("head -c 9000000 /dev/urandom >project/dist/big")
		r := y.does(1, "bytes on the disk of", y.deploy("2222222")...)
		y.lacks(r, "culvert: hint: df -h ", "web-1 - ID failed", "web-2 - ID failed")
		// there is room for what one of them is to get
		y.shell("head -c 5000000 /dev/urandom >project/dist/big")
		r = y.does(1, "the disk of ", y.deploy("2222222")...)
		y.lacks(r, "culvert: hint: df -h ")
		y.shows("one", "web-1", "web-2")
		y.does(0, "live: web-1 web-2", "releases", "-F", y.path("ssh_config"))
		y.shell("mount -o remount,size=64m disk")
		y.does(0, "2 hosts switched", y.deploy("2222222")...)
		y.shows("two", "web-1", "web-2")
		y.shell("for h in 1 2; do cmp project/dist/big web-$h/current/big; done")
	})
}
