package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The names that processes of a machine go by, so that they can be searched
// for: PID 1, its child that sets the host up and keeps its services, and what
// is about to become a command of "exec".
const (
	machineMark = "culvert-e2e-machine"
	hostMark    = "culvert-e2e-host"
	execMark    = "culvert-e2e-exec"
	nsPrefix    = "culvert-"
)

const hostNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID

// startMachine starts a host in its network namespace, and returns when the
// host says that it is set up. It then lives on without its parent.
func startMachine(p paths, name string, env []string) error {
	logName := filepath.Join(p.logs, name+".log")
	logFile, err := os.Create(logName)
	if err != nil {
		return err
	}
	defer logFile.Close()
	ready, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := &exec.Cmd{
		Path: self, Args: []string{machineMark, name}, Env: append(os.Environ(), env...), Dir: p.root,
		Stdout: logFile, Stderr: logFile, ExtraFiles: []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Cloneflags: hostNamespaces},
	}
	err = startInNetns(cmd, filepath.Join(netnsDir, nsPrefix+name))
	w.Close()
	if err != nil {
		return fmt.Errorf("start host %s: %w", name, err)
	}
	_ = ready.SetReadDeadline(time.Now().Add(60 * time.Second))
	if said, err := io.ReadAll(ready); err != nil || string(said) != "ready" {
		return fmt.Errorf("host %s does not come up: read %s\n%s", name, logName, tail(logName))
	}
	return nil
}

// startInNetns forks from a thread that has entered the namespace, and that
// ends with this goroutine, for it is never unlocked.
func startInNetns(cmd *exec.Cmd, netns string) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		f, err := os.Open(netns)
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
		}
		if err == nil {
			err = cmd.Start()
		}
		result <- err
	}()
	return <-result
}

// machineMain is PID 1: it makes the namespaces private, hands over to
// hostMain, and reaps. When it ends, the kernel ends all else.
func machineMain(name string) error {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	ready := os.NewFile(3, "ready")
	// Not /proc/self/exe: the program may have been built anew meanwhile, and runs on.
	child, err := os.StartProcess("/proc/self/exe", []string{hostMark, name}, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, ready},
	})
	if err != nil {
		return err
	}
	ready.Close()
	for {
		switch pid, err := unix.Wait4(-1, nil, 0, nil); {
		case pid == child.Pid:
			return fmt.Errorf("%s ended", hostMark)
		case err != nil && err != unix.EINTR:
			return err
		}
	}
}

// hostMain is what a host does; it returns only when that failed.
func hostMain(name string) error {
	p, err := findPaths()
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	h := host{paths: p, name: name, disk: filepath.Join(p.run, name)}
	switch {
	case isLaptop(name):
		err = h.laptop()
	case name == "router":
		err = h.router()
	default:
		err = h.node()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for { // not select {}: a host without services would be a deadlock to Go
		_ = unix.Pause()
	}
}

// host is a machine seen from the inside.
type host struct {
	paths
	name string
	disk string // a tmpfs that only this host sees, for all that it writes
}

// ready tells startMachine that the host can be used.
func (h host) ready() {
	f := os.NewFile(3, "ready")
	_, _ = io.WriteString(f, "ready")
	f.Close()
}

// supervise keeps a service running, its output in a log of its own.
func (h host) supervise(program string, args ...string) {
	name := filepath.Base(program)
	go func() {
		for {
			log.Printf("%s ended: %v", name, h.runLogged(name, program, args...))
			time.Sleep(500 * time.Millisecond) // not to spin on a service that cannot start
		}
	}()
}

func (h host) runLogged(name, program string, args ...string) error {
	f, err := os.OpenFile(filepath.Join(h.logs, h.name+"."+name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = f, f
	return cmd.Run()
}

// findMachine gives the PID 1 of a host, as seen from here, or 0.
func findMachine(name string) int {
	for _, m := range machines() {
		if m.name == name {
			return m.pid
		}
	}
	return 0
}

type machine struct {
	name string
	pid  int
}

// machines searches the processes of this machine for hosts.
func machines() []machine {
	var found []machine
	for _, pid := range processes() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if args := strings.Split(string(b), "\x00"); args[0] == machineMark && len(args) > 1 {
			found = append(found, machine{args[1], pid})
		}
	}
	return found
}

func processes() []int {
	entries, _ := os.ReadDir("/proc")
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// tail gives the last lines of a log.
func tail(name string) string {
	b, _ := os.ReadFile(name)
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	if len(lines) > 8 {
		lines = lines[len(lines)-8:]
	}
	return "  " + string(bytes.Join(lines, []byte("\n  ")))
}
