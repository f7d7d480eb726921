// Package e2e runs the built culvert on the laptop of a real cluster, as a
// person would. "make cluster-up build" first; "make test" does both.
package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/cli"
)

const patience = 90 * time.Second // for what takes 10 s on a quiet machine

var (
	image      = cmp.Or(os.Getenv("CULVERT_IMAGE"), "localhost/culvert-shadow:dev")
	root       = must(filepath.Abs(".."))
	clusterBin = filepath.Join(root, "bin/cluster")
	culvertBin = filepath.Join(root, "bin/culvert")
	kubeconfig = filepath.Join(root, "e2e/.run/kubeconfig")
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "privileged" { // connect runs itself again as its child
		os.Exit(cli.Main("test", os.Args[1:]))
	}
	if os.Getenv(insideName) != "" {
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		fmt.Println("e2e: must run as root, to enter the cluster's namespaces")
		os.Exit(1)
	}
	if out, err := clusterCommand("status").CombinedOutput(); err != nil {
		fmt.Printf("e2e: no cluster (make cluster-up): %v: %s\n", err, out)
		os.Exit(1)
	}
	code, err := ownTemp(m.Run)
	if err != nil {
		fmt.Println("e2e:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

// ownTemp gives the laptop a folder for temporary files: the other half's are not its own.
func ownTemp(run func() int) (code int, err error) {
	dir := filepath.Join(os.TempDir(), "e2e-"+laptopHost)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return 0, err
	}
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil { // for ordinary users, too
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return 0, err
	}
	return run(), nil
}

// clusterCommand is one of the harness's own.
func clusterCommand(args ...string) *exec.Cmd { return exec.Command(clusterBin, args...) }

// on is a command on one of the cluster's machines.
func on(machine string, args ...string) *exec.Cmd {
	c := clusterCommand(append([]string{"exec", machine, "--"}, args...)...)
	c.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig, "CULVERT_IMAGE="+image, "HOME=/root")
	return c
}

// try runs a command on the laptop and returns what it printed and its error.
func try(args ...string) (stdout, stderr string, err error) {
	c := on(laptopHost, args...)
	var out, talk bytes.Buffer
	c.Stdout, c.Stderr = &out, &talk
	err = c.Run()
	return strings.TrimSpace(out.String()), talk.String(), err
}

// laptop runs a command on the laptop that must do well, and returns its output.
func laptop(t testing.TB, args ...string) string {
	t.Helper()
	out, talk, err := try(args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, talk)
	}
	return out
}

func kubectl(t testing.TB, args ...string) string {
	t.Helper()
	together(t)
	return laptop(t, append([]string{"kubectl"}, args...)...)
}

// apply gives the cluster a manifest.
func apply(t testing.TB, manifest string) {
	t.Helper()
	together(t)
	c := on(laptopHost, "kubectl", "apply", "-f", "-")
	c.Stdin = strings.NewReader(manifest)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("kubectl apply: %v\n%s", err, out)
	}
}

// exitCode of a command, -1 where it did not even start.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

// eventually tries until it works, or the test fails with the last error.
func eventually(t testing.TB, within time.Duration, what string, try func() error) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// A lockedBuffer may be read while a process writes it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// running is a culvert that runs on the laptop.
type running struct {
	t    testing.TB
	cmd  *exec.Cmd
	talk lockedBuffer    // its stderr
	ctx  context.Context // done when it has ended
	err  error           // of Wait, when ctx is done
}

// start runs culvert with args and returns at once.
func start(t testing.TB, args ...string) *running {
	t.Helper()
	return startAs(t, on(laptopHost, append([]string{culvertBin}, args...)...))
}

func startAs(t testing.TB, cmd *exec.Cmd) *running {
	t.Helper()
	together(t)
	s := &running{t: t, cmd: cmd}
	if cmd.Stdout == nil { // it is on no terminal
		cmd.Stdout, cmd.Stderr = &s.talk, &s.talk
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, ended := context.WithCancel(context.Background())
	s.ctx = ctx
	go func() { s.err = cmd.Wait(); ended() }()
	t.Cleanup(func() {
		if s.alive() {
			s.interrupt()
			s.wait(patience)
		}
		if t.Failed() {
			t.Logf("culvert said:\n%s", s.talk.String())
		}
	})
	return s
}

// connect starts "culvert connect" and waits until it says that it is connected.
func connect(t testing.TB, args ...string) *running {
	t.Helper()
	s := start(t, append([]string{"connect", "-n", namespace}, args...)...)
	s.connected()
	return s
}

const connectedLine = "connected"

func (s *running) connected() {
	s.t.Helper()
	eventually(s.t, patience, "culvert connected", func() error {
		if !s.alive() {
			s.t.Fatalf("culvert ended: %v\n%s", s.err, s.talk.String())
		}
		if !strings.Contains(s.talk.String(), "✓ "+connectedLine) {
			return errors.New(s.talk.String())
		}
		return nil
	})
}

func (s *running) alive() bool { return s.ctx.Err() == nil }

func (s *running) interrupt() { _ = s.cmd.Process.Signal(syscall.SIGINT) }

// wait returns the exit code.
func (s *running) wait(within time.Duration) int {
	s.t.Helper()
	select {
	case <-s.ctx.Done():
	case <-time.After(within):
		s.t.Errorf("culvert did not end within %v", within)
		_ = s.cmd.Process.Kill()
		<-s.ctx.Done()
	}
	return exitCode(s.err)
}

// stop interrupts, waits, and wants everything put back.
func (s *running) stop() {
	s.t.Helper()
	s.interrupt()
	if code := s.wait(patience); code != 0 {
		s.t.Errorf("culvert ended with %d, want 0\n%s", code, s.talk.String())
	}
}

// status is what "culvert status -o json" says of the one session.
type status struct {
	Session string
	PID     int
	Shadow  struct{ Kind, Pod string }
	Wire    struct {
		Up        bool
		Kind, Way string
		NotDirect string
		RTT       string
		Reopened  int
	}
	Device struct{ Name string }
	Routes []struct{ Prefix, Source string }
	DNS    struct {
		Mode, Server string
		As           string
		Passed       bool
		Whole        []string
	}
	Missing []string
}

func statuses(t testing.TB) []status {
	t.Helper()
	var all []status
	out := laptop(t, culvertBin, "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("culvert status -o json: %v in %s", err, out)
	}
	return all
}

func theStatus(t testing.TB) status {
	t.Helper()
	all := statuses(t)
	if len(all) != 1 {
		t.Fatalf("%d sessions, want 1", len(all))
	}
	return all[0]
}
