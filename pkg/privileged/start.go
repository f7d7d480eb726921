package privileged

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ErrNotPermitted says that root was not to be had. It is an os.ErrPermission.
var ErrNotPermitted = fmt.Errorf("root is needed for the network device, routes and DNS: %w", os.ErrPermission)

// World is what decides how the child is started.
type World struct {
	Self    string // this binary
	EUID    int
	Capable bool   // CAP_NET_ADMIN and CAP_NET_BIND_SERVICE, as file capabilities give
	Sudo    string // where sudo is, "" if nowhere
	Pkexec  string
	TTY     bool // a terminal to ask for a password on
	Display bool // a desktop to ask on
}

// verb is the hidden one by which the binary is the child.
const verb = "privileged"

// prompt is sudo's question, with its own %-words.
const prompt = "culvert makes a network device, routes and DNS settings as root. [sudo] password for %p: "

// Command decides how to start the child. Without anywhere to ask, sudo must do
// without.
func Command(w World) ([]string, error) {
	self := []string{w.Self, verb}
	switch {
	case w.EUID == 0, w.Capable:
		return self, nil
	case w.Sudo != "" && w.TTY:
		return append([]string{w.Sudo, "-p", prompt, "--"}, self...), nil
	case w.Pkexec != "" && (w.Display || w.TTY):
		return append([]string{w.Pkexec}, self...), nil
	case w.Sudo != "":
		return append([]string{w.Sudo, "-n", "--"}, self...), nil
	}
	return nil, fmt.Errorf("neither sudo nor pkexec is installed: %w", ErrNotPermitted)
}

// quietly is the same world with nobody to ask.
func (w World) quietly() World {
	w.TTY, w.Display = false, false
	return w
}

// notStarted tells why a child that was to be started never spoke. If root was
// asked for, it was refused.
func notStarted(command []string, said string, err error) error {
	if said != "" {
		err = errors.New(said)
	}
	if by := filepath.Base(command[0]); by == "sudo" || by == "pkexec" {
		return fmt.Errorf("start the privileged part: %w: %w", err, ErrNotPermitted)
	}
	return fmt.Errorf("start the privileged part: %w", err)
}
