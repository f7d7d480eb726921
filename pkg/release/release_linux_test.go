package release

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary is apply, too, and dies before the change that it is told.
const (
	applyVariable = "CULVERT_RELEASE_TEST"
	dieVariable   = "CULVERT_RELEASE_DIE"
	oldVariable   = "CULVERT_RELEASE_OLD" // its file system has no RENAME_NOREPLACE
)

func TestMain(m *testing.M) {
	if os.Getenv(applyVariable) == "apply" {
		if err := apply(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(instanceVariable) != "" {
		fmt.Fprintln(os.Stderr, instance())
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

type stdio struct {
	io.Reader
	io.WriteCloser
}

func (s stdio) Close() error { return errors.Join(os.Stdin.Close(), s.WriteCloser.Close()) }

func apply() error {
	if os.Getenv(oldVariable) != "" {
		if err := withoutNoReplace(); err != nil {
			return err
		}
	}
	var changes atomic.Int64
	die, _ := strconv.ParseInt(os.Getenv(dieVariable), 10, 64)
	opts := Options{before: func(string) {
		if changes.Add(1) == die {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}}
	return Serve(context.Background(), stdio{os.Stdin, os.Stdout}, opts)
}

// withoutNoReplace has renames with flags fail as they do on a file system that has none.
func withoutNoReplace() error {
	const nr, flags = 0, 16 + 3*8 // in struct seccomp_data; of flags the low half, of little-endian machines
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_RENAMEAT2, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: flags},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return errno
	}
	return nil
}

// A tree is what a test deploys: contents by path. "x:" before a path is an executable, "l:" a link.
type tree map[string]string

func (tr tree) entries() (entries []Entry, contents map[Hash]string) {
	contents = map[Hash]string{}
	for p, text := range tr {
		e := Entry{Path: p, Type: TypeFile, Mode: 0o644, Size: int64(len(text))}
		if rest, ok := strings.CutPrefix(p, "x:"); ok {
			e.Path, e.Mode = rest, 0o755
		}
		if rest, ok := strings.CutPrefix(p, "l:"); ok {
			e = Entry{Path: rest, Type: TypeLink, Target: text}
		} else if text != "" {
			e.SHA256 = sha256.Sum256([]byte(text))
			contents[e.SHA256] = text
		}
		if len(text) > 1<<20 && e.Type == TypeFile {
			for rest := text; rest != ""; {
				part := rest[:min(len(rest), 1<<19)]
				rest = rest[len(part):]
				piece := Piece{sha256.Sum256([]byte(part)), int64(len(part))}
				e.Chunks = append(e.Chunks, piece)
				contents[piece.SHA256] = part
			}
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return entries, contents
}

// A yard is a host with an app.
type yard struct {
	t      *testing.T
	to     string
	config Config
	opts   Options
	events []Event
}

func newYard(t *testing.T) *yard {
	t.Helper()
	return &yard{t: t, to: filepath.Join(t.TempDir(), "shop"), config: Config{Shared: []string{"uploads"}, Keep: 2}}
}

// limit is for what should take no time.
func limit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// wire is a deployer's end, of a host's in this process. hungUp is closed when that has ended.
func (y *yard) wire() (c *Client, hungUp <-chan struct{}) {
	y.t.Helper()
	here, there := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = Serve(context.Background(), there, y.opts)
	}()
	c = NewClient(here)
	y.t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c, done
}

func (y *yard) event(e Event) { y.events = append(y.events, e) }

func (y *yard) hello() Hello { return Hello{App: "shop", To: y.to, Who: "ci", Config: y.config} }

func (y *yard) greet(c *Client) *Host {
	y.t.Helper()
	h, err := c.Hello(limit(y.t), y.hello())
	if err != nil {
		y.t.Fatal(err)
	}
	return h
}

// locked is a wire that has the lock.
func (y *yard) locked() (*Client, Locked) {
	y.t.Helper()
	c, _ := y.wire()
	y.greet(c)
	l, err := c.Lock(limit(y.t), Lock{Wait: time.Minute}, y.event)
	if err != nil {
		y.t.Fatal(err)
	}
	return c, l
}

// ship does all before activate.
func ship(ctx context.Context, c *Client, id string, tr tree) (sent int, err error) {
	entries, contents := tr.entries()
	missing, err := c.Offer(ctx, Offer{ID: id, Commit: "c-" + id, Entries: entries})
	if err != nil {
		return 0, err
	}
	var all bytes.Buffer
	for _, p := range missing {
		all.WriteString(contents[p.SHA256])
	}
	return all.Len(), c.Ship(ctx, &all)
}

func (y *yard) ship(c *Client, id string, tr tree) (sent int) {
	y.t.Helper()
	sent, err := ship(limit(y.t), c, id, tr)
	if err != nil {
		y.t.Fatal(err)
	}
	return sent
}

func (y *yard) activate(c *Client) Result {
	y.t.Helper()
	r, err := c.Activate(limit(y.t), y.event)
	if err != nil {
		y.t.Fatal(err)
	}
	return r
}

func (y *yard) finish(c *Client) Finished {
	y.t.Helper()
	f, err := c.Finish(limit(y.t))
	if err != nil {
		y.t.Fatal(err)
	}
	return f
}

// deploy is a whole one.
func (y *yard) deploy(id string, tr tree) Result {
	y.t.Helper()
	c, _ := y.locked()
	defer c.Close()
	y.ship(c, id, tr)
	r := y.activate(c)
	if r.State == StateActive {
		y.finish(c)
	}
	return r
}

func (y *yard) good(id string, tr tree) {
	y.t.Helper()
	if r := y.deploy(id, tr); r.State != StateActive {
		y.t.Fatalf("%s: %+v", id, r)
	}
}

func (y *yard) rollback(to string) (Choice, Result) {
	y.t.Helper()
	c, _ := y.locked()
	defer c.Close()
	choice, err := c.Rollback(limit(y.t), to)
	if err != nil {
		y.t.Fatal(err)
	}
	r := y.activate(c)
	if r.State == StateActive {
		y.finish(c)
	}
	return choice, r
}

func (y *yard) current() string {
	to, err := os.Readlink(filepath.Join(y.to, "current"))
	if err != nil {
		return ""
	}
	return path.Base(to)
}

// states are "id state" of what is there, the oldest first.
func (y *yard) states() string {
	y.t.Helper()
	c, _ := y.wire()
	defer c.Close()
	y.greet(c)
	all, err := c.List(limit(y.t))
	if err != nil {
		y.t.Fatal(err)
	}
	var s []string
	for _, r := range slices.Backward(all) {
		text := r.ID + " " + r.State
		if r.Current {
			text += " current"
		}
		s = append(s, text)
	}
	return strings.Join(s, ", ")
}

func (y *yard) log() []record {
	text, err := os.ReadFile(filepath.Join(y.to, logFile))
	if err != nil {
		y.t.Fatal(err)
	}
	return parseLog(text)
}

// check compares a folder with a tree, byte by byte.
func (y *yard) check(dir string, tr tree) {
	y.t.Helper()
	found := map[string]bool{}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		y.t.Fatal(err)
	}
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			y.t.Error(err)
		} else if rel, _ := filepath.Rel(dir, p); !d.IsDir() && rel != "uploads" {
			found[rel] = true
		}
		return nil
	})
	entries, _ := tr.entries()
	for _, e := range entries {
		at := filepath.Join(dir, e.Path)
		delete(found, e.Path)
		if e.Type == TypeLink {
			if to, err := os.Readlink(at); err != nil || to != e.Target {
				y.t.Errorf("%s: %q, %v", e.Path, to, err)
			}
			continue
		}
		text, err := os.ReadFile(at)
		info, err2 := os.Lstat(at)
		if err := errors.Join(err, err2); err != nil {
			y.t.Error(err)
		} else if int64(len(text)) != e.Size || e.Size > 0 && sha256.Sum256(text) != e.SHA256 || uint32(info.Mode().Perm()) != e.Mode {
			y.t.Errorf("%s: %d bytes, %v", e.Path, len(text), info.Mode())
		}
	}
	for p := range found {
		y.t.Errorf("%s is left over", p)
	}
}

// tidy: nothing of a deploy is left but releases.
func (y *yard) tidy() {
	y.t.Helper()
	for _, pattern := range []string{"releases/.*", ".culvert/*.next", ".culvert/run.json", ".culvert/next", ".culvert/manifests/*.next"} {
		if left, _ := filepath.Glob(filepath.Join(y.to, pattern)); len(left) > 0 {
			y.t.Errorf("left: %v", left)
		}
	}
}

func code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return fmt.Sprint("not the host's: ", err)
}

func (y *yard) read(name string) string {
	text, err := os.ReadFile(filepath.Join(y.to, name))
	if err != nil {
		y.t.Error(err)
	}
	return string(text)
}

var (
	first  = tree{"version": "one", "x:bin/start": "#!/bin/sh\n", "lib/same": "the same", "empty": "", "l:lib/link": "../bin/start"}
	second = tree{"version": "two", "x:bin/start": "#!/bin/sh\n", "lib/same": "the same", "lib/new": "new", "x:same-but-executable": "the same"}
)

func TestDeploy(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	log := filepath.Join(t.TempDir(), "log")
	say := func(what string) string {
		return "echo " + what + " $CULVERT_APP $CULVERT_RELEASE $CULVERT_PREVIOUS $(basename $(pwd)) >>" + log
	}
	y.config.Drain = &Action{Kind: "cmd", Arg: say("drain"), Undo: say("undrain")}
	y.config.Restart = &Action{Kind: "cmd", Arg: say("restart")}
	y.config.Health = &Health{Kind: "cmd", Arg: say("health") + "; cat version"}
	y.config.Hooks = Hooks{PreRelease: say("pre"), PostRelease: say("post")}
	y.good("a", first)
	y.check(filepath.Join(y.to, "current"), first)
	y.tidy()
	if to, _ := os.Readlink(filepath.Join(y.to, "current/uploads")); to != "../../shared/uploads" {
		t.Errorf("uploads leads to %q", to)
	}
	if err := os.WriteFile(filepath.Join(y.to, "current/uploads/x"), []byte("x"), 0o644); err != nil {
		t.Error(err)
	}

	c, _ := y.locked()
	y.events = nil
	if sent := y.ship(c, "b", second); sent != len("two")+len("new") {
		t.Errorf("%d bytes were sent", sent)
	}
	if r := y.activate(c); r != (Result{State: StateActive, Release: "b", Previous: "a"}) {
		t.Errorf("%+v", r)
	}
	y.finish(c)
	c.Close()
	y.check(filepath.Join(y.to, "current"), second)
	y.check(filepath.Join(y.to, "releases/a"), first)
	y.tidy()
	if y.read("current/uploads/x") != "x" {
		t.Error("what was uploaded is gone")
	}
	a, _ := os.Stat(filepath.Join(y.to, "releases/a/lib/same"))
	if b, _ := os.Stat(filepath.Join(y.to, "releases/b/lib/same")); !os.SameFile(a, b) {
		t.Error("what is the same was not linked")
	}
	if b, _ := os.Stat(filepath.Join(y.to, "releases/b/same-but-executable")); os.SameFile(a, b) {
		t.Error("a file of another mode was linked")
	}
	var phases []string
	for _, e := range y.events {
		if e.Kind == "phase" {
			phases = append(phases, e.Phase)
		}
	}
	if got := strings.Join(phases, " "); got != "drain pre_release switch restart health undrain post_release" {
		t.Error(got)
	}
	text, _ := os.ReadFile(log)
	const want = `pre shop a a
restart shop a a
health shop a a
post shop a a
drain shop b a b
pre shop b a b
restart shop b a b
health shop b a b
undrain shop b a b
post shop b a b
`
	if got := strings.ReplaceAll(string(text), "  ", " "); got != want {
		t.Errorf("%s", got)
	}
	if got := y.states(); got != "a good, b good current" {
		t.Error(got)
	}
}

// An application that has written into its own file does not spoil the next release.
func TestOwnFilesChanged(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	if err := os.WriteFile(filepath.Join(y.to, "releases/a/lib/same"), []byte("another!"), 0o644); err != nil {
		t.Fatal(err)
	}
	y.good("b", second)
	y.check(filepath.Join(y.to, "current"), second)
}

func TestLargeFile(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	whole := random(3 << 20)
	y.good("a", tree{"big": whole, "version": "one"})
	changed := []byte(whole)
	copy(changed[1<<20:], "CHANGED")
	c, _ := y.locked()
	if sent := y.ship(c, "b", tree{"big": string(changed), "version": "one"}); sent != 1<<19 {
		t.Errorf("%d bytes were sent for one chunk", sent)
	}
	y.activate(c)
	y.finish(c)
	y.check(filepath.Join(y.to, "current"), tree{"big": string(changed), "version": "one"})
	y.check(filepath.Join(y.to, "releases/a"), tree{"big": whole, "version": "one"})
}

// random is what zstd makes no shorter.
func random(n int) string {
	var b strings.Builder
	for h := sha256.Sum256([]byte("seed")); b.Len() < n; h = sha256.Sum256(h[:]) {
		b.Write(h[:])
	}
	return b.String()[:n]
}

// A manifest in many parts.
func TestManyFiles(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	many := tree{}
	for i := range 1000 {
		many[fmt.Sprintf("%s%d/%d", strings.Repeat(strings.Repeat("long", 60)+"/", 4), i%10, i)] = fmt.Sprint(i % 7)
	}
	c, _ := y.locked()
	if sent := y.ship(c, "a", many); sent != 7 {
		t.Errorf("%d bytes were sent", sent)
	}
	y.check(filepath.Join(y.to, "releases/a"), many)
}

// Plan answers what deploy would send, and leaves nothing.
func TestPlan(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	entries, _ := second.entries()
	plan := func() int {
		c, _ := y.wire()
		y.greet(c)
		missing, err := c.Offer(limit(t), Offer{Plan: true, Entries: entries})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		return len(missing)
	}
	if n := plan(); n != 4 {
		t.Errorf("%d pieces are missing", n)
	}
	if _, err := os.Stat(y.to); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a plan has made something:", err)
	}
	y.good("a", first)
	if n := plan(); n != 2 {
		t.Errorf("%d pieces are missing", n)
	}
	y.tidy()
}

func TestRestart(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	log := filepath.Join(t.TempDir(), "log")
	y.config.Restart = &Action{Kind: "cmd", Arg: "echo $CULVERT_RELEASE >>" + log}
	y.config.Hooks.PreRelease = "echo hook >>" + log
	y.good("a", first)
	c, _ := y.locked()
	r, err := c.Restart(limit(t), nil)
	if err != nil || r.State != StateActive {
		t.Errorf("%+v, %v", r, err)
	}
	if text, _ := os.ReadFile(log); string(text) != "hook\na\na\n" {
		t.Errorf("%s", text)
	}
	y.tidy()
}

func TestExec(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	c, _ := y.wire()
	y.greet(c)
	code, err := c.Exec(limit(t), []string{"sh", "-c", "cat version; echo; echo $CULVERT_RELEASE; exit 7"}, y.event)
	if code != 7 || err != nil {
		t.Errorf("%d, %v", code, err)
	}
	var out []string
	for _, e := range y.events {
		if e.Kind == "output" && e.Phase == PhaseExec {
			out = append(out, e.Text)
		}
	}
	if got := strings.Join(out, " "); got != "one a" {
		t.Error(got)
	}
	if code, _ := c.Exec(limit(t), []string{"sh", "-c", "kill -9 $$"}, nil); code != 137 {
		t.Error(code)
	}
	if _, err := c.Exec(limit(t), []string{"there-is-no-such-command"}, nil); err == nil {
		t.Error("it ran")
	}
}

// Who hangs up after activate has a good release; before it, nothing but what came.
func TestHungUp(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	c, done := y.wire()
	y.greet(c)
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	y.ship(c, "a", first)
	y.activate(c)
	c.Close()
	<-done
	if got := y.states(); got != "a good current" {
		t.Error(got)
	}
	y.tidy()

	// and in the middle of it
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	y.config.Hooks.PreRelease = "cat " + fifo
	c, done = y.wire()
	y.greet(c)
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	y.ship(c, "b", second)
	ctx, cancel := context.WithCancel(limit(t))
	_, err := c.Activate(ctx, func(e Event) {
		if e.Phase == PhasePreRelease {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	f, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	<-done
	if got := y.states(); got != "a good, b good current" {
		t.Error(got)
	}
}

// Who says nothing at all is gone, too.
func TestSilent(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.opts.silence = time.Second
	here, there := net.Pipe()
	defer here.Close()
	if err := Serve(context.Background(), there, y.opts); !errors.Is(err, errSilent) {
		t.Error(err)
	}
}

// The end of apply's own context puts the host back.
func TestCancelled(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	y.config.Hooks.PreRelease = "exec sleep 1000"
	ctx, cancel := context.WithCancel(context.Background())
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, there, y.opts) }()
	c := NewClient(here)
	defer c.Close()
	y.greet(c)
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	y.ship(c, "b", second)
	r, err := c.Activate(limit(t), func(e Event) {
		if e.Phase == PhasePreRelease {
			cancel()
		}
	})
	if err != nil || r.State != StateRestored || y.current() != "a" {
		t.Errorf("%+v, %v", r, err)
	}
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Two at once: the second is told who has the lock, or waits.
func TestTwoAtOnce(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	one, _ := y.wire()
	y.greet(one)
	if _, err := one.Lock(limit(t), Lock{Release: "a"}, nil); err != nil {
		t.Fatal(err)
	}
	two, _ := y.wire()
	hello := y.hello()
	hello.Who = "another"
	h, err := two.Hello(limit(t), hello)
	if err != nil || h.Holder == nil || h.Holder.Who != "ci" || h.Holder.Release != "a" || h.Holder.PID != os.Getpid() {
		t.Errorf("%+v, %v", h, err)
	}
	_, err = two.Lock(limit(t), Lock{}, nil)
	var e *Error
	if !errors.As(err, &e) || e.Code != Held || !strings.Contains(e.Text, "ci, release a") || e.Holder.Who != "ci" {
		t.Errorf("%+v", err)
	}
	_, err = two.Lock(limit(t), Lock{Wait: time.Minute}, func(e Event) {
		if e.Kind == "note" && strings.Contains(e.Text, "ci") {
			one.Close()
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// The lock of who was killed is gone.
func TestLockDiesWithItsHolder(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	p := y.process(0)
	y.greet(p.Client)
	if _, err := p.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	c, _ := y.wire()
	if h := y.greet(c); h.Holder == nil || h.Holder.PID != p.cmd.Process.Pid {
		t.Errorf("%+v", h.Holder)
	}
	p.kill()
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Error(err)
	}
}

// A program is an apply of its own.
type program struct {
	*Client
	cmd  *exec.Cmd
	wait func() error
}

// process starts one, which dies before its nth change of the disk; 0: not.
func (y *yard) process(die int, edit ...func(*exec.Cmd)) *program {
	y.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), applyVariable+"=apply", dieVariable+"="+strconv.Itoa(die))
	cmd.Stderr = os.Stderr
	for _, e := range edit {
		e(cmd)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		y.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		y.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		y.t.Fatal(err)
	}
	p := &program{Client: NewClient(pipes{out, in}), cmd: cmd}
	over := make(chan error, 1)
	p.wait = func() error {
		p.Close()
		err := cmd.Wait()
		over <- err
		p.wait = func() error { return err }
		return err
	}
	y.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = p.wait()
	})
	return p
}

func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.wait()
}

type pipes struct {
	io.ReadCloser
	in io.WriteCloser
}

func (p pipes) Write(b []byte) (int, error) { return p.in.Write(b) }
func (p pipes) Close() error                { return errors.Join(p.in.Close(), p.ReadCloser.Close()) }

// killed runs a deploy until apply dies, or to its end.
func (y *yard) killed(p *program, id string, tr tree) (finished bool) {
	y.t.Helper()
	return y.killedAt(p, func(ctx context.Context) error {
		entries, _ := tr.entries()
		_, err := p.LockFor(ctx, Lock{Wait: time.Minute}, Offer{ID: id, Commit: "c-" + id, Entries: entries}, nil)
		if err == nil {
			_, err = ship(ctx, p.Client, id, tr)
		}
		if err == nil {
			_, err = p.ActivateForGood(ctx, nil)
		}
		return err
	})
}

// Apply is killed before each of its changes of the disk. The release that is current is whole at any
// moment, and the same deploy made again ends well.
func TestKilledAtEachChange(t *testing.T) {
	t.Parallel()
	t.Run("here", func(t *testing.T) { killedAtEachChange(t) })
	t.Run("without RENAME_NOREPLACE", func(t *testing.T) {
		killedAtEachChange(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, oldVariable+"=1") })
	})
}

func killedAtEachChange(t *testing.T, edit ...func(*exec.Cmd)) {
	y := newYard(t)
	y.service()
	y.good("0-a", first)
	y.good("0-b", second)
	stop := y.watch()
	defer stop()
	n := 0
	for finished := false; !finished; {
		n++
		id, tr := fmt.Sprintf("1-%03d", n), tree{"version": fmt.Sprint("version ", n), "lib/same": "the same", "lib/new": "new", "l:link": "lib/new"}
		before := y.current()
		finished = y.killed(y.process(n, edit...), id, tr)
		if now := y.current(); now != before && now != id {
			t.Fatalf("change %d: %q is current, which was %q", n, now, before)
		}
		c, locked := y.locked()
		y.serves(fmt.Sprintf("change %d: %q", n, locked.Repaired))
		if !finished && y.current() != id {
			c.Close()
			if !y.killed(y.process(0, edit...), id, tr) {
				t.Fatalf("change %d: it was not made again", n)
			}
		}
		c.Close()
		if y.current() != id {
			t.Errorf("change %d: %q is current, not %q", n, y.current(), id)
		}
		y.check(filepath.Join(y.to, "current"), tr)
		for _, r := range strings.Split(y.states(), ", ") { // who was killed when all was done but the pruning has left good ones
			if !strings.Contains(r, " good") {
				t.Errorf("change %d: %s", n, r)
			}
		}
		if t.Failed() {
			break
		}
	}
	if n < 30 {
		t.Errorf("only %d changes", n)
	}
	t.Logf("killed before each of %d changes", n-1)
	y.good("2", first)
	if all := strings.Split(y.states(), ", "); len(all) != 2 {
		t.Error(all)
	}
	y.tidy()
}

// service is something that can be drained, runs a version, and does not come up with every one.
func (y *yard) service() {
	y.config.Keep = 1
	y.config.Drain = &Action{Kind: "cmd", Arg: "touch ../../shared/drained", Undo: "rm -f ../../shared/drained"}
	y.config.Restart = &Action{Kind: "cmd", Arg: "cat version >../../shared/runs; test ! -e bad"}
	y.config.Health = &Health{Kind: "cmd", Arg: "cmp version ../../shared/runs"}
}

// serves: what is current runs, and is not drained.
func (y *yard) serves(when string) {
	y.t.Helper()
	if _, err := os.Stat(filepath.Join(y.to, "shared/drained")); err == nil {
		y.t.Errorf("%s: it is drained", when)
	}
	if text, runs := y.read("current/version"), y.read("shared/runs"); text != runs {
		y.t.Errorf("%s: current is %q, and %q runs", when, text, runs)
	}
}

// The same with a release that is put back, with a rollback, and with the repair of what was killed.
func TestKilledWhileGoingBack(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.service()
	y.good("a", first)
	y.good("b", second)
	stop := y.watch()
	defer stop()
	bad := tree{"version": "bad", "bad": "yes"}
	n := 0
	for finished := false; !finished && !t.Failed(); {
		n++
		id := fmt.Sprintf("c%03d", n)
		p := y.process(n)
		finished = y.killedAt(p, func(ctx context.Context) error {
			_, err := p.Lock(ctx, Lock{Wait: time.Minute}, nil)
			if err == nil {
				_, err = ship(ctx, p.Client, id, bad)
			}
			if err == nil {
				var r Result
				if r, err = p.Activate(ctx, nil); err == nil && r.State != StateRestored {
					t.Errorf("%+v", r)
				}
			}
			return err
		})
		c, locked := y.locked()
		y.serves(fmt.Sprintf("bad release, change %d: %q", n, locked.Repaired))
		if y.current() != "b" {
			t.Errorf("change %d: %q is current", n, y.current())
		}
		c.Close()
	}
	t.Logf("killed before each of %d changes", n-1)

	// what is interrupted here is after its switch; the repair of that is killed, and again
	m := 0
	for finished := false; !finished && !t.Failed(); {
		m++
		p := y.process(n - 5) // what follows is the log, the link, its rename, the log again and the end
		y.killedAt(p, func(ctx context.Context) error {
			_, err := p.Lock(ctx, Lock{Wait: time.Minute}, nil)
			if err == nil {
				_, err = ship(ctx, p.Client, fmt.Sprintf("d%03d", m), bad)
			}
			if err == nil {
				_, err = p.Activate(ctx, nil)
			}
			return err
		})
		p = y.process(m)
		finished = y.killedAt(p, func(ctx context.Context) error {
			_, err := p.Lock(ctx, Lock{Wait: time.Minute}, nil)
			return err
		})
		c, locked := y.locked()
		y.serves(fmt.Sprintf("repair, change %d: %q", m, locked.Repaired))
		if y.current() != "b" {
			t.Errorf("repair, change %d: %q is current", m, y.current())
		}
		c.Close()
	}
	t.Logf("and its repair before each of %d", m-1)

	k := 0
	for finished := false; !finished && !t.Failed(); {
		k++
		p := y.process(k)
		finished = y.killedAt(p, func(ctx context.Context) error {
			_, err := p.Lock(ctx, Lock{Wait: time.Minute}, nil)
			if err == nil {
				_, err = p.Rollback(ctx, "a")
			}
			if err == nil {
				_, err = p.Activate(ctx, nil)
			}
			if err == nil {
				_, err = p.Finish(ctx)
			}
			return err
		})
		c, locked := y.locked()
		y.serves(fmt.Sprintf("rollback, change %d: %q", k, locked.Repaired))
		if y.current() == "a" {
			if _, err := c.Rollback(limit(t), "b"); err != nil {
				t.Error(err)
			}
			y.activate(c)
			y.finish(c)
		}
		c.Close()
	}
	t.Logf("and a rollback before each of %d", k-1)
	if min(n, m, k) < 5 {
		t.Error("there are less changes than there must be")
	}
}

// killedAt runs do until apply dies, or to its end.
func (y *yard) killedAt(p *program, do func(context.Context) error) (finished bool) {
	y.t.Helper()
	ctx := limit(y.t)
	_, err := p.Hello(ctx, y.hello())
	if err == nil {
		err = do(ctx)
	}
	died := p.wait()
	if (err == nil) != (died == nil) {
		y.t.Fatalf("the deploy: %v; its apply: %v", err, died)
	}
	return err == nil
}

// watch looks all the time whether current is a release.
func (y *yard) watch() (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			select {
			case <-quit:
				y.t.Logf("current was looked at %d times", n)
				return
			case <-time.After(100 * time.Microsecond):
			}
			if _, err := os.Stat(filepath.Join(y.to, "current/version")); err != nil {
				y.t.Errorf("at one moment: %v", err)
				return
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// A wire is cut after each frame that the deployer sends, or gets; the next attempt goes on.
func TestCutAtEachFrame(t *testing.T) {
	t.Parallel()
	for _, c := range []cutter{{writes: true}, {writes: false}} {
		newYard(t).cutAtEachFrame(c)
	}
}

func (y *yard) cutAtEachFrame(cut cutter) {
	t := y.t
	tr := tree{"version": "one", "lib/new": "new", "big": strings.Repeat("0123456789abcdef", 100_000)}
	for n := 1; ; n++ {
		here, there := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- Serve(context.Background(), there, y.opts) }()
		c := NewClient(&cutter{ReadWriteCloser: here, writes: cut.writes, left: n})
		ctx := limit(t)
		id := "a"
		entries, _ := tr.entries()
		_, err := c.Hello(ctx, y.hello())
		if err == nil {
			_, err = c.LockFor(ctx, Lock{Wait: time.Minute}, Offer{ID: id, Commit: "c-" + id, Entries: entries}, nil)
		}
		if err == nil {
			_, err = ship(ctx, c, id, tr)
		}
		if err == nil {
			_, err = c.ActivateForGood(ctx, nil)
		}
		c.Close()
		if served := <-done; err == nil {
			if served != nil {
				t.Error(served)
			}
			t.Logf("cut after each of %d frames", n-1)
			break
		}
		if n > 50 {
			t.Fatal(err)
		}
		if got := y.current(); got == id { // activate had come through: it was finished here
			if states := y.states(); states != "a good current" {
				t.Errorf("frame %d: %s", n, states)
			}
			if err := os.Remove(filepath.Join(y.to, "current")); err != nil {
				t.Fatal(err)
			}
		}
	}
	y.check(filepath.Join(y.to, "current"), tr)
}

// A cutter hangs up in place of the last byte of a frame, also of one that goes with others.
type cutter struct {
	io.ReadWriteCloser
	writes bool
	left   int
}

func (c *cutter) Read(p []byte) (int, error) {
	if !c.writes {
		if c.left--; c.left < 0 {
			c.Close()
			return 0, io.ErrClosedPipe
		}
	}
	return c.ReadWriteCloser.Read(p)
}

func (c *cutter) Write(p []byte) (int, error) {
	if !c.writes {
		return c.ReadWriteCloser.Write(p)
	}
	for n := 0; n < len(p); {
		next := n + 5 + int(binary.BigEndian.Uint32(p[n:]))
		if c.left--; c.left == 0 {
			n, _ := c.ReadWriteCloser.Write(p[:next-1])
			c.Close()
			return n, io.ErrClosedPipe
		}
		n = next
	}
	return c.ReadWriteCloser.Write(p)
}

// What was offered with a lock that somebody else has is refused with it, and neither answer is
// taken for another.
func TestOfferedAhead(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	one, _ := y.locked()
	two, _ := y.wire()
	y.greet(two)
	tr := tree{"version": "one"}
	entries, _ := tr.entries()
	ahead := Offer{ID: "a", Commit: "c-a", Entries: entries}
	if _, err := two.LockFor(limit(t), Lock{}, ahead, nil); code(err) != Held {
		t.Fatal(err)
	}
	if all, err := two.List(limit(t)); err != nil || len(all) != 0 {
		t.Fatal(all, err)
	}
	one.Close()
	if _, err := two.LockFor(limit(t), Lock{Wait: time.Minute}, ahead, nil); err != nil {
		t.Fatal(err)
	}
	if sent, err := ship(limit(t), two, "b", tr); err != nil || sent != 3 { // something else after all
		t.Fatal(sent, err)
	}
	r, err := two.ActivateForGood(limit(t), nil)
	if err != nil || r.State != StateActive || !r.Finished {
		t.Fatal(r, err)
	}
	if _, err := two.Finish(limit(t)); code(err) != Misused {
		t.Error(err)
	}
	if _, err := two.Revert(limit(t), nil); code(err) != Misused {
		t.Error(err)
	}
	two.Close()
	if got := y.states(); got != "b good current" {
		t.Error(got)
	}
	y.tidy()
}

// What arrived whole is not sent again.
func TestResume(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	c, done := y.wire()
	y.greet(c)
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	tr := tree{"a": strings.Repeat("a", 1000), "b": strings.Repeat("b", 1000), "c": strings.Repeat("c", 1000)}
	entries, contents := tr.entries()
	missing, err := c.Offer(limit(t), Offer{ID: "1", Entries: entries})
	if err != nil || len(missing) != 3 {
		t.Fatal(missing, err)
	}
	// the reader fails behind the second piece
	broken := errors.New("the build machine's disk")
	from := io.MultiReader(strings.NewReader(contents[missing[0].SHA256]+contents[missing[1].SHA256]), failing{broken})
	if err := c.Ship(limit(t), from); !errors.Is(err, broken) {
		t.Error(err)
	}
	c.Close()
	<-done
	if got := y.states(); got != "1 incoming" {
		t.Error(got)
	}
	c, _ = y.locked()
	if sent := y.ship(c, "1", tr); sent != 1000 {
		t.Errorf("%d bytes were sent again", sent)
	}
	c.Close()
	// and of another release's attempt
	c, _ = y.locked()
	if sent := y.ship(c, "2", tr); sent != 0 {
		t.Errorf("%d bytes were sent of what is there", sent)
	}
	y.check(filepath.Join(y.to, "releases/2"), tr)
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// What comes is not what was announced.
func TestCorrupt(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	c, _ := y.locked()
	entries, _ := first.entries()
	offer := Offer{ID: "1", Entries: entries}
	for name, text := range map[string]string{
		"other": strings.Repeat("x", len("one")+len("#!/bin/sh\n")+len("the same")),
		"short": "#",
	} {
		if _, err := c.Offer(limit(t), offer); err != nil {
			t.Fatal(err)
		}
		if err := c.Ship(limit(t), strings.NewReader(text)); code(err) != Corrupt {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := c.Activate(limit(t), nil); code(err) != Misused {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := y.states(); got != "1 incoming" {
		t.Error(got)
	}
	y.ship(c, "1", first)
	// chunks that are of another file than it says
	big := strings.Repeat("0123456789abcdef", 100_000)
	lie, contents := tree{"big": big}.entries()
	lie[0].SHA256 = sha256.Sum256([]byte("another"))
	missing, err := c.Offer(limit(t), Offer{ID: "2", Entries: lie})
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, p := range missing {
		all.WriteString(contents[p.SHA256])
	}
	if err := c.Ship(limit(t), strings.NewReader(all.String())); code(err) != Corrupt {
		t.Error(err)
	}
	// an id that is another tree's
	if _, err := ship(limit(t), c, "1", second); code(err) != Manifest {
		t.Error(err)
	}
}

func TestOrder(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	c, _ := y.wire()
	if _, err := c.List(limit(t)); code(err) != Misused {
		t.Error(err)
	}
	y.greet(c)
	if _, err := c.Hello(limit(t), y.hello()); code(err) != Misused {
		t.Error(err)
	}
	if _, err := ship(limit(t), c, "a", first); code(err) != Misused {
		t.Error(err)
	}
	if _, err := c.Activate(limit(t), nil); code(err) != Misused {
		t.Error(err)
	}
	if _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); err != nil {
		t.Error(err)
	}
	for name, ask := range map[string]func() error{
		"lock":     func() error { _, err := c.Lock(limit(t), Lock{Wait: time.Minute}, nil); return err },
		"activate": func() error { _, err := c.Activate(limit(t), nil); return err },
		"finish":   func() error { _, err := c.Finish(limit(t)); return err },
		"revert":   func() error { _, err := c.Revert(limit(t), nil); return err },
		"ship":     func() error { return c.Ship(limit(t), strings.NewReader("")) },
		"id":       func() error { _, err := c.Offer(limit(t), Offer{ID: "../x"}); return err },
		"restart":  func() error { _, err := asked[Result](limit(t), c, "restartt", struct{}{}, nil); return err },
		"fields":   func() error { _, err := asked[Result](limit(t), c, "lock", []int{1}, nil); return err },
	} {
		if err := ask(); code(err) != Misused {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Rollback(limit(t), ""); code(err) != None {
		t.Error(err)
	}
	y.ship(c, "a", first)
	y.activate(c)
	if _, err := c.Rollback(limit(t), "a"); code(err) != Misused {
		t.Error(err)
	}
	y.finish(c)
	if _, err := c.Rollback(limit(t), "a"); err != nil {
		t.Error(err)
	}
}

// The disk is full, which is said before, and when it happens. What runs is not touched.
func TestDiskFull(t *testing.T) {
	const inside = "CULVERT_RELEASE_DISK"
	if os.Getenv(inside) == "" {
		if os.Geteuid() != 0 {
			t.Skip("a disk of its own needs root")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestDiskFull$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	y := newYard(t)
	disk := filepath.Dir(y.to)
	if err := syscall.Mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
	y.good("a", first)
	c, _ := y.locked()
	if _, err := ship(limit(t), c, "b", tree{"big": random(5 << 20)}); code(err) != Space {
		t.Error("before:", err)
	}
	tr := tree{"big": random(1 << 20), "more": random(1<<20 + 1)}
	entries, contents := tr.entries()
	missing, err := c.Offer(limit(t), Offer{ID: "b", Entries: entries})
	if err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 5<<19), 0o644); err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, p := range missing {
		all.WriteString(contents[p.SHA256])
	}
	err = c.Ship(limit(t), strings.NewReader(all.String()))
	if code(err) != Space {
		t.Error("while it came:", err)
	}
	y.tidy()
	y.check(filepath.Join(y.to, "current"), first)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	y.ship(c, "b", tr)
	if r := y.activate(c); r.State != StateActive {
		t.Errorf("%+v", r)
	}
}

// A torn last line, and what is not a line at all.
func TestTornLog(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	f, err := os.OpenFile(filepath.Join(y.to, logFile), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, "\x00\x00\n", `{"event":"good","rele`)
	f.Close()
	y.good("b", second)
	if got := y.states(); got != "a good, b good current" {
		t.Error(got)
	}
	if _, err := json.Marshal(y.log()); err != nil {
		t.Error(err)
	}
}

// A first deploy of 300 files of 4.5 KB, and one of which three have changed.
func BenchmarkDeploy(b *testing.B) {
	many := tree{}
	text := random(300 * 4500)
	for i := range 300 {
		many[fmt.Sprintf("d%d/%d", i%10, i)] = text[i*4500 : (i+1)*4500]
	}
	changed := maps.Clone(many)
	for i := range 3 {
		changed[fmt.Sprintf("d%d/%d", i, i)] = text[i*4500:i*4500+4499] + "x"
	}
	for _, c := range []struct {
		name   string
		before tree
	}{{"first", nil}, {"changed", changed}} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				y := &yard{to: filepath.Join(b.TempDir(), "shop")}
				run := func(id string, tr tree) error {
					here, there := net.Pipe()
					done := make(chan error, 1)
					go func() { done <- Serve(b.Context(), there, Options{}) }()
					c := NewClient(here)
					_, err := c.Hello(b.Context(), y.hello())
					if err == nil {
						_, err = c.Lock(b.Context(), Lock{}, nil)
					}
					if err == nil {
						_, err = ship(b.Context(), c, id, tr)
					}
					if err == nil {
						_, err = c.Activate(b.Context(), nil)
					}
					if err == nil {
						_, err = c.Finish(b.Context())
					}
					c.Close()
					return errors.Join(err, <-done)
				}
				if c.before != nil {
					if err := run("a", c.before); err != nil {
						b.Fatal(err)
					}
				}
				b.StartTimer()
				if err := run("b", many); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
