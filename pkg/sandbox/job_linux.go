package sandbox

import (
	"cmp"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/process"
)

// Signals are those that somebody may send to this process and mean the command.
func Signals() []os.Signal {
	return []os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2}
}

// Signal passes a signal on, unless it is one that a terminal sends to all who are in
// front, and we are. That the command has ended is no error.
func (s *Sandbox) Signal(sig os.Signal) {
	if sig == unix.SIGINT || sig == unix.SIGQUIT {
		if tty, front := terminal(); tty != nil {
			tty.Close()
			if front == unix.Getpgrp() {
				return
			}
		}
	}
	_ = s.cmd.Process.Signal(sig)
}

// terminal is the one that controls us, nil for none, and the process group in front.
func terminal() (tty *os.File, front int) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, 0
	}
	return tty, inFront(tty)
}

// inFront is 0 where that is not known.
func inFront(tty *os.File) (group int) {
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	if err != nil {
		return 0
	}
	return group
}

// suspend follows a command that was suspended in front: a shell waits for us, not for
// the command, and continues us both. Who stops it from elsewhere will continue it.
func (s *Sandbox) suspend(unix.Signal) {
	tty, front := terminal()
	if tty == nil {
		return
	}
	defer tty.Close()
	own := unix.Getpgrp()
	group, err := unix.Getpgid(s.cmd.Process.Pid)
	if err != nil || front != own && front != group || !s.stopped() || !stop() {
		return
	}
	if group == own { // it was continued with us
		return
	}
	if inFront(tty) == own { // and not by bg
		_ = unix.IoctlSetPointerInt(int(tty.Fd()), unix.TIOCSPGRP, group)
	}
	_ = unix.Kill(-group, unix.SIGCONT)
}

// stopped tells whether the command is so still: where a terminal suspended both of us, it
// has gone on with us by the time that we see it.
func (s *Sandbox) stopped() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	_, state, _ := strings.Cut(string(stat), ") ")
	return err == nil && strings.HasPrefix(state, "T")
}

// stop suspends this process, and tells whether it was: the kernel does not where nobody
// would continue us. The signal is one that Go never handles.
func stop() (was bool) {
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, unix.SIGCONT)
	defer signal.Stop(continued)
	_ = unix.Kill(unix.Getpid(), unix.SIGTTIN)
	for range 2 { // the time of one may have run out meanwhile
		select {
		case <-continued:
			return true
		case <-time.After(100 * time.Millisecond):
		}
	}
	return false
}

const (
	lookAgain = 20 * time.Millisecond
	lastWait  = 2 * time.Second // for what was killed
)

// endRest ends what is left in a network: it would be there without one, and not know why.
func (s *Sandbox) endRest(network string) {
	patience := cmp.Or(s.cfg.Patience, process.DefaultPatience)
	told := map[int]bool{}
	for begin := time.Now(); time.Since(begin) < patience+lastWait; time.Sleep(lookAgain) {
		all := within(network)
		if len(all) == 0 {
			return
		}
		var names []string
		for _, pid := range all {
			switch {
			case time.Since(begin) > patience:
				_ = unix.Kill(pid, unix.SIGKILL)
			case !told[pid]:
				told[pid] = true
				names = append(names, named(pid))
				_ = unix.Kill(pid, unix.SIGTERM)
				_ = unix.Kill(pid, unix.SIGCONT) // the suspended hear nothing
			}
		}
		if len(names) > 0 && s.cfg.Leaves != nil {
			s.cfg.Leaves(names)
		}
	}
}

// within are the processes in a network.
func within(network string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			if its, err := os.Readlink(networkOf(pid)); err == nil && its == network {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func networkOf(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }

func named(pid int) string {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return fmt.Sprintf("%s (%d)", strings.TrimSpace(string(name)), pid)
}
