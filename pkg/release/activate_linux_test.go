package release

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// deployHook deploys b over a with a hook, and returns what it has printed.
func (y *yard) deployHook(script string, timeout time.Duration) (Result, string) {
	y.t.Helper()
	y.good("a", first)
	y.config.Hooks = Hooks{PreRelease: script, Timeout: timeout}
	y.events = nil
	r := y.deploy("b", second)
	var out strings.Builder
	for _, e := range y.events {
		if e.Kind == "output" {
			fmt.Fprintln(&out, e.Text)
		}
	}
	return r, out.String()
}

func TestHookText(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	r, out := y.deployHook("printf '%s\\n' \"a \\\"b\\\"\" 'c \"d\" $HOME' \\$x\n# a comment\n[ -t 0 ] || echo no terminal", 0)
	if r.State != StateActive || out != "a \"b\"\nc \"d\" $HOME\n$x\nno terminal\n" {
		t.Errorf("%+v: %s", r, out)
	}
}

func TestHookFails(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	r, out := y.deployHook("echo one; echo two >&2; false; echo three", 0)
	if r.State != StateRestored || r.Phase != PhasePreRelease || r.Release != "a" || r.Output != "one\ntwo\n" || out != r.Output || !strings.Contains(r.Error, "exit status 1") {
		t.Errorf("%+v: %q", r, out)
	}
	if got := y.states(); got != "a good current, b failed" {
		t.Error(got)
	}
	y.config.Hooks = Hooks{}
	y.good("c", second)
	if got := y.states(); got != "a good, c good current" {
		t.Error(got)
	}
	y.config.Hooks.PostRelease = "exit 9"
	if r := y.deploy("d", first); r.State != StateRestored || r.Phase != PhasePostRelease || y.current() != "c" {
		t.Errorf("%+v", r)
	}
}

// The first release has none to go back to.
func TestFirstFails(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.config.Hooks.PostRelease = "false"
	if r := y.deploy("a", first); r.State != StateRestored || r.Release != "" || y.current() != "" {
		t.Errorf("%+v", r)
	}
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

// pidIn is what a script has written.
func pidIn(t *testing.T, file string) int {
	t.Helper()
	text, err := os.ReadFile(file)
	pid, err2 := strconv.Atoi(strings.TrimSpace(string(text)))
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	return pid
}

// A hook that takes too long is ended with all of its group, the deaf, too.
func TestHookHangs(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	pid := filepath.Join(t.TempDir(), "pid")
	r, _ := y.deployHook("(trap '' TERM; while :; do sleep 1000; done) & echo $! >"+pid+"; wait", 4*time.Second)
	if r.State != StateRestored || !strings.Contains(r.Error, "too long: 4s") {
		t.Errorf("%+v", r)
	}
	awaitEnd(t, pid)
}

func TestHookPrintsMuch(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	r, out := y.deployHook("yes 'a line of some length' | head -c 1000000; echo; head -c 10000 /dev/zero | tr '\\0' x; echo; echo the end; false", 0)
	if r.State != StateRestored || len(r.Output) > tailLimit || !strings.HasSuffix(r.Output, "x\nthe end\n") {
		t.Errorf("%s, %d bytes: ...%s", r.State, len(r.Output), r.Output[max(0, len(r.Output)-100):])
	}
	dropped := 0
	for _, e := range y.events {
		dropped += e.Dropped
		if len(e.Text) > lineLimit {
			t.Errorf("a line of %d bytes", len(e.Text))
		}
	}
	t.Logf("%d bytes came, %d lines were dropped", len(out), dropped)
}

// What a hook leaves in the background keeps nobody waiting, and goes on.
func TestHookLeavesDaemon(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	pid := filepath.Join(t.TempDir(), "pid")
	r, out := y.deployHook("sleep 1000 & echo $! >"+pid+"; echo started", 0)
	if r.State != StateActive || !strings.HasPrefix(out, "started\n") || !strings.Contains(out, "background") {
		t.Errorf("%+v: %s", r, out)
	}
	n := pidIn(t, pid)
	if !alive(n) {
		t.Error("it was ended")
	}
	_ = syscall.Kill(n, syscall.SIGKILL)
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s has not come", what)
		}
	}
}

// awaitEnd waits until a process that a script has named is gone.
func awaitEnd(t *testing.T, file string) {
	t.Helper()
	await(t, "the end of "+filepath.Base(file), func() bool { return !alive(pidIn(t, file)) })
}

// guardOf is the process that guards what apply runs, 0 if there is none.
func guardOf(t *testing.T, apply int) int {
	t.Helper()
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", apply))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range children {
		text, _ := os.ReadFile(file)
		for _, pid := range strings.Fields(string(text)) {
			if line, _ := os.ReadFile("/proc/" + pid + "/cmdline"); bytes.Contains(line, []byte("\x00culvert-guard\x00")) {
				n, _ := strconv.Atoi(pid)
				return n
			}
		}
	}
	return 0
}

// The whole of a hook goes with an apply that is killed, and nobody has the lock before. What an
// earlier hook has left, which ended well, is no part of it.
func TestHookOfKilled(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	y.good("a", first)
	p := y.process(0)
	y.config.Drain = &Action{Kind: "cmd", Arg: "sleep 1000 >/dev/null 2>&1 & echo $! >" + file("daemon")}
	y.config.Hooks.PreRelease = "(trap '' TERM HUP; sleep 1000; :) & echo $! >" + file("deaf") + "; sh -c 'echo $$ >" + file("grandchild") + "; sleep 1; echo started; sleep 1000; :'" // the guard has heard of it in that second
	y.greet(p.Client)
	if _, err := p.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	y.ship(p.Client, "b", second)
	guard := 0
	_, err := p.Activate(limit(t), func(e Event) {
		if e.Kind == "output" && e.Text == "started" {
			if guard = guardOf(t, p.cmd.Process.Pid); guard == 0 {
				t.Error("there is no guard")
			} else if err := syscall.Kill(guard, syscall.SIGSTOP); err != nil {
				t.Error(err)
			}
			_ = p.cmd.Process.Kill()
		}
	})
	if err == nil {
		t.Error("an answer")
	}
	_ = p.wait()
	daemon := pidIn(t, file("daemon"))
	defer func() { _ = syscall.Kill(daemon, syscall.SIGKILL) }()

	y.config.Drain, y.config.Hooks = nil, Hooks{}
	c, _ := y.wire()
	y.greet(c)
	var held *Error
	if _, err := c.Lock(limit(t), Lock{}, nil); !errors.As(err, &held) || held.Code != Held || !alive(pidIn(t, file("grandchild"))) {
		t.Errorf("the lock of a hook that is still there: %v", err)
	}
	c.Close()
	if guard != 0 {
		_ = syscall.Kill(guard, syscall.SIGCONT)
	}
	awaitEnd(t, file("deaf"))
	awaitEnd(t, file("grandchild"))
	await(t, "the guard's end", func() bool { return guard == 0 || !alive(guard) })
	c, _ = y.wire()
	if h := y.greet(c); h.Interrupted != "b" || h.Current != "a" {
		t.Errorf("%+v", h)
	}
	locked, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil)
	if err != nil || !strings.Contains(locked.Repaired, "a is current again") || locked.Current != "a" {
		t.Errorf("%+v, %v", locked, err)
	}
	c.Close()
	if !alive(daemon) {
		t.Error("what a hook has left that ended well is gone, too")
	}
	if got := y.states(); got != "a good current, b failed" {
		t.Error(got)
	}
}

// The same for a command of exec, which has no lock.
func TestExecOfKilled(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	pid := filepath.Join(t.TempDir(), "pid")
	p := y.process(0)
	y.greet(p.Client)
	_, err := p.Exec(limit(t), []string{"sh", "-c", "sleep 1000 & echo $! >" + pid + "; sleep 1; echo started; wait"}, func(Event) { _ = p.cmd.Process.Kill() })
	if err == nil {
		t.Error("an answer")
	}
	_ = p.wait()
	awaitEnd(t, pid)
}

// Revert after activate, as where another host has failed.
func TestRevert(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	y.good("b", second)
	c, _ := y.locked()
	y.ship(c, "c", tree{"version": "three"})
	y.activate(c)
	r, err := c.Revert(limit(t), nil)
	if err != nil || r.State != StateRestored || r.Release != "b" || y.current() != "b" {
		t.Errorf("%+v, %v", r, err)
	}
	c.Close()
	if got := y.states(); got != "a good, b good current, c failed" {
		t.Error(got)
	}
	y.tidy()
}

func TestRollback(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.config.Keep = 5
	for i, id := range []string{"z", "y", "x"} { // names say nothing
		y.good(id, tree{"version": fmt.Sprint(i)})
	}
	y.config.Hooks.PostRelease = "false"
	y.deploy("w", tree{"version": "bad"})
	y.config.Hooks = Hooks{}
	choice, r := y.rollback("")
	if choice.Release.ID != "y" || choice.Current != "x" || r.State != StateActive || y.current() != "y" {
		t.Errorf("%+v, %+v", choice, r)
	}
	if choice, r := y.rollback(""); choice.Release.ID != "z" || y.current() != "z" {
		t.Errorf("%+v, %+v", choice, r)
	}
	c, _ := y.locked()
	if _, err := c.Rollback(limit(t), ""); code(err) != None {
		t.Error(err)
	}
	if _, err := c.Rollback(limit(t), "nothing"); code(err) != None {
		t.Error(err)
	}
	c.Close()
	if choice, _ := y.rollback("x"); choice.Release.ID != "x" || y.current() != "x" {
		t.Errorf("%+v", choice)
	}
	if got := y.states(); !strings.Contains(got, "z good, x good current") {
		t.Error(got)
	}
}

// Where current has led before culvert came is what is put back.
func TestAdopted(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	old := t.TempDir()
	if err := os.MkdirAll(filepath.Join(y.to, "releases/20200720-201541"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(old, filepath.Join(y.to, "current")); err != nil {
		t.Fatal(err)
	}
	y.config.Hooks.PostRelease = "false"
	if r := y.deploy("a", first); r.State != StateRestored {
		t.Errorf("%+v", r)
	}
	if to, _ := os.Readlink(filepath.Join(y.to, "current")); to != old {
		t.Errorf("current leads to %s", to)
	}
	y.config.Hooks = Hooks{}
	y.config.Keep = 1
	y.good("b", first)
	y.good("c", second)
	if got := y.states(); got != "20200720-201541 unknown, b good, c good current" {
		t.Error(got)
	}
}

func TestCurrentIsAFolder(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	if err := os.MkdirAll(filepath.Join(y.to, "current"), 0o755); err != nil {
		t.Fatal(err)
	}
	c, _ := y.locked()
	y.ship(c, "a", first)
	if _, err := c.Activate(limit(t), nil); err == nil {
		t.Error("it was replaced")
	}
	c.Close()
	c, _ = y.wire()
	h := y.greet(c)
	if len(h.Problems) != 1 || !strings.Contains(h.Problems[0].Text, "not a link") {
		t.Fatalf("%+v", h.Problems)
	}
	if out, err := exec.Command("sh", "-ec", h.Problems[0].Hint).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c, _ = y.locked()
	y.ship(c, "a", first)
	if r := y.activate(c); r.State != StateActive || r.Previous != "before" {
		t.Errorf("%+v", r)
	}
}

func TestPreflight(t *testing.T) { // by itself: toolOf is everybody's
	y := newYard(t)
	ask := func(change func(*Hello)) (*Host, error) {
		c, _ := y.wire()
		defer c.Close()
		h := y.hello()
		change(&h)
		return c.Hello(limit(t), h)
	}
	for name, c := range map[string]struct {
		change func(*Hello)
		want   string
	}{
		"well":      {func(*Hello) {}, ""},
		"no parent": {func(h *Hello) { h.To = "/nowhere/at/all" }, "/nowhere/at is not there"},
		"shared":    {func(h *Hello) { h.Config.Shared = []string{".env"} }, "shared/.env is not there"},
		"tool": {func(h *Hello) {
			toolOf["pm2"] = "there-is-no-pm2"
			h.Config.Restart = &Action{Kind: "pm2", Arg: "shop"}
		}, "there is no there-is-no-pm2"},
	} {
		h, err := ask(c.change)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if n := len(h.Problems); c.want == "" && n > 0 || c.want != "" && (n != 1 || !strings.Contains(h.Problems[0].Text, c.want)) {
			t.Errorf("%s: %+v", name, h.Problems)
		}
		if h.Host == "" || h.Time.IsZero() || h.Free <= 0 {
			t.Errorf("%+v", h)
		}
	}
	toolOf["pm2"] = "pm2"
	for name, change := range map[string]func(*Hello){
		"app": func(h *Hello) { h.App = "../x" }, "to": func(h *Hello) { h.To = "x" }, "root": func(h *Hello) { h.To = "/" }, "up": func(h *Hello) { h.To = "/a/../b" },
		"none": func(h *Hello) { h.To = "" }, "who": func(h *Hello) { h.Who = "a\nb" }, "config": func(h *Hello) { h.Config.Keep = -1 },
	} {
		if _, err := ask(change); code(err) != Misused {
			t.Errorf("%s: %v", name, err)
		}
	}
	c, _ := y.wire()
	if _, err := asked[Host](limit(t), c, "hello", Hello{Version: Version + 1, App: "shop", To: y.to}, nil); code(err) != Mismatch || !strings.Contains(err.Error(), "version") {
		t.Error(err)
	}
	// a missing file of shared/ is not made up
	y.config.Shared = []string{".env"}
	c, _ = y.locked()
	if _, err := ship(limit(t), c, "a", first); code(err) != Failed || !strings.Contains(err.Error(), ".env") {
		t.Error(err)
	}
}

// A folder that a later culvert has laid out is told of, and not touched; also if that comes to
// pass while the lock is waited for.
func TestLaterCulvert(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	c, _ := y.wire()
	if h := y.greet(c); len(h.Problems) > 0 {
		t.Errorf("%+v", h.Problems)
	}
	if err := os.WriteFile(filepath.Join(y.to, versionFile), []byte("2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const want = `was laid out by a later culvert (version "2")`
	if _, err := c.Lock(limit(t), Lock{}, nil); code(err) != Failed || !strings.Contains(err.Error(), want) {
		t.Error(err)
	}
	c, _ = y.wire()
	if h := y.greet(c); len(h.Problems) != 1 || !strings.Contains(h.Problems[0].Text, want) {
		t.Errorf("%+v", h.Problems)
	}
	if _, err := c.Lock(limit(t), Lock{}, nil); code(err) != Refused || !strings.Contains(err.Error(), want) {
		t.Error(err)
	}
}

// What the tree has in the place of something shared is left out.
func TestShared(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.config.Shared = []string{"uploads", "var/log/", ".env"}
	if err := os.MkdirAll(filepath.Join(y.to, "shared"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(y.to, "shared/.env"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	y.good("a", tree{"version": "one", "uploads/.gitkeep": "x", ".env": "example", "var/other": "y"})
	for name, want := range map[string]string{".env": "secret", "var/other": "y", "version": "one"} {
		if got := y.read("current/" + name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
	if err := os.WriteFile(filepath.Join(y.to, "current/var/log/x"), nil, 0o644); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(y.to, "shared/var/log/x")); err != nil {
		t.Error(err)
	}
	c, _ := y.locked()
	if _, err := ship(limit(t), c, "b", tree{"l:var": "elsewhere"}); code(err) != Manifest {
		t.Error(err)
	}
}

// A hostile tree is refused over the wire, before anything is written.
func TestHostileTrees(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	c, _ := y.locked()
	for _, tr := range [][]Entry{
		{file("../../x")}, {file("/x")}, {link("a", "/etc"), file("a/x")}, {link("a", "../../..")}, {file("a"), file("a")},
		{{Path: "a", Type: TypeFile, Mode: 0o6755, Size: 1, SHA256: Hash{1}}}, {{Path: "a", Type: "char"}},
	} {
		if _, err := c.Offer(limit(t), Offer{ID: "a", Entries: tr}); code(err) != Manifest {
			t.Errorf("%+v: %v", tr, err)
		}
	}
	y.tidy()
	// what is in the way of it does not lead out, either
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(y.to, "releases", incoming+"b")); err != nil {
		t.Fatal(err)
	}
	if _, err := ship(limit(t), c, "b", first); err != nil {
		t.Log(err)
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("%v were written outside", left)
	}
}

// The deployer's end is not the only one that speaks: any bytes at all leave Serve where it was.
func FuzzServe(f *testing.F) {
	var wire bytes.Buffer
	w := newFrameWriter(&wire)
	say := func(ask string, with any) {
		text, _ := json.Marshal(with)
		_ = w.message(message{Ask: ask, With: text})
	}
	entries, _ := first.entries()
	say("hello", Hello{Version: Version, App: "shop", Config: Config{Shared: []string{"uploads"}}})
	say("lock", Lock{})
	say("offer", Offer{ID: "a", Entries: entries})
	say("ship", nil)
	_ = w.frame(kindData, []byte("(\xb5/\xfd"))
	_ = w.frame(kindData, nil)
	say("activate", nil)
	say("finish", nil)
	f.Add(wire.Bytes())
	f.Add(wire.Bytes()[:wire.Len()/2])
	f.Add([]byte("GET / HTTP/1.0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		base := t.TempDir()
		here, there := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			// nothing may be run
			_ = Serve(context.Background(), there, Options{Policy: &Policy{App: "shop", To: filepath.Join(base, "shop"), Shared: []string{everything}}})
		}()
		go func() { _, _ = io.Copy(io.Discard, here) }()
		_, _ = here.Write(text)
		here.Close()
		<-done
		if left, _ := os.ReadDir(base); len(left) > 1 {
			t.Errorf("%v", left)
		}
	})
}

func TestPolicyOverTheWire(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.opts.Policy = &Policy{App: "shop", To: y.to, Shared: []string{everything}, Hooks: []string{"echo hook"}, Exec: []string{"cat version"}}
	y.opts.Who = "the key's owner"
	hello := func(change func(*Hello)) (*Host, *Client, error) {
		c, _ := y.wire()
		h := y.hello()
		change(&h)
		host, err := c.Hello(limit(t), h)
		return host, c, err
	}
	if _, _, err := hello(func(h *Hello) { h.To = "/etc" }); code(err) != Refused || !strings.Contains(err.Error(), y.to) {
		t.Error(err)
	}
	if _, _, err := hello(func(h *Hello) { h.App = "other" }); code(err) != Refused {
		t.Error(err)
	}
	host, c, err := hello(func(h *Hello) { h.To = ""; h.Config.Restart = &Action{Kind: "cmd", Arg: "id"} })
	if err != nil || len(host.Problems) != 1 || host.Problems[0].Code != Refused || host.To != y.to {
		t.Errorf("%+v, %v", host, err)
	}
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); code(err) != Refused {
		t.Error(err)
	}
	if _, err := c.Exec(limit(t), []string{"id"}, nil); code(err) != Refused {
		t.Error(err)
	}
	y.config.Hooks.PreRelease = "echo hook"
	y.good("a", first)
	c, _ = y.wire()
	y.greet(c)
	if status, err := c.Exec(limit(t), []string{"cat", "version"}, nil); status != 0 || err != nil {
		t.Error(status, err)
	}
	if log := y.log(); log[0].Who != "the key's owner" {
		t.Errorf("%+v", log[0])
	}
	y.opts.App = "other"
	if _, _, err := hello(func(*Hello) {}); code(err) != Refused {
		t.Error(err)
	}
}

// Root deploys for another user: the release is his, hooks run as him, and the rest is not.
func TestPolicyUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can become another")
	}
	y := newYard(t)
	for dir := filepath.Dir(y.to); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	y.opts.Policy = &Policy{App: "shop", To: y.to, User: "nobody", Shared: []string{everything}, Hooks: []string{everything}, Exec: []string{everything}}
	y.config.Hooks.PreRelease = "id -un; echo $USER $HOME; touch made; touch uploads/made; ! touch ../../current-not ../../.culvert/x 2>/dev/null"
	c, _ := y.locked()
	y.ship(c, "a", first)
	if r := y.activate(c); r.State != StateActive {
		t.Fatalf("%+v", r)
	}
	y.finish(c)
	var out []string
	for _, e := range y.events {
		if e.Kind == "output" {
			out = append(out, e.Text)
		}
	}
	if got := strings.Join(out, " "); !strings.HasPrefix(got, "nobody nobody /") {
		t.Error(got)
	}
	nobody, err := lookUp("nobody")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]uint32{
		".": 0, "releases": 0, ".culvert/lock": 0, ".culvert": 0, ".culvert/log.jsonl": 0, "current": 0, "shared": nobody.uid, "shared/uploads": nobody.uid, "releases/a": nobody.uid,
		"releases/a/lib": nobody.uid, "releases/a/lib/same": nobody.uid, "releases/a/lib/link": nobody.uid, "releases/a/uploads": nobody.uid,
	} {
		info, err := os.Lstat(filepath.Join(y.to, name))
		if err != nil {
			t.Error(err)
		} else if got := info.Sys().(*syscall.Stat_t).Uid; got != want {
			t.Errorf("%s belongs to %d, not %d", name, got, want)
		}
	}
	if info, err := os.Lstat(filepath.Join(y.to, ".culvert")); err != nil || info.Mode().Perm() != 0o700 {
		t.Error(info.Mode(), err)
	}
	c.Close()
	c, _ = y.locked()
	if sent := y.ship(c, "b", second); sent != len("two")+len("new") {
		t.Errorf("%d bytes were sent", sent)
	}
	y.opts.Policy.User = "there-is-no-such-user"
	c, _ = y.wire()
	if h := y.greet(c); len(h.Problems) == 0 {
		t.Error("nothing is wrong")
	}
	if _, err := c.Exec(limit(t), []string{"id"}, nil); err == nil {
		t.Error("it ran as root")
	}
}

// An instance is what a test deploys to see which one answers: this binary, as a server.
const instanceVariable = "CULVERT_RELEASE_INSTANCE"

func instance() error {
	for { // the one before may not be gone altogether
		l, err := net.Listen("tcp", os.Getenv(instanceVariable))
		if errors.Is(err, syscall.EADDRINUSE) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return err
		}
		return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Release", os.Getenv("CULVERT_RELEASE"))
		}))
	}
}

// port is one that nobody listens on.
func port(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// server starts an instance of a, and leaves a restart that first does what is in a file, if
// there is one.
func (y *yard) server(health func(address string) *Health) (instead string) {
	y.t.Helper()
	address, dir := port(y.t), y.t.TempDir()
	pid, instead := filepath.Join(dir, "pid"), filepath.Join(dir, "instead")
	y.t.Cleanup(func() { _ = syscall.Kill(pidIn(y.t, pid), syscall.SIGKILL) })
	y.config.Restart = &Action{Kind: "cmd", Arg: fmt.Sprintf(`
		if [ -e %[2]s ]; then . %[2]s; fi
		if [ -e %[1]s ]; then kill -9 $(cat %[1]s) || :; fi
		%[3]s=%[4]s setsid %[5]s >/dev/null 2>&1 & echo $! >%[1]s`, pid, instead, instanceVariable, address, os.Args[0])}
	y.config.Health = health(address)
	y.good("a", first)
	return instead
}

// refused runs what the gate does not let pass. When it says why, the restart is made well, and
// apply is told to end, so that all is put back.
func (y *yard) refused(instead, script, why string, do func(*Client, func(Event)) (Result, error)) {
	y.t.Helper()
	if err := os.WriteFile(instead, []byte(script), 0o644); err != nil {
		y.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, there, y.opts) }()
	c := NewClient(here)
	defer func() {
		c.Close()
		<-done
	}()
	before := y.current()
	y.greet(c)
	if _, err := c.Lock(limit(y.t), Lock{Wait: time.Minute}, nil); err != nil {
		y.t.Fatal(err)
	}
	said := false
	r, err := do(c, func(e Event) {
		if e.Kind == "note" && e.Phase == PhaseHealth && strings.Contains(e.Text, why) && !said {
			said = true
			_ = os.Remove(instead)
			cancel()
		}
	})
	if err != nil || !said || r.State != StateRestored || y.current() != before {
		y.t.Errorf("%s: %+v, %v", why, r, err)
	}
}

func (y *yard) deploying(id string, tr tree) func(*Client, func(Event)) (Result, error) {
	return func(c *Client, events func(Event)) (Result, error) {
		y.ship(c, id, tr)
		return c.Activate(limit(y.t), events)
	}
}

// The gate sees which release answers: by the folder of who listens.
func TestInstanceByListener(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	instead := y.server(func(address string) *Health { return &Health{Kind: "tcp", Arg: address, Every: 100 * time.Millisecond} })
	y.good("b", second)
	// it is not restarted: the old one is healthy
	y.refused(instead, "exit 0", "is of release b", y.deploying("c", first))
	// it is restarted, but where it was, as pm2 does
	y.refused(instead, "cd "+filepath.Join(y.to, "releases/b"), "is of release b", y.deploying("d", second))
	// a restart is one only if there is another process
	y.refused(instead, "exit 0", "was there before", func(c *Client, events func(Event)) (Result, error) { return c.Restart(limit(t), events) })
	// from somewhere else it is new when it began after the switch
	if err := os.WriteFile(instead, []byte("cd /"), 0o644); err != nil {
		t.Fatal(err)
	}
	y.good("e", second)
	y.refused(instead, "exit 0", "was there before", y.deploying("f", first))
}

// The gate sees which release answers: it says so itself.
func TestInstanceByHeader(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	instead := y.server(func(address string) *Health {
		return &Health{Kind: "http", Arg: "http://" + address + "/", Release: "header X-Release", Every: 100 * time.Millisecond}
	})
	y.good("b", second)
	y.refused(instead, "CULVERT_RELEASE=b", `X-Release is "b", not of release c`, y.deploying("c", first))
	y.config.Health.Status = 204
	y.config.Health.Within = time.Second
	if r := y.deploy("d", first); r.State != StateRestored || r.Phase != PhaseHealth || y.current() != "b" { // which passed another
		t.Errorf("%+v", r)
	}
}

// What is put back comes up by today's settings, or by those that it was good by: a wrong word in the
// file breaks nothing.
func TestComesBack(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	log := filepath.Join(t.TempDir(), "log")
	restart := func(name, after string) *Action {
		return &Action{Kind: "cmd", Arg: fmt.Sprintf("echo %s $CULVERT_RELEASE >>%s; %s", name, log, after)}
	}
	health := func(script string) *Health {
		return &Health{Kind: "cmd", Arg: script, Within: time.Second, Every: 100 * time.Millisecond}
	}
	deploys := func(id, state, last string, r *Action, h *Health) {
		t.Helper()
		y.config.Restart, y.config.Health = r, h
		if r := y.deploy(id, tree{id: ""}); r.State != state || y.current() != "a" {
			t.Errorf("%s: %+v", id, r)
		}
		if text, _ := os.ReadFile(log); !strings.HasSuffix(string(text), last+"\n") {
			t.Errorf("%s: %s", id, text)
		}
	}
	y.config.Health = health("test ! -e " + log + ".broken")
	y.good("a", tree{"a": ""})
	deploys("b", StateRestored, "now a", restart("now", ""), health("test ! -e b")) // nothing was restarted then, and b may run
	deploys("c", StateRestored, "now a", restart("now", ""), health("no-such-program"))
	y.config.Restart, y.config.Health = restart("then", ""), health("test ! -e "+log+".broken")
	c, _ := y.locked()
	if r, err := c.Restart(limit(t), nil); err != nil || r.State != StateActive {
		t.Fatalf("%+v, %v", r, err)
	}
	c.Close()
	deploys("d", StateRestored, "then a", restart("now", "exit 1"), health("true"))
	y.must(os.WriteFile(log+".broken", nil, 0o644))
	deploys("e", StateBroken, "then a", restart("now", "exit 1"), health("true"))
}

func TestVerdict(t *testing.T) {
	dirs := []string{"/mnt/shop/releases", "/data/shop/releases"}
	for _, c := range []struct {
		name             string
		paths            []string
		since, restarted bool
		want             string // in the error
	}{
		{"folder", []string{"/data/shop/releases/b", "/usr/bin/node"}, false, false, ""},
		{"real folder", []string{"/mnt/shop/releases/b/sub"}, false, false, ""},
		{"script", []string{"/", "/usr/bin/node", "/data/shop/releases/b/server.js"}, false, false, ""},
		{"old folder", []string{"/data/shop/releases/a"}, true, false, "of release a"},
		{"new folder, old script", []string{"/data/shop/releases/b", "/data/shop/releases/a/server.js"}, true, false, "of release a"},
		{"deleted", []string{"/data/shop/releases/a (deleted)"}, true, false, "of release a"},
		{"longer name", []string{"/data/shop/releases/bb"}, true, false, "of release bb"},
		{"elsewhere, new", []string{"/", "/usr/sbin/nginx"}, true, false, ""},
		{"elsewhere, old", []string{"/", "/usr/sbin/nginx"}, false, false, "before"},
		{"through current, old", []string{"/", "/data/shop/current/server.js"}, false, false, "before"},
		{"not restarted", []string{"/data/shop/releases/b"}, false, true, "before"},
		{"restarted", []string{"/data/shop/releases/b"}, true, true, ""},
	} {
		err := verdict(7, c.paths, dirs, "b", c.since, c.restarted)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestSupervisorsSay(t *testing.T) {
	all, err := supervisorPIDs("shop:shop_00   RUNNING   pid 12, uptime 0:00:03\nshop:shop_01   RUNNING   pid 13, uptime 1 day, 0:00:03\n")
	if err != nil || len(all) != 2 || all[0].pid != 12 || all[1].pid != 13 {
		t.Error(all, err)
	}
	for _, out := range []string{"shop   STARTING\n", "shop: ERROR (no such process)\n", "", "a RUNNING pid 1, uptime 0:00:01\nb FATAL Exited too quickly\n"} {
		if all, err := supervisorPIDs(out); err == nil || errors.Is(err, errGivenUp) != strings.Contains(out, "FATAL") {
			t.Errorf("%q: %v, %v", out, all, err)
		}
	}
	all, err = systemdPIDs("MainPID=12\nResult=success\nActiveState=active\n\nMainPID=13\nResult=success\nActiveState=active\n")
	if err != nil || len(all) != 2 || all[0].pid != 12 || all[1].pid != 13 {
		t.Error(all, err)
	}
	for state, over := range map[string]bool{"failed": true, "activating": false} {
		all, err := systemdPIDs("MainPID=0\nResult=exit-code\nActiveState=" + state + "\n\nMainPID=12\nResult=success\nActiveState=active\n")
		if err == nil || errors.Is(err, errGivenUp) != over || !strings.Contains(err.Error(), state+" (exit-code)") {
			t.Errorf("%s: %v, %v", state, all, err)
		}
	}
	list := "In-memory PM2 is out-of-date, do:\n>>>> $ pm2 update\n" + `[{"pid":7,"name":"shop","pm2_env":{"status":"online","pm_exec_path":"/a/server.js"}},{"pid":8,"name":"other","pm2_env":{"status":"errored"}}]` + "\nand more\n"
	all, err = pm2PIDs(list, "shop")
	if err != nil || len(all) != 1 || all[0].pid != 7 || all[0].paths[0] != "/a/server.js" {
		t.Error(all, err)
	}
	for _, name := range []string{"other", "stranger"} {
		if _, err := pm2PIDs(list, name); !errors.Is(err, errGivenUp) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := pm2PIDs("nonsense", "shop"); err == nil {
		t.Error("it is nonsense")
	}
}
