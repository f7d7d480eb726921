package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// execCommand is "exec [--uid N] HOST -- CMD ARG...". The command has this
// process's standard files, environment and working directory; it gets our
// signals, dies when we are killed, and its exit code becomes ours.
func execCommand(args []string) error {
	uid := "0"
	if len(args) > 1 && args[0] == "--uid" {
		uid, args = args[1], args[2:]
	}
	if len(args) > 1 && args[1] == "--" {
		args = slices.Delete(slices.Clone(args), 1, 2)
	}
	if len(args) < 2 {
		return errors.New("exec: want a host and a command: cluster exec [--uid N] HOST -- CMD")
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	// The thread that enters the namespaces must stay: the kernel kills the
	// command when it goes.
	runtime.LockOSThread()
	if err := enter(args[0]); err != nil {
		return err
	}
	return forwarded(inside(args[1:], dir, uid))
}

// enter moves this thread, and what it starts, to a host.
func enter(host string) error {
	pid := findMachine(host)
	if pid == 0 {
		return fmt.Errorf("no host %s: is the cluster up? (cluster status)", host)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("enter %s: %w", host, err)
	}
	defer unix.Close(fd)
	// A mount namespace cannot be entered by a thread that shares its working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter %s: %w", host, err)
	}
	if err := unix.Setns(fd, hostNamespaces|unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", host, err)
	}
	return nil
}

// inside makes the command; the thread is at the host already. It is started
// by way of execMain, for Go's own Pdeathsig does not hold across a PID
// namespace: it finds no parent there, and takes it for dead.
func inside(args []string, dir, uid string) *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: slices.Concat([]string{execMark, uid}, args), Dir: dir,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	}
}

// execMain becomes the command, as the user wanted, and is killed with its parent.
func execMain(uid string, args []string) error {
	runtime.LockOSThread() // what is set below is set for a thread
	env := setenv(os.Environ(), "PATH", hostBin+":"+os.Getenv("PATH"))
	if uid != "0" {
		name, home, err := become(uid)
		if err != nil {
			return err
		}
		env = setenv(setenv(setenv(env, "HOME", home), "USER", name), "LOGNAME", name)
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	if unix.Getppid() != 0 { // a parent outside of the namespace has no number; the host's PID 1 has
		return errors.New("whoever ran cluster exec is gone")
	}
	err := unix.Exec(lookPath(args[0], env), args, env)
	fmt.Fprintf(os.Stderr, "cluster: error: run %s: %v\n", args[0], err)
	if errors.Is(err, unix.ENOENT) {
		return exitCode(127)
	}
	return exitCode(126)
}

// become takes a user's rights and says its name and home.
func become(uid string) (name, home string, err error) {
	id, err := strconv.Atoi(uid)
	if err != nil {
		return "", "", fmt.Errorf("user %s: not a number", uid)
	}
	name, home = account(uid)
	return name, home, errors.Join(syscall.Setgroups(nil), syscall.Setgid(id), syscall.Setuid(id))
}

// lookPath searches the host's PATH. What is not found is left to fail with
// its own name.
func lookPath(name string, env []string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for _, e := range env {
		list, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for dir := range strings.SplitSeq(list, ":") {
			if path := dir + "/" + name; dir != "" && unix.Access(path, unix.X_OK) == nil {
				return path
			}
		}
	}
	return name
}

func setenv(env []string, key, value string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, key+"=") })
	return append(env, key+"="+value)
}

// account looks a user up at the host.
func account(uid string) (name, home string) {
	b, _ := os.ReadFile("/etc/passwd")
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) > 5 && f[2] == uid {
			return f[0], f[5]
		}
	}
	return uid, "/"
}

// forwarded runs the command and passes signals on to it.
func forwarded(cmd *exec.Cmd) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		for s := range signals {
			if !fromTerminal(s) {
				_ = cmd.Process.Signal(s)
			}
		}
	}()
	err := cmd.Wait()
	var failed *exec.ExitError
	if !errors.As(err, &failed) {
		return err
	}
	if ws := failed.Sys().(syscall.WaitStatus); ws.Signaled() {
		return exitCode(128 + int(ws.Signal()))
	}
	return exitCode(failed.ExitCode())
}

// fromTerminal tells whether a signal came from the keyboard, most likely:
// the terminal has then sent it to the command too.
func fromTerminal(s os.Signal) bool {
	if s != unix.SIGINT && s != unix.SIGQUIT {
		return false
	}
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	foreground, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && foreground == unix.Getpgrp()
}

// onHost runs a command at a host from within the harness.
func onHost(host string, args ...string) error {
	_, err := outputOf(host, args...)
	return err
}

func outputOf(host string, args ...string) (string, error) {
	return output("/proc/self/exe", slices.Concat([]string{"exec", host, "--"}, args)...)
}
