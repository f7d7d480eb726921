package rollouts_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/cli"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/release"
)

const soon = 30 * time.Second

// build builds culvert as it is shipped: it is started very often, and is brought to a host.
var build = sync.OnceValues(func() (program string, err error) {
	if built, err = os.MkdirTemp("", "culvert-rollouts-"); err != nil {
		return "", err
	}
	program = filepath.Join(built, "culvert")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "../../../cmd/culvert")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return program, fmt.Errorf("build culvert: %w: %s", err, out)
	}
	return program, nil
})

// built is the folder of that.
var built string

// The test program is culvert, too, where it is called so: for what starts it seldom.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "culvert" {
		os.Exit(cli.Main("test", os.Args[1:]))
	}
	if filepath.Base(os.Args[0]) == "shop" {
		os.Exit(shopMain())
	}
	code := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(code)
}

// A yard is a stock sshd, a culvert in a folder of its own, and a project.
type yard struct {
	t       *testing.T
	dir     string
	culvert string
	sshd    string // its port
	user    string
	aliases []string
}

func newYard(t *testing.T) *yard {
	t.Helper()
	for _, tool := range []string{"go", "ssh", "ssh-keygen", "/usr/sbin/sshd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("not here:", err)
		}
	}
	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	y := &yard{t: t, dir: t.TempDir(), user: self.Username}
	if y.culvert, err = build(); err != nil {
		t.Fatal(err)
	}
	y.write("authorized", "")
	y.write("keys/.keep", "")
	y.keygen("host")
	return y
}

func (y *yard) path(name string) string { return filepath.Join(y.dir, name) }

func (y *yard) write(name, text string) {
	y.t.Helper()
	if err := os.MkdirAll(filepath.Dir(y.path(name)), 0o755); err != nil {
		y.t.Fatal(err)
	}
	if err := os.WriteFile(y.path(name), []byte(text), 0o600); err != nil {
		y.t.Fatal(err)
	}
}

func (y *yard) read(name string) string {
	y.t.Helper()
	text, err := os.ReadFile(y.path(name))
	if err != nil {
		y.t.Fatal(err)
	}
	return string(text)
}

// key is the file of a key.
func (y *yard) key(name string) string { return y.path("keys/" + name) }

func (y *yard) public(name string) string { return y.read("keys/" + name + ".pub") }

func (y *yard) keygen(name string) {
	y.t.Helper()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", y.key(name)).CombinedOutput(); err != nil {
		y.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

// host lets a key in, with the options of its line, by a name of its own.
func (y *yard) host(name, options string) {
	y.t.Helper()
	y.keygen(name)
	y.write("authorized", y.read("authorized")+strings.TrimSpace(options+" "+y.public(name))+"\n")
	y.aliases = append(y.aliases, name)
}

// serve starts sshd, and tells ssh of the hosts.
func (y *yard) serve(settings ...string) {
	y.t.Helper()
	if os.Geteuid() == 0 {
		_ = os.Mkdir("/run/sshd", 0o755)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		y.t.Fatal(err)
	}
	_, y.sshd, _ = net.SplitHostPort(l.Addr().String())
	l.Close()
	y.write("sshd_config", strings.Join(append(settings,
		"ListenAddress 127.0.0.1:"+y.sshd, "HostKey "+y.key("host"), "AuthorizedKeysFile "+y.path("authorized"), "MaxStartups 100",
		"SetEnv HOME="+y.path("home"), // a shell there is to read nothing of root's own
		"PidFile none", "UsePAM no", "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "",
	), "\n"))
	y.background(exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", y.path("sshd_config")), "Server listening")
	config, known := "", ""
	for _, name := range y.aliases {
		config += fmt.Sprintf("Host %s\n  HostName 127.0.0.1\n  Port %s\n  HostKeyAlias %s\n  IdentityFile %s\n", name, y.sshd, name, y.key(name))
		known += name + " " + y.public("host")
	}
	y.write("known_hosts", known+fmt.Sprintf("[127.0.0.1]:%s %s", y.sshd, y.public("host")))
	y.write("ssh_config", config+fmt.Sprintf("Host *\n  User %s\n  IdentitiesOnly yes\n  UserKnownHostsFile %s\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n", y.user, y.path("known_hosts")))
}

// background starts a program that says something on stderr when it is ready, and ends it after
// the test. It returns that line.
func (y *yard) background(cmd *exec.Cmd, ready string) string {
	y.t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r, w := io.Pipe()
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		y.t.Fatal(err)
	}
	said, over := make(chan string, 1), make(chan struct{})
	var mu sync.Mutex
	all := ""
	go func() {
		defer close(over)
		told := false
		for in := bufio.NewScanner(r); in.Scan(); {
			mu.Lock()
			all += in.Text() + "\n"
			mu.Unlock()
			if !told && strings.Contains(in.Text(), ready) {
				said <- in.Text()
				told = true
			}
		}
	}()
	y.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		w.Close()
		<-over
	})
	select {
	case line := <-said:
		return line
	case <-time.After(soon):
		mu.Lock()
		defer mu.Unlock()
		y.t.Fatalf("%v has not said %q: %s", cmd.Args, ready, all)
	}
	return ""
}

// A result is what a verb has said, and its exit code.
type result struct {
	out, err string
	code     int
}

// run runs a verb in the project.
func (y *yard) run(args ...string) result {
	y.t.Helper()
	var out, said bytes.Buffer
	cmd := exec.CommandContext(y.t.Context(), y.culvert, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = y.path("project"), &out, &said
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + y.path("me")}
	timer := time.AfterFunc(2*soon, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Run()
	return result{out.String(), said.String(), cmd.ProcessState.ExitCode()}
}

// does runs a verb, and wants an exit code and words, of either stream.
func (y *yard) does(code int, words string, args ...string) result {
	y.t.Helper()
	r := y.run(args...)
	if r.code != code || !strings.Contains(r.out+r.err, words) {
		y.t.Fatalf("culvert %q: exit code %d, want %d and %q\n%s%s", args, r.code, code, words, r.out, r.err)
	}
	return r
}

// table is one without its ids, and with single blanks.
func table(text string) string {
	text = regexp.MustCompile(`\d{8}-\d{6}-[0-9a-f]{7}`).ReplaceAllString(text, "ID")
	return regexp.MustCompile(` +`).ReplaceAllString(text, " ")
}

// shows is what a host serves.
func (y *yard) shows(want string, hosts ...string) {
	y.t.Helper()
	for _, h := range hosts {
		if got := y.read(h + "/current/page"); got != want {
			y.t.Errorf("%s shows %q, want %q", h, got, want)
		}
	}
}

const project = `app: shop
build: mkdir -p dist && cp page dist/page
from: dist
hosts: {web: ["web-[1:3]"]}
restart: cmd grep -q good "$CULVERT_TO/current/page"
health: cmd test -s "$CULVERT_TO/current/page"
hooks: {post_release: 'echo "it is $CULVERT_RELEASE"'}
notify: cat > ../notified
`

// The verbs, by a stock sshd whose keys can do what their hosts' policies allow.
func TestDeployVerbs(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	names := []string{"web-1", "web-2", "web-3"}
	for _, name := range names {
		y.write(name+".yaml", fmt.Sprintf("app: shop\nto: %s\nrestart: ['cmd grep -q good \"$CULVERT_TO/current/page\"']\nhealth: ['cmd test -s \"$CULVERT_TO/current/page\"']\nhooks: ['echo \"it is $CULVERT_RELEASE\"']\nexec: [cat page]\n", y.path(name)))
		if err := os.Mkdir(y.path(name), 0o755); err != nil {
			t.Fatal(err)
		}
		y.host(name, fmt.Sprintf(`restrict,command="%s apply --app shop --policy %s --who ci"`, y.culvert, y.path(name+".yaml")))
	}
	y.serve()
	y.write("project/culvert.yaml", project)
	y.write("project/page", "good one")
	to := func(verb string, args ...string) []string {
		return append([]string{verb, "-F", y.path("ssh_config")}, args...)
	}

	plan := y.does(0, "shop: release ", to("deploy", "--plan", "--commit", "1111111111")...)
	if got, want := table(plan.out), "shop: release ID of 1111111, 1 file, 8 B\n switch: current\n restart: cmd grep -q good \"$CULVERT_TO/current/page\"\n health: cmd test -s \"$CULVERT_TO/current/page\"\n post_release: echo \"it is $CULVERT_RELEASE\"\n"+
		"HOST ROLE BATCH RUNS SEND PROBLEMS\nweb-1 web 1 - 8 B -\nweb-2 web 2 - 8 B -\nweb-3 web 3 - 8 B -\n"; got != want {
		t.Errorf("the plan\n%s\nwant\n%s", got, want)
	}
	y.does(1, "web-1: nothing was deployed to ", to("rollback")...)
	y.does(1, "web-1: nothing is current in ", to("exec", "--", "cat", "page")...)
	one := y.does(0, "3 hosts switched", to("deploy", "--commit", "1111111111")...)
	if got, want := table(one.out), "HOST ROLE RELEASE STATE WHY\nweb-1 web ID deployed was no release\nweb-2 web ID deployed was no release\nweb-3 web ID deployed was no release\n"; got != want {
		t.Errorf("the table\n%s\nwant\n%s", got, want)
	}
	if !strings.Contains(one.err, "web-3: it is 20") || strings.ContainsAny(one.err, "\x1b\r#") {
		t.Errorf("it said %q", one.err)
	}
	y.shows("good one", names...)
	var told deploy.Report
	if err := json.Unmarshal([]byte(y.read("notified")), &told); err != nil || !told.Done || len(told.Hosts) != 3 {
		t.Errorf("notified of %+v, %v", told, err)
	}

	y.write("project/page", "bad")
	bad := y.does(1, "culvert: error: web-1: restart: ", to("deploy", "--commit", "2222222222")...)
	if got := table(bad.out); !strings.HasPrefix(got, "HOST ROLE RELEASE STATE WHY\nweb-1 web ID restored restart: ") || !strings.Contains(got, "\nweb-2 web ID untouched -\nweb-3 web ID untouched -\n") {
		t.Errorf("the table\n%s", got)
	}
	y.shows("good one", names...)

	y.write("project/page", "good three")
	y.does(0, "release ", to("deploy", "--plan", "-o", "plan.json", "--commit", "3333333333")...)
	y.write("project/dist/page", "good, but not what was planned")
	y.does(1, "is not what was planned", to("deploy", "--apply", "plan.json")...)
	y.write("project/dist/page", "good three")
	var report deploy.Report
	applied := y.does(0, `"done": true`, to("deploy", "--apply", "plan.json", "--json")...)
	if err := json.Unmarshal([]byte(applied.out), &report); err != nil || report.Commit != "3333333333" || len(report.Hosts) != 3 || report.Hosts[2].State != deploy.Deployed {
		t.Errorf("%+v, %v", report, err)
	}
	y.shows("good three", names...)
	y.does(0, "runs on 3 hosts already", to("deploy", "--commit", "3333333333", "--no-build")...)

	y.does(0, "good three\n", to("exec", "--to", "web-2", "--", "cat", "page")...)
	y.does(3, "web-1: ", to("exec", "--", "id")...)
	if got := y.does(0, "", to("exec", "--", "cat", "page")...).out; strings.Count(got, ": good three\n") != 3 {
		t.Errorf("exec on three: %q", got)
	}
	list := table(y.does(0, "RELEASE", to("releases")...).out)
	for _, want := range []string{"ID 3333333 ", "ID 1111111 ", " ci live: web-1 web-2 web-3\n", " ci good: web-1 web-2 web-3\n"} {
		if !strings.Contains(list, want) {
			t.Errorf("the releases lack %q:\n%s", want, list)
		}
	}
	if got := table(y.does(0, "nothing was changed", to("rollback", "--plan")...).out); !strings.Contains(got, "\nweb-3 web ID untouched would go back to ID\n") {
		t.Errorf("the plan of a rollback\n%s", got)
	}
	back := y.does(0, "goes back from", to("rollback")...)
	if !strings.Contains(back.out, "rolled-back") {
		t.Errorf("rollback: %s", back.out)
	}
	y.shows("good one", names...)
	y.does(0, "rolled-back", to("rollback", report.Release, "--to", "web-1")...)
	y.shows("good three", "web-1")
	y.shows("good one", "web-2", "web-3")

	// What the policy does not allow is refused before anything is changed; and there is no shell.
	y.write("project/culvert.yaml", strings.Replace(project, "echo", "id; echo", 1))
	y.does(3, "web-1: ", to("deploy", "--commit", "4444444444")...)
	y.shows("good one", "web-2", "web-3")
	out, _ := exec.Command("ssh", "-F", y.path("ssh_config"), "-o", "BatchMode=yes", "web-1", "id").CombinedOutput()
	if strings.Contains(string(out), "uid=") {
		t.Errorf("a key with a forced command got a shell: %s", out)
	}

	// A host that is away.
	y.write("project/culvert.yaml", strings.Replace(project, `"web-[1:3]"`, `"web-[1:3]", "ssh://127.0.0.1:1"`, 1))
	away := y.does(1, "ssh://127.0.0.1:1: ", to("deploy", "--commit", "5555555555")...)
	if !strings.Contains(away.err, "refused") || !strings.Contains(table(away.out), "ssh://127.0.0.1:1 web - unreachable") {
		t.Errorf("%s%s", away.out, away.err)
	}

	y.does(2, "-i: stat", to("deploy", "-i", "nokey")...)
	y.write("project/culvert.yaml", project+"bacth: [1]\n")
	y.does(2, "culvert.yaml:9:1: unknown key \"bacth\"", to("deploy")...)
	y.does(2, "there is no other.yaml", to("deploy", "-f", "other.yaml")...)
	y.does(2, "--apply: open noplan", to("deploy", "--apply", "noplan")...)
	y.write("project/culvert.yaml", project+"to: /srv/shop\nenvs: {prod: {}, qa: {}}\n")
	y.does(2, "several environments, name one: prod, qa", to("deploy")...)
	y.does(2, "a command is missing", to("exec", "prod")...)
	policy := y.does(0, "app: shop", to("deploy", "prod", "--print-policy")...)
	if p, err := release.ParsePolicy([]byte(policy.out)); err != nil || p.To != "/srv/shop" || len(p.Health) != 1 || len(p.Hooks) != 1 {
		t.Errorf("%+v, %v\n%s", p, err, policy.out)
	}
	schema, err := deploy.Schema()
	if err != nil || y.does(0, "", "deploy", "--print-schema").out != string(schema) {
		t.Errorf("the schema is another: %v", err)
	}
}

// A host without culvert gets it, once.
func TestDeployBringsItself(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.host("plain", "")
	y.write("home/.keep", "")
	y.serve("SetEnv HOME="+y.path("home")+" PATH=/usr/bin:/bin", "PermitUserEnvironment no")
	y.write("project/culvert.yaml", "app: shop\nfrom: dist\nto: "+y.path("srv/shop")+"\nhosts: [plain]\n")
	y.write("project/dist/page", "good one")
	y.write("srv/.keep", "")
	cached := func(name string) string { return y.path("home/.cache/culvert/" + name) }
	old, younger, other := cached(strings.Repeat("0", 64)), cached(strings.Repeat("1", 64)), cached("other")
	long := time.Now().Add(-32 * 24 * time.Hour)
	for dir, used := range map[string]time.Time{old: long, other: long, younger: time.Now().Add(-28 * 24 * time.Hour)} {
		if err := os.MkdirAll(filepath.Join(dir, "in"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(dir, time.Time{}, used); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"deploy", "-F", y.path("ssh_config"), "--commit", "1111111111"}
	y.does(0, "plain: is sent culvert, ", args...)
	y.shows("good one", "srv/shop")
	for dir, stays := range map[string]bool{old: false, younger: true, other: true} {
		if _, err := os.Stat(dir); (err == nil) != stays {
			t.Errorf("%s: %v", dir, err)
		}
	}
	brought, err := filepath.Glob(cached(strings.Repeat("?", 64) + "/culvert"))
	if err != nil || len(brought) != 1 {
		t.Fatalf("%v, %v", brought, err)
	}
	if err := os.Chtimes(filepath.Dir(brought[0]), time.Time{}, long); err != nil {
		t.Fatal(err)
	}
	y.write("project/dist/page", "good two")
	if again := y.does(0, "1 host switched", args...); strings.Contains(again.err, "is sent culvert") {
		t.Errorf("it was brought again: %s", again.err)
	}
	if info, err := os.Stat(filepath.Dir(brought[0])); err != nil || !info.ModTime().After(long.Add(time.Hour)) {
		t.Errorf("it is not said that it was used: %v", err)
	}
	y.shows("good two", "srv/shop")
	y.does(0, "good two", "exec", "-F", y.path("ssh_config"), "--", "sh", "-c", "cat page")
}

// A host of another machine whose culvert speaks another version takes nothing of ours.
func TestDeployBringsNothingElsewhere(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.host("other", "")
	y.write("home/.keep", "")
	y.write("bin/uname", "#!/bin/sh\n[ $1 = -m ] && echo mips64 || echo Linux\n")
	if err := os.Chmod(y.path("bin/uname"), 0o755); err != nil {
		t.Fatal(err)
	}
	y.serve("SetEnv HOME="+y.path("home")+" PATH="+y.path("bin")+":/usr/bin:/bin", "PermitUserEnvironment no")
	s := &deploy.SSH{App: "shop", Config: y.path("ssh_config"), Program: y.culvert}
	wire, err := s.Dial(t.Context(), deploy.Host{Name: "other"}) // which knows its hash then
	if err != nil {
		t.Fatal(err)
	}
	wire.Close()
	_ = wire.(deploy.Wire).Why()
	brought, err := s.Bring(t.Context(), deploy.Host{Name: "other"}, &release.Error{Code: release.Mismatch, Text: "version 1, version 2"}, func(string) {})
	if brought || err == nil || !strings.Contains(err.Error(), "version 1, version 2") || !strings.Contains(err.Error(), "does not run on Linux mips64") {
		t.Errorf("%v, %v", brought, err)
	}
	if _, err := os.Stat(y.path("home/.cache")); !os.IsNotExist(err) {
		t.Errorf("something was taken: %v", err)
	}
}

// A host that only dials out is reached by way of its hub.
func TestDeployThroughHub(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	for _, key := range []string{"hub", "agent"} {
		y.keygen(key)
	}
	y.write("db-01/.keep", "")
	y.write("policy", fmt.Sprintf("app: shop\nto: %s\n", y.path("db-01")))
	y.host("db-01", fmt.Sprintf(`restrict,command="%s apply --app shop --policy %s"`, y.culvert, y.path("policy")))
	y.serve()
	y.write("ssh_config", fmt.Sprintf("Host *\n  User %s\n  IdentitiesOnly yes\n  UserKnownHostsFile %s\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n", y.user, y.path("known_hosts")))
	y.write("rights", fmt.Sprintf("permitlisten=\"db-01:22\" %spermitopen=\"db-*:22\" %s", y.public("agent"), y.public("db-01")))
	line := y.background(exec.Command(y.culvert, "hub", "--listen", "127.0.0.1:0", "--authorized-keys", y.path("rights"), "--host-key", y.key("hub")), "listening at ")
	at := regexp.MustCompile(`listening at (\S+);`).FindStringSubmatch(line)[1]
	host, port, _ := net.SplitHostPort(at)
	y.write("me/.ssh/known_hosts", fmt.Sprintf("[%s]:%s %s", host, port, y.public("hub")))
	y.background(exec.Command(y.culvert, "agent", "--hub", at, "--hub-key", strings.TrimSpace(y.public("hub")), "--key", y.key("agent"), "--name", "db-01", "--offer", "22="+y.sshd), "offered as db-01")
	y.write("project/culvert.yaml", "app: shop\nfrom: dist\nhub: "+at+"\nhosts: [db-01]\n")
	y.write("project/dist/page", "good one")
	args := []string{"-F", y.path("ssh_config"), "-i", y.key("db-01")}
	y.does(0, "1 host switched", append([]string{"deploy", "--commit", "1111111111"}, args...)...)
	y.shows("good one", "db-01")
	y.write("project/culvert.yaml", "app: shop\nfrom: dist\nhub: "+at+"\nhosts: [db-01, db-02]\n")
	y.does(1, "db-02: ", append([]string{"deploy", "--commit", "2222222222"}, args...)...)
}

// A deployer is killed while it ships, and while hosts are at it: each ends by itself what it has begun,
// and the same line again brings all to the new release.
func TestDeployerKilled(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	for _, name := range []string{"web-1", "web-2"} {
		y.write(name+"/.keep", "")
		y.write(name+".yaml", fmt.Sprintf("app: shop\nto: %s\nrestart: ['*']\nhealth: ['*']\nhooks: ['*']\n", y.path(name)))
		y.host(name, fmt.Sprintf(`restrict,command="%s apply --app shop --policy %s"`, y.culvert, y.path(name+".yaml")))
	}
	y.serve()
	y.write("project/culvert.yaml", "app: shop\nfrom: dist\nhosts: [web-1, web-2]\nrestart: cmd sleep 0.1\nhealth: cmd sleep 0.1\nhooks: {pre_release: sleep 0.1, post_release: sleep 0.1}\n")
	args := []string{"deploy", "-v", "--wait", "1m", "-F", y.path("ssh_config"), "--commit", "1111111111"}
	y.write("project/dist/page", "first")
	y.does(0, "2 hosts switched", args...)
	for _, at := range []string{"… deploy shop", "web-1: pre_release", "web-1: switch", "web-1: restart", "web-1: health", "web-1: post_release", "web-2: switch"} {
		y.write("project/dist/page", at)
		cmd := exec.CommandContext(t.Context(), y.culvert, args...)
		cmd.Dir, cmd.Env = y.path("project"), []string{"PATH=" + os.Getenv("PATH"), "HOME=" + y.path("me")}
		said, err := cmd.StderrPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for in := bufio.NewScanner(said); !found && in.Scan(); {
			found = strings.Contains(in.Text(), at)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if !found {
			t.Fatalf("the deployer ended before %q", at)
		}
		for _, host := range []string{"web-1", "web-2"} {
			if page := y.read(host + "/current/page"); page == "" {
				t.Errorf("killed at %q: nothing is current on %s", at, host)
			}
		}
		y.does(0, "shop ", args...)
		y.shows(at, "web-1", "web-2")
	}
	for until := time.Now().Add(soon); exec.Command("pgrep", "-f", "ssh .*-F "+y.path("ssh_config")).Run() == nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("an ssh of a deployer who was killed is still there")
		}
	}
}
