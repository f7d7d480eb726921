//go:build unix

package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// lastWait is how long the dead may take to be gone.
const lastWait = 2 * time.Second

// run is on one thread from the start of the command to its end: Linux tells
// the command of the end of the thread that started it.
func run(ctx context.Context, cmd *exec.Cmd, cfg Config) (exit, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	guard, err := StartGuard(cfg.Patience)
	if err != nil {
		return exit{}, err
	}
	defer guard.Dismiss()
	g := &group{patience: cfg.Patience, terminal: terminalOf(cmd.Stdin)}
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	dieWithParent(cmd.SysProcAttr)
	said, hush := g.terminal.listen()
	defer hush()
	settled, err := launch(cmd, cfg)
	if err != nil {
		return exit{}, err
	}
	g.id = cmd.Process.Pid
	g.terminal.lead(g.id)
	guard.Watch(g.id)
	end, err := g.wait(ctx, said, settled, cfg.Settled)
	g.terminal.take()
	if end.Signal != nil {
		g.terminal.restore()
	}
	if err == nil {
		_ = cmd.Wait() // of its process we know; this waits for the copying
	}
	_ = cmd.Process.Release()
	return end, err
}

// A group is the command's process group.
type group struct {
	id       int
	patience time.Duration
	terminal *terminal

	steps    []step // of its end that are still to come
	escalate *time.Timer
}

// A step of the end: a signal, and how long it may take to have its effect.
type step struct {
	signal unix.Signal
	time   time.Duration
}

// end begins the end of the group, once. An interactive shell takes no notice
// of a termination, but takes its jobs with it when it is hung up.
func (g *group) end(first unix.Signal) {
	if g.steps != nil {
		return
	}
	g.steps = []step{{first, g.patience / 2}, {unix.SIGHUP, g.patience / 2}, {unix.SIGKILL, lastWait}}
	g.next()
}

// next takes one step. Without any left the group has outlived its end.
func (g *group) next() (outlived bool) {
	if len(g.steps) == 0 {
		return true
	}
	s := g.steps[0]
	g.steps = g.steps[1:]
	_ = unix.Kill(-g.id, s.signal)
	_ = unix.Kill(-g.id, unix.SIGCONT) // the suspended hear nothing
	g.escalate.Reset(s.time)
	return false
}

// empty: there is nobody left, or nobody that we may do anything about.
func (g *group) empty() bool { return unix.Kill(-g.id, 0) != nil || allDead(g.id) }

// errOutlived is a command that runs as somebody else, or hangs in the kernel.
var errOutlived = errors.New("it could not be killed")

// wait returns when the group is gone. It passes on what the terminal has said to us.
func (g *group) wait(ctx context.Context, said <-chan os.Signal, settled <-chan struct{}, then func()) (end exit, err error) {
	g.escalate = time.NewTimer(0)
	<-g.escalate.C
	defer g.escalate.Stop()
	look := time.NewTicker(10 * time.Millisecond)
	look.Stop()
	defer look.Stop()
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, unix.SIGCONT)
	defer signal.Stop(continued)
	changes := make(chan change, 1)
	go func() {
		end, err := Await(g.id, func(by unix.Signal) { changes <- change{stopped: by} })
		changes <- change{end: end, err: err}
	}()
	done := ctx.Done()
	for ended := false; !ended || !g.empty(); {
		select {
		case c := <-changes:
			if c.err != nil {
				return end, c.err
			}
			if c.stopped != 0 {
				g.terminal.suspend(c.stopped, continued)
				continue
			}
			ended, end.ExitError = true, c.end
			if !g.empty() {
				g.end(unix.SIGTERM)
				look.Reset(10 * time.Millisecond)
			}
		case <-continued:
			g.terminal.resume()
		case s := <-said:
			_ = unix.Kill(-g.id, s.(unix.Signal))
		case <-settled:
			settled = nil
			g.terminal.settle()
			then()
		case <-done:
			done, end.told = nil, !ended
			g.end(signalFor(ctx))
		case <-g.escalate.C:
			if g.next() {
				return end, errOutlived
			}
		case <-look.C:
		}
	}
	return end, nil
}

func signalFor(ctx context.Context) unix.Signal {
	if errors.Is(context.Cause(ctx), ErrInterrupt) {
		return unix.SIGINT
	}
	return unix.SIGTERM
}

// A change of the command: it was suspended, or has ended.
type change struct {
	stopped unix.Signal
	end     ExitError
	err     error
}

// Await waits for the end of a child, and tells of every stop on the way.
func Await(pid int, stopped func(by unix.Signal)) (ExitError, error) {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(pid, &status, unix.WUNTRACED, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return ExitError{}, fmt.Errorf("wait for process %d: %w", pid, err)
		case status.Stopped():
			stopped(status.StopSignal())
		default:
			return exitOf(status), nil
		}
	}
}

func exitOf(status unix.WaitStatus) ExitError {
	if status.Signaled() {
		return ExitError{Code: 128 + int(status.Signal()), Signal: status.Signal()}
	}
	return ExitError{Code: status.ExitStatus()}
}
