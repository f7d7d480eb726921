//go:build unix

package openssh

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// folderOf is the pattern of a control socket's folder: it names the process, so that
// one that was killed while ssh asked its questions is known by it.
func folderOf(pid int) string { return fmt.Sprintf("culvert-ssh-%d-*", pid) }

// sweep removes the folders of processes that are gone.
func sweep() {
	found, _ := filepath.Glob(filepath.Join(os.TempDir(), "culvert-ssh-*"))
	for _, dir := range found {
		owner, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), "culvert-ssh-"), "-")
		pid, err := strconv.Atoi(owner)
		if err == nil && pid > 0 && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			_ = os.RemoveAll(dir) // that of somebody else stays
		}
	}
}

// controlling is the terminal that ssh asks its questions on, nil without one.
func controlling() *os.File {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	return tty
}

func stdin(terminal *os.File) io.Reader {
	if terminal == nil {
		return nil
	}
	return terminal
}
