package kube

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// machineID names this boot of this machine.
func machineID() string {
	boot, err := unix.Sysctl("kern.bootsessionuuid")
	if err != nil {
		return ""
	}
	return boot
}

// processStart is the time at which a process started, in microseconds.
func processStart(pid int) (uint64, error) {
	info, err := unix.SysctlKinfoProc("kern.proc.pid", pid)
	if err != nil {
		// The kernel answers nothing at all for a process that is not there,
		// which the library reports as EIO.
		if unix.Kill(pid, 0) == unix.ESRCH {
			return 0, os.ErrNotExist
		}
		return 0, fmt.Errorf("process %d: %w", pid, err)
	}
	const zombie = 5
	if info.Proc.P_stat == zombie {
		return 0, os.ErrNotExist
	}
	at := info.Proc.P_starttime
	return uint64(at.Sec)*1e6 + uint64(at.Usec), nil
}
