package release

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const anybody = 65534 // the uid of nobody, who stands for the app's user

// rooted is a yard where root deploys for nobody.
func rooted(t *testing.T) *yard {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can become another")
	}
	if p, err := lookUp("nobody"); err != nil || p.uid != anybody {
		t.Skip("nobody is somebody else here:", err)
	}
	y := newYard(t)
	for dir := filepath.Dir(y.to); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	y.opts.Policy = &Policy{App: "shop", To: y.to, User: "nobody", Shared: []string{everything}, Restart: []string{everything}, Hooks: []string{everything}}
	return y
}

func (y *yard) info(name string) fs.FileInfo {
	y.t.Helper()
	info, err := os.Lstat(filepath.Join(y.to, name))
	if err != nil {
		y.t.Fatal(err)
	}
	return info
}

func (y *yard) must(errs ...error) {
	y.t.Helper()
	for _, err := range errs {
		if err != nil {
			y.t.Fatal(err)
		}
	}
}

// Nobody can get into a release before root has done with all that is below.
func TestReleaseIsOpenedLast(t *testing.T) {
	t.Parallel()
	y := rooted(t)
	var changes []string
	y.opts.before = func(what string) { changes = append(changes, what) }
	c, done := y.wire()
	y.greet(c)
	if _, err := c.Lock(limit(t), Lock{}, nil); err != nil {
		t.Fatal(err)
	}
	y.ship(c, "a", tree{"-x/file": "1", "+x/file": "2", "lib/file": "3"})
	c.Close()
	<-done
	opened := slices.Index(changes, "chmod releases/.incoming-a")
	if opened < 0 || slices.IndexFunc(changes[opened+1:], func(c string) bool { return strings.Contains(c, incoming) }) >= 0 {
		t.Error(changes)
	}
	for _, name := range []string{"-x", "+x", "lib"} {
		if info := y.info("releases/a/" + name); owner(info) != anybody || info.Mode().Perm() != 0o755 {
			t.Error(name, info.Mode(), owner(info))
		}
	}
}

// What is made in shared/, which belongs to the app's user, is made by him.
func TestSharedIsHostile(t *testing.T) {
	t.Parallel()
	y := rooted(t)
	y.config.Shared = []string{"var/log/"}
	y.good("a", first)
	if owner(y.info("shared/var/log")) != anybody {
		t.Error("shared/var/log is not nobody's")
	}
	y.must(os.Symlink("../.culvert", filepath.Join(y.to, "shared/trap")), os.Lchown(filepath.Join(y.to, "shared/trap"), anybody, anybody))
	y.config.Shared = []string{"trap/made/"}
	c, _ := y.locked()
	if _, err := ship(limit(t), c, "b", second); code(err) != Failed {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(y.to, ".culvert/made")); err == nil {
		t.Error("root made a folder where a link of nobody's leads")
	}
}

// Only what was made is given away: not what somebody else was faster with.
func TestGiveOnlyOwn(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root gives away")
	}
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	d := &disk{Root: root, uid: anybody, gid: anybody, before: func(what string) {
		if what == "mkdir theirs" {
			_ = os.Mkdir(filepath.Join(dir, "theirs"), 0o755)
		}
	}}
	for name, want := range map[string]int{"theirs": 0, "ours": anybody} {
		if err := d.mkdirs(".", name); err != nil {
			t.Error(err)
		}
		if info, err := root.Lstat(name); err != nil || owner(info) != want {
			t.Errorf("%s: %v, %v", name, owner(info), err)
		}
	}
}

// What is half here, and was in the hands of the app's user, is begun anew.
func TestIncomingOfAnother(t *testing.T) {
	t.Parallel()
	y := rooted(t)
	offer := func(shared ...string) {
		t.Helper()
		y.config.Shared = shared
		c, _ := y.locked()
		defer c.Close()
		entries, _ := tree{"lib/file": "text", "up/file": "more"}.entries()
		if missing, err := c.Offer(limit(t), Offer{ID: "a", Entries: entries}); err != nil || len(missing) != 2-len(shared) {
			t.Fatal(missing, err)
		}
	}
	offer()
	at := filepath.Join(y.to, "releases/.incoming-a")
	planted := filepath.Join(at, "planted")
	for name, change := range map[string]func() error{
		"owner": func() error { return os.Chown(at, anybody, anybody) },
		"mode":  func() error { return os.Chmod(at, 0o755) },
	} {
		y.must(os.WriteFile(planted, nil, 0o644), change())
		offer()
		if _, err := os.Lstat(planted); err == nil {
			t.Errorf("%s: root goes on in what was another's", name)
		}
		if info := y.info("releases/.incoming-a"); owner(info) != 0 || info.Mode().Perm() != 0o700 {
			t.Error(name, info.Mode(), owner(info))
		}
	}
	// A link to what was shared is not gone through when it is so no more.
	offer("up")
	offer()
	if !y.info("releases/.incoming-a/up").IsDir() {
		t.Error("up is still a link to shared/")
	}
}

// A release that was renamed to its place, and no more, was the app's user's before the log
// knew of it.
func TestWholeButNotLogged(t *testing.T) {
	t.Parallel()
	y := rooted(t)
	c, _ := y.locked()
	all := y.ship(c, "a", first)
	c.Close()
	y.must(os.Truncate(filepath.Join(y.to, logFile), 0), os.WriteFile(filepath.Join(y.to, "releases/a/planted"), nil, 0o644))
	c, _ = y.locked()
	if sent := y.ship(c, "a", first); sent != all {
		t.Errorf("%d bytes were sent of %d", sent, all)
	}
	y.check(filepath.Join(y.to, "releases/a"), first)
	y.tidy()
}

// Root does not deploy to where another may swap things, whatever a deployer makes of its problems.
func TestFolderOfAnother(t *testing.T) {
	t.Parallel()
	y := rooted(t)
	y.good("a", first)
	for _, name := range []string{".", ".culvert", "releases"} {
		at := filepath.Join(y.to, name)
		mode := y.info(name).Mode().Perm()
		for what, change := range map[string]func() error{
			"owner": func() error { return os.Chown(at, anybody, -1) },
			"mode":  func() error { return os.Chmod(at, 0o775) },
		} {
			y.must(change())
			c, _ := y.wire()
			if h := y.greet(c); len(h.Problems) != 1 || !strings.HasSuffix(h.Problems[0].Hint, "go-w "+at) {
				t.Errorf("%s: %s: %+v", name, what, h.Problems)
			}
			if _, err := c.Lock(limit(t), Lock{}, nil); code(err) != Refused {
				t.Errorf("%s: %s: %v", name, what, err)
			}
			c.Close()
			y.must(os.Chown(at, 0, -1), os.Chmod(at, mode))
		}
	}
	y.good("b", second)
}

// Our own files are files, and nobody else's.
func TestOwnFiles(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	for _, name := range []string{logFile, lockFile, manifestFile("a")} {
		if mode := y.info(name).Mode(); mode != 0o600 {
			t.Error(name, mode)
		}
	}
	y.must(os.Chmod(filepath.Join(y.to, logFile), 0o644), os.Chmod(filepath.Join(y.to, lockFile), 0o644)) // an older culvert's
	y.good("b", second)
	if y.info(logFile).Mode() != 0o600 || y.info(lockFile).Mode() != 0o600 {
		t.Error(y.info(logFile).Mode(), y.info(lockFile).Mode())
	}
	root, err := os.OpenRoot(y.to)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	d := &disk{Root: root, uid: -1, gid: -1}
	y.must(os.Symlink("log.jsonl", filepath.Join(y.to, ".culvert/link")), syscall.Mkfifo(filepath.Join(y.to, ".culvert/fifo"), 0o600))
	for _, name := range []string{"link", "fifo", "manifests"} {
		if f, err := d.own(".culvert/"+name, os.O_RDONLY); err == nil {
			t.Error(name)
			f.Close()
		}
	}
}

// With a umask of root's usual strictness a web server can still read what is deployed. The
// umask is the whole process's: no test is parallel to this one.
func TestUmask(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	y := newYard(t)
	y.config.Shared = []string{"var/log/"}
	y.good("a", first)
	for _, name := range []string{".", "releases", "releases/a", "releases/a/lib", "releases/a/var", "shared"} {
		if mode := y.info(name).Mode().Perm(); mode != 0o755 {
			t.Error(name, mode)
		}
	}
}

// What a deployer or a server says at length is not said again in each answer.
func TestLongTexts(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	c, _ := y.locked()
	for _, commit := range []string{strings.Repeat("c", maxCommit+1), "a\nb"} {
		if _, err := c.Offer(limit(t), Offer{ID: "a", Commit: commit}); code(err) != Misused {
			t.Error(err)
		}
	}
	c.Close()
	root, err := os.OpenRoot(y.to)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	s := &session{hello: &Hello{To: y.to}, disk: &disk{Root: root, uid: -1, gid: -1}}
	y.must(s.record(record{Event: eventBroken, Release: "a", Phase: PhaseHealth, Error: strings.Repeat("é", 1<<20)}))
	if text := y.read(logFile); len(text) > 2*maxText {
		t.Errorf("%d bytes", len(text))
	}
	var all []Release
	for i := range 3000 {
		all = append(all, Release{ID: fmt.Sprint(i), Error: strings.Repeat("\x01", maxText), Current: i == 2999})
	}
	all = fit(all)
	text, err := json.Marshal(all)
	if err != nil || len(text) > maxMessage*3/4 || len(all) < 100 || all[0].ID != "0" || !all[len(all)-1].Current {
		t.Errorf("%d releases, %d bytes, %v", len(all), len(text), err)
	}
}

// Entries that are short on the wire are long in memory.
func TestManyEntries(t *testing.T) {
	t.Parallel()
	for _, p := range []parts{
		{entries: make([]Entry, maxEntries-1)}, {pieces: maxPieces - 1}, {weight: maxManifest - 3},
	} {
		p.add([]byte(`[{},{}]`))
		if p.err == nil || p.err.Code != Manifest || p.entries != nil {
			t.Error(p.err)
		}
	}
	var p parts
	p.add([]byte(`[{"path":"a"},{"chunks":[{},{}]}]`))
	p.add([]byte(`null`))
	if p.err != nil || len(p.entries) != 2 || p.pieces != 3 {
		t.Errorf("%+v", p)
	}
	if p.add([]byte(`{}`)); p.err == nil {
		t.Error("no list")
	}
	c := Config{Shared: make([]string, maxShared+1)}
	for i := range c.Shared {
		c.Shared[i] = fmt.Sprint("d", i)
	}
	if err := c.Check(); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
}

// Data is all of the standard output, and nothing of what is said besides.
func TestJobData(t *testing.T) {
	t.Parallel()
	j := job{argv: []string{"sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo warning >&2"}, data: 1 << 20, timeout: time.Minute}
	if out, err := j.run(context.Background()); err != nil || out != strings.Repeat("x", 300000) {
		t.Error(len(out), err)
	}
	j.data = 1 << 10
	if out, err := j.run(context.Background()); err == nil {
		t.Error(len(out))
	}
	j = job{argv: []string{"sh", "-c", "echo out; echo why >&2; exit 1"}, data: 1 << 10, timeout: time.Minute}
	if out, err := j.run(context.Background()); err == nil || out != "why\n" {
		t.Error(out, err)
	}
}

// A unit is restarted by root, whoever the app's user is, in no folder of his.
func TestSystemdIsRoots(t *testing.T) {
	y := rooted(t)
	dir := t.TempDir()
	y.must(os.WriteFile(filepath.Join(dir, "systemctl"), []byte(`#!/bin/sh
dir=`+dir+`
echo "$1 $(id -u) $(pwd)" >>$dir/asked
case "$*" in
*LoadState*) echo loaded ;;
*MainPID*) echo MainPID=$(cat $dir/pid) ;;
restart*)
	[ ! -e $dir/pid ] || kill "$(cat $dir/pid)"
	tail -f /dev/null >/dev/null 2>&1 &
	echo $! >$dir/pid ;;
esac
`), 0o755))
	t.Cleanup(func() { _ = syscall.Kill(pidIn(t, filepath.Join(dir, "pid")), syscall.SIGKILL) })
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	y.config.Restart = &Action{Kind: "systemd", Arg: "shop"}
	y.good("a", first)
	text, err := os.ReadFile(filepath.Join(dir, "asked"))
	if err != nil || string(text) != "show 0 /\nreset-failed 0 /\nrestart 0 /\nshow 0 /\nshow 0 /\n" {
		t.Errorf("%s, %v", text, err)
	}
}

func TestLocal(t *testing.T) {
	ctx := limit(t)
	for host, want := range map[string]bool{
		"localhost": true, "127.0.0.1": true, "::1": true, "::ffff:127.0.0.1": true, "0.0.0.0": true, "192.0.2.1": false,
	} {
		if local(ctx, host) != want {
			t.Error(host)
		}
	}
	name, _ := os.Hostname()
	if all, err := net.LookupHost(name); err != nil || !slices.ContainsFunc(all, func(a string) bool { return local(ctx, a) }) {
		t.Skip(name, "is not known to be this host")
	}
	if !local(ctx, name) {
		t.Error(name)
	}
}
