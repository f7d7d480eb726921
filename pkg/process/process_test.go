//go:build unix

package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test program is the process to be killed, too: it runs its arguments, as
// a verb would. A patient one has much to do after the first Ctrl-C, and is done
// at the second.
func TestMain(m *testing.M) {
	mode := os.Getenv("CULVERT_PROCESS_TEST")
	if mode == "" {
		goleak.VerifyTestMain(m)
		return
	}
	os.Unsetenv("CULVERT_PROCESS_TEST")
	if mode == "background" {
		os.Exit(background(os.Args[1], os.Args[2]))
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt)
	go func() {
		if <-signals; mode == "patient" {
			fmt.Println("leaving")
			<-signals
		}
		cancel(ErrInterrupt)
	}()
	cfg := Config{Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Patience: 2 * time.Second}
	if mode == "settled" {
		cfg.Settled = func() { fmt.Println("settled") }
	}
	err := Run(ctx, cfg)
	fmt.Printf("run: %v, echo %v\n", err, echoes())
	var failed *ExitError
	if errors.As(err, &failed) {
		os.Exit(failed.Code)
	}
}

// echoes tells whether the terminal does, which an editor turns off.
func echoes() bool {
	stty := exec.Command("stty", "-a")
	stty.Stdin = os.Stdin
	out, err := stty.Output()
	return err == nil && bytes.Contains(out, []byte(" echo "))
}

func sh(script string) []string { return []string{"/bin/sh", "-c", script} }

// await is the end of waiting for what must come.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

// gone tells whether a process has ended; a zombie has.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return unix.Kill(pid, 0) != nil
	}
	return strings.Contains(string(stat), ") Z ")
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name        string
		cfg         Config
		code        int
		signal      os.Signal
		out, errOut string
	}{
		{name: "well", cfg: Config{Args: sh("true")}},
		{name: "status", cfg: Config{Args: sh("exit 3")}, code: 3},
		{name: "signal", cfg: Config{Args: sh("kill -9 $$")}, code: 137, signal: unix.SIGKILL},
		{name: "streams", cfg: Config{Args: sh("cat; echo err >&2"), Stdin: strings.NewReader("in")}, out: "in", errOut: "err\n"},
		{name: "environment", cfg: Config{Args: sh(`echo "$A$HOME"`), Env: []string{"A=a"}}, out: "a\n"},
		{name: "directory", cfg: Config{Args: sh("pwd -P"), Dir: dir}, out: real + "\n"},
		{name: "by PATH", cfg: Config{Args: []string{"echo", "x y"}}, out: "x y\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out, errOut bytes.Buffer
			test.cfg.Stdout, test.cfg.Stderr = &out, &errOut
			err := Run(t.Context(), test.cfg)
			var failed *ExitError
			if errors.As(err, &failed) != (test.code != 0) || failed != nil && (failed.Code != test.code || failed.Signal != test.signal) {
				t.Errorf("%v", err)
			}
			if err != nil && failed == nil {
				t.Error(err)
			}
			if out.String() != test.out || errOut.String() != test.errOut {
				t.Errorf("%q %q", out.String(), errOut.String())
			}
		})
	}
}

// A command that has settled goes on; one that never starts never does.
func TestRunSettled(t *testing.T) {
	settled, ctx := make(chan struct{}), t.Context()
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Args: sh("exec >/dev/null; sleep 1000"), Settled: func() { close(settled) }})
	}()
	<-settled
	select {
	case err := <-done:
		t.Errorf("it has ended: %v", err)
	default:
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := Run(t.Context(), Config{Args: []string{"no-such-command-here"}, Settled: func() { t.Error("settled") }}); err == nil {
		t.Error("nothing was run")
	}
}

func TestRunStartFails(t *testing.T) {
	if err := Run(t.Context(), Config{Args: []string{"no-such-command-here"}}); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if err := Run(t.Context(), Config{Args: []string{"/etc/passwd"}}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("%v", err)
	}
	if err := Run(t.Context(), Config{}); err == nil {
		t.Error("nothing was run")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Run(ctx, Config{Args: sh("touch " + t.TempDir() + "/run")}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// start runs a script until it has said a line of numbers: of processes.
func start(t *testing.T, ctx context.Context, patience time.Duration, script string) (pids []int, rest *bufio.Reader, done <-chan error) {
	t.Helper()
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := Run(ctx, Config{Args: sh(script), Stdout: w, Patience: patience})
		w.Close()
		ended <- err
	}()
	rest = bufio.NewReader(r)
	return numbers(t, rest), rest, ended
}

func numbers(t *testing.T, r *bufio.Reader) (pids []int) {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range strings.Fields(line) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func allGone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if !gone(pid) {
			t.Errorf("process %d is left", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// The context's end is told as it came, and its cause comes back, whatever the
// command makes of it.
func TestRunTold(t *testing.T) {
	why := errors.New("why")
	for cause, word := range map[error]string{why: "TERM", ErrInterrupt: "INT"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		pids, rest, done := start(t, ctx, 0, `trap 'echo TERM; exit 4' TERM; trap 'echo INT; exit 0' INT; echo $$; while :; do sleep 0.01; done`)
		cancel(cause)
		if got, _ := io.ReadAll(rest); string(got) != word+"\n" {
			t.Errorf("%v: %q", cause, got)
		}
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("%v", err)
		}
		allGone(t, pids)
	}
}

// Who does not listen is killed, with all of the group; a suspended one is
// woken to hear it.
func TestRunKilled(t *testing.T) {
	for name, script := range map[string]string{
		"deaf":           `trap '' TERM HUP; sleep 1000 & (while :; do sleep 1000; done) & echo $$ $!; while :; do sleep 1000; done`,
		"deaf child":     `(trap '' TERM HUP; while :; do sleep 1000; done) & echo $$ $!; wait`,
		"suspended":      `trap 'exit 0' TERM; sleep 1000 & echo $$ $!; kill -STOP $$`,
		"suspended deaf": `trap '' TERM HUP; sleep 1000 & echo $$ $!; kill -STOP $$; wait`,
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			pids, rest, done := start(t, ctx, 200*time.Millisecond, script)
			cancel()
			begin := time.Now()
			_, _ = io.ReadAll(rest)
			if err := <-done; !errors.Is(err, context.Canceled) || time.Since(begin) > 3*time.Second {
				t.Errorf("%v after %v", err, time.Since(begin))
			}
			allGone(t, pids)
		})
	}
}

// An end of the command is the end of what it started, and its status stays.
func TestRunLeavesNobody(t *testing.T) {
	pids, rest, done := start(t, t.Context(), time.Second, `sleep 1000 & (trap '' TERM; exec sleep 1000) & echo $! $$; exit 5`)
	_, _ = io.ReadAll(rest)
	var failed *ExitError
	if err := <-done; !errors.As(err, &failed) || failed.Code != 5 {
		t.Errorf("%v", err)
	}
	allGone(t, pids)
}

// Who left the group keeps our pipe open, but does not keep us.
func TestRunDaemon(t *testing.T) {
	if _, err := exec.LookPath("setsid"); err != nil {
		t.Skip("no setsid here")
	}
	begin := time.Now()
	pids, rest, done := start(t, t.Context(), time.Second, `setsid sh -c 'echo $$; exec sleep 1000' & sleep 0.2`)
	_, _ = io.ReadAll(rest)
	if err := <-done; err != nil || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	_ = unix.Kill(pids[0], unix.SIGKILL)
}

// Threads that end meanwhile are not taken for us.
func TestRunThreads(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pids, rest, done := start(t, ctx, 0, `echo $$; sleep 0.5; echo alive`)
	var wait sync.WaitGroup
	for range 50 {
		wait.Go(func() { runtime.LockOSThread() }) // the thread ends with it
	}
	wait.Wait()
	if got, _ := io.ReadAll(rest); string(got) != "alive\n" {
		t.Errorf("%q", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	allGone(t, pids)
}

// waits tells whether a Run in the process is past its start: only then does it
// listen for SIGCONT.
func waits(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true // not Linux
	}
	_, caught, _ := strings.Cut(string(status), "SigCgt:")
	mask, err := strconv.ParseUint(strings.Fields(caught)[0], 16, 64)
	return err == nil && mask&(1<<(unix.SIGCONT-1)) != 0
}

// Nobody survives a kill -9 of this process, deaf or suspended.
func TestKilledParent(t *testing.T) {
	cmd := exec.Command(os.Args[0], sh(`(trap '' TERM HUP; while :; do sleep 1000; done) & deaf=$!; sleep 1000 & plain=$!; (kill -STOP $(exec sh -c 'echo $PPID')) & echo $$ $deaf $plain $!; wait; wait; wait`)...)
	cmd.Env = append(os.Environ(), "CULVERT_PROCESS_TEST=run")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pids := numbers(t, bufio.NewReader(out))
	await(t, "the guard's knowledge", func() bool { return waits(cmd.Process.Pid) })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	begin := time.Now()
	for _, pid := range pids {
		await(t, fmt.Sprint("end of process ", pid), func() bool { return gone(pid) })
	}
	t.Logf("%d processes gone after %v", len(pids), time.Since(begin).Round(time.Millisecond))
}

// Nothing of a guard is left either.
func TestGuardGoes(t *testing.T) {
	g, err := StartGuard(time.Second)
	if err != nil {
		t.Fatal(err)
	}
	g.Dismiss()
	if !g.cmd.ProcessState.Success() || !gone(g.cmd.Process.Pid) {
		t.Errorf("%v", g.cmd.ProcessState)
	}
}
