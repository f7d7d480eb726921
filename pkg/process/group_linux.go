package process

import (
	"os"
	"strconv"
	"strings"
	"syscall"
)

// dieWithParent has the kernel tell the command of our end.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGTERM }

// allDead: who is left in the group only waits for its parent to see that it
// has ended. The first process of a container may never look.
func allDead(group int) bool {
	proc, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return false
	}
	for _, name := range names {
		if _, err := strconv.Atoi(name); err == nil && livesIn(name, group) {
			return false
		}
	}
	return true
}

func livesIn(pid string, group int) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return false
	}
	// The command's name is in parentheses and may hold anything. After it:
	// state, parent, group.
	text := string(stat)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	return len(fields) > 2 && fields[2] == strconv.Itoa(group) && fields[0] != "Z" && fields[0] != "X"
}
