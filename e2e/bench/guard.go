package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
)

// The guard cleans before a run and after it, also when the run was killed: it
// sees its standard input end, and has nobody to wait for.

// guardMain is the role "guard".
func guardMain(context.Context, []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", "@"+prefix+"guard")
	if err != nil {
		return fmt.Errorf("another bench is running: %w", err)
	}
	defer l.Close()
	if err := clean(self); err != nil {
		return fmt.Errorf("clean up after an earlier bench: %w", err)
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, clean(self))
}

// guarded starts the guard. What ends it waits until all is clean.
func guarded(self string) (end func() error, err error) {
	c := exec.Command(self, "guard")
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the run
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	end = func() error {
		stdin.Close()
		return c.Wait()
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("guard: %w", errors.Join(err, end()))
	}
	return end, nil
}
