//go:build unix

package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// logVariable tells a program that it's to go on in the background, and where it
	// writes from then on.
	logVariable = "CULVERT_BACKGROUND_LOG"

	readyFD = 3 // where it says that it has
)

// Background runs this program again, on the same terminal, until that detaches, and
// leaves it to itself. If it ends before, its failure is an *ExitError. What it writes
// from then on goes to the file log.
func Background(ctx context.Context, log string, args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(self, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = append(os.Environ(), logVariable+"="+log)
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	signal.Ignore(os.Interrupt) // it has had the same Ctrl-C, and answers
	defer context.AfterFunc(ctx, func() { cmd.Process.Signal(unix.SIGTERM) })()
	if n, _ := ready.Read(make([]byte, 1)); n == 1 {
		return cmd.Process.Release()
	}
	var ended *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &ended) {
		return err
	}
	exit := exitOf(unix.WaitStatus(ended.Sys().(syscall.WaitStatus)))
	exit.Name = self
	return &exit
}

// Detachment is what Background has left for this program, nil if that has not started it.
// Nothing that is run from then on inherits it. Its function goes on in the background: away
// from the terminal and its Ctrl-C, in a session of its own.
func Detachment() (detach func() error) {
	log := os.Getenv(logVariable)
	if log == "" {
		return nil
	}
	os.Unsetenv(logVariable)
	unix.CloseOnExec(readyFD)
	ready := os.NewFile(readyFD, "ready")
	return func() error { return leave(ready, log) }
}

// leave says that it has, last of all.
func leave(ready *os.File, name string) error {
	defer ready.Close()
	log, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("go on in the background: %w", err)
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	if _, err := unix.Setsid(); err != nil {
		return fmt.Errorf("go on in the background: %w", err)
	}
	for fd, to := range []*os.File{null, log, log} {
		if err := redirect(int(to.Fd()), fd); err != nil {
			return fmt.Errorf("go on in the background: %w", err)
		}
	}
	_, err = ready.Write([]byte{1})
	return err
}
