//go:build unix

package process

import (
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// A terminal is the one that we and the command share; nil is none. At any time
// one process group is in front: it gets what is typed, and Ctrl-C and Ctrl-Z. We
// are, until the command asks for it.
type terminal struct {
	fd      int
	own     int         // our process group
	group   int         // the command's
	state   *term.State // as it was
	wanted  bool        // the command has asked for it, and is to be in front when we are
	held    bool        // it was put in front
	stopped unix.Signal // what it was suspended by, and is still
}

// terminalOf is that of stdin, if it is the one that controls us.
func terminalOf(stdin io.Reader) *terminal {
	in, ok := stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil
	}
	t := &terminal{fd: int(in.Fd()), own: unix.Getpgrp()}
	if _, err := t.front(); err != nil {
		return nil
	}
	t.state, _ = term.GetState(t.fd)
	return t
}

func (t *terminal) front() (group int, err error) { return unix.IoctlGetInt(t.fd, unix.TIOCGPGRP) }

// ours: we are in front.
func (t *terminal) ours() bool {
	group, err := t.front()
	return err == nil && group == t.own
}

// put puts a group in front. From behind that would suspend us.
func (t *terminal) put(group int) error {
	signal.Ignore(unix.SIGTTOU)
	defer signal.Reset(unix.SIGTTOU)
	return unix.IoctlSetPointerInt(t.fd, unix.TIOCSPGRP, group)
}

// lead names the command's group.
func (t *terminal) lead(group int) {
	if t != nil {
		t.group = group
	}
}

// take puts us in front again.
func (t *terminal) take() {
	if t != nil && t.held {
		_ = t.put(t.own)
		t.held = false
	}
}

// settle: the command will not ask any more.
func (t *terminal) settle() {
	if t != nil {
		t.take()
		t.wanted = false
	}
}

// restore gives the terminal its settings back, which a killed editor cannot.
func (t *terminal) restore() {
	if t != nil && t.state != nil && t.ours() {
		_ = term.Restore(t.fd, t.state)
	}
}

// meant are the signals of a terminal to who is in front that are for the command.
// Ctrl-C is not among them.
var meant = []os.Signal{unix.SIGTSTP, unix.SIGQUIT, unix.SIGWINCH}

// listen tells what it says to us.
func (t *terminal) listen() (said <-chan os.Signal, stop func()) {
	if t == nil {
		return nil, func() {}
	}
	to := make(chan os.Signal, 4)
	signal.Notify(to, meant...)
	return to, func() { signal.Stop(to) }
}

// suspend follows the command: it was suspended by Ctrl-Z, or because it used
// the terminal from behind. Unless we can put it in front we are suspended too,
// so that our shell takes over. Where nobody would continue us the kernel does
// not suspend; whether it did is only seen by what follows.
func (t *terminal) suspend(by unix.Signal, continued <-chan os.Signal) {
	asks := by == unix.SIGTTIN || by == unix.SIGTTOU
	if t == nil || by != unix.SIGTSTP && !asks {
		return // who stops it by other means will continue it
	}
	t.stopped = by
	t.wanted = t.wanted || asks
	if !asks || !t.ours() {
		t.take()
		_ = unix.Kill(0, unix.SIGTTIN) // Go keeps its handler of a signal that it has once had
		select {
		case <-continued:
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.resume()
}

// resume continues the command, in front if we are. What asked for the terminal
// goes on only there.
func (t *terminal) resume() {
	if t == nil {
		return
	}
	ours := t.ours()
	if ours && t.wanted && t.put(t.group) == nil {
		t.held = true
	}
	if t.stopped != 0 && (ours || t.stopped == unix.SIGTSTP) {
		t.stopped = 0
		_ = unix.Kill(-t.group, unix.SIGCONT)
	}
}
