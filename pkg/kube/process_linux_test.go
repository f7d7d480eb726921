package kube

import (
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A process that /proc hides is not taken for dead.
func TestHiddenProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount /proc with hidepid")
	}
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = child.Wait() }()
	defer child.Process.Kill()
	self := Self()
	h := self
	h.PID = child.Process.Pid
	h.Start, _ = processStart(h.PID)
	verdicts := make(chan verdict)
	failed := make(chan error, 1)
	go func() {
		defer close(verdicts)
		runtime.LockOSThread() // and never unlocked: the thread ends with us
		if err := hideOthers(); err != nil {
			failed <- err
			return
		}
		verdicts <- judgeHere(h, self, processStart)
		h.PID = 1 << 22 // beyond the highest there is
		verdicts <- judgeHere(h, self, processStart)
	}()
	hidden, ok := <-verdicts
	if !ok {
		t.Skipf("processes cannot be hidden here: %v", <-failed)
	}
	if none := <-verdicts; hidden != unknown || none != dead {
		t.Errorf("hidden: %s, none: %s", hidden, none)
	}
}

// hideOthers makes this thread one of a user who sees no others' processes.
func hideOthers() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// Before 5.8 the option would hold for every mount of it.
	if err := unix.Mount("proc", "/proc", "proc", 0, "hidepid=invisible"); err != nil {
		return err
	}
	const nobody = 65534
	for _, call := range [][4]uintptr{ // of this thread only; the group 0 would see all
		{unix.SYS_SETGROUPS, 0, 0, 0},
		{unix.SYS_SETRESGID, nobody, nobody, nobody},
		{unix.SYS_SETRESUID, nobody, nobody, nobody},
	} {
		if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
			return errno
		}
	}
	return nil
}
