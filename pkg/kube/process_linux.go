package kube

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machineID names this machine, this boot of it, and the namespace that its
// process ids are of.
func machineID() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	namespace, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	machine, _ := os.ReadFile("/etc/machine-id") // not everywhere; the boot's id is random
	return strings.TrimSpace(string(machine)) + " " + strings.TrimSpace(string(boot)) + " " + namespace
}

// unseen tells a process that is not there from one that /proc hides: mounted
// with hidepid, it does not show the processes of other users.
func unseen(pid int, err error) error {
	if errors.Is(err, os.ErrNotExist) && unix.Kill(pid, 0) != unix.ESRCH {
		return fmt.Errorf("process %d is hidden", pid)
	}
	return err
}

// processStart is the clock tick of the boot at which a process started. A
// zombie has ended: it only waits to be told so.
func processStart(pid int) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, unseen(pid, err)
	}
	// The command's name is in parentheses and may hold anything.
	text := string(stat)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("process %d: unreadable stat", pid)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, os.ErrNotExist
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
