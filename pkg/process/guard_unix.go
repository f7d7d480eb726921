//go:build unix

package process

import (
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// guardScript reads the group's number, and a word when all is well. When there
// is no word the pipe's other end has died. $1 is a time in seconds.
const guardScript = `
read -r group || exit 0
read -r word && exit 0
for signal in TERM HUP KILL; do
	kill -s "$signal" -- "-$group" || exit 0
	kill -s CONT -- "-$group"
	n=0
	while [ "$n" -lt "$1" ] && kill -s 0 -- "-$group"; do
		sleep 1
		n=$((n + 1))
	done
done
`

// A guard ends a group when this process is gone. It is in a session of its
// own, where no terminal's signal reaches it.
type guard struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

func startGuard(patience time.Duration) (*guard, error) {
	half := max(1, int(patience/2/time.Second))
	cmd := exec.Command("/bin/sh", "-c", guardScript, "culvert-guard", strconv.Itoa(half))
	cmd.Env, cmd.Dir = []string{"PATH=/usr/bin:/bin"}, "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start its guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start its guard: %w", err)
	}
	return &guard{cmd: cmd, pipe: pipe}, nil
}

// watch names the group. A guard that somebody has killed guards nothing, but
// that is no reason to end the command.
func (g *guard) watch(group int) { fmt.Fprintln(g.pipe, group) }

// dismiss: there is nothing to guard any more, or never was.
func (g *guard) dismiss() {
	fmt.Fprintln(g.pipe, "done")
	fmt.Fprintln(g.pipe, "done")
	g.pipe.Close()
	_ = g.cmd.Wait()
}
