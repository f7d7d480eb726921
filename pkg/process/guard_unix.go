//go:build unix

package process

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// guardScript reads the group's number, and a word when all is well. When there
// is no word the pipe's other end has died. $1 is a time in seconds, for each of
// the signals that follow.
const guardScript = `
read -r group || exit 0
read -r word && exit 0
seconds=$1
shift
for signal do
	kill -s "$signal" -- "-$group" || exit 0
	kill -s CONT -- "-$group"
	n=0
	while [ "$n" -lt "$seconds" ] && kill -s 0 -- "-$group"; do
		sleep 1
		n=$((n + 1))
	done
done
`

// A Guard ends a process group when this process is gone, however that came. It is
// in a session of its own, where no terminal's signal reaches it. Run has its own.
type Guard struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

// StartGuard starts one, before what it is to guard. patience is how long the group
// may take to end before it is killed; with 0 it is killed at once. The guard has
// the files open until it has done that, or is dismissed: a lock on one is held as long.
func StartGuard(patience time.Duration, files ...*os.File) (*Guard, error) {
	steps := []string{"0", "KILL"}
	if patience > 0 {
		steps = []string{strconv.Itoa(max(1, int(patience/2/time.Second))), "TERM", "HUP", "KILL"}
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", guardScript, "culvert-guard"}, steps...)...)
	cmd.Env, cmd.Dir = []string{"PATH=/usr/bin:/bin"}, "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	cmd.ExtraFiles = files
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start its guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start its guard: %w", err)
	}
	return &Guard{cmd: cmd, pipe: pipe}, nil
}

// Watch names the group. A guard that somebody has killed guards nothing, but
// that is no reason to end the command.
func (g *Guard) Watch(group int) { fmt.Fprintln(g.pipe, group) }

// Dismiss: there is nothing to guard any more, or never was. Once more does nothing.
func (g *Guard) Dismiss() {
	fmt.Fprintln(g.pipe, "done")
	fmt.Fprintln(g.pipe, "done")
	g.pipe.Close()
	_ = g.cmd.Wait()
}
