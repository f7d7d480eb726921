// Package sandbox runs a command in network and mount namespaces of its own, as an
// ordinary user: a user namespace gives the right to make the others, and goes with the
// rest when the last process of the command has ended. All packets of the command come
// out of a TUN whose descriptor is in this process, so that a network stack here decides
// where they lead. Nothing of the rest of the machine changes, and several sandboxes know
// nothing of each other.
//
// # The way up
//
// The child is this binary again (Main), started in the new namespaces with the few
// capabilities it needs. It makes the device and its routes, mounts a resolv.conf over
// the machine's, hands over the descriptors (fdpass), drops the capabilities, and becomes
// the command by exec. So the command is our own child, in our own process group, with
// our terminal, files, environment, folder and user: a shell's job control, a pipe's end
// and an exit code need nobody in between, as with env(1). When this process dies the
// kernel closes the device, and tells the command by SIGTERM.
//
// What a shell would do for a child of its own is done here: descriptors that were meant
// for the command (make's jobserver, a socket of systemd's) are handed on in their places,
// signals that are ignored stay so (Go tells us of SIGHUP and SIGINT; the others are as
// usual), a file without "#!" is /bin/sh's, and when the command is suspended so are we.
// What it leaves behind is ended with it.
//
// Its user is mapped to itself and nobody else is mapped, as nothing more is allowed to
// who is not root: files of others belong to nobody in there, and sudo does not work.
// Root needs no user namespace, and has none, to stay root.
//
// # 127.0.0.1
//
// The command is to find the machine's services on 127.0.0.1 as before, and its own
// processes there, too. Linux has one loopback in each network namespace, and no rule
// that could look for a listener first: packets to 127.0.0.0/8 are sent by the device
// (tun.Link.TakeAll). Here the namespace's table of sockets is asked about each of them
// (sock_diag(7), over a socket that was made in there): what is for a socket inside goes
// back in as it is, and anything else is a flow like others, dialed before it is
// answered. What was tried or thought of instead: listeners inside for all ports that are
// bound outside accept before anybody has dialed, and have to guess when to look again;
// NFQUEUE and nftables need modules that not every kernel has, and nobody loads from
// here; seccomp's notifications would hand over sockets of the machine itself, and race
// with threads. ::1 cannot be had so (the kernel drops it from any device) and is inside
// only; "localhost" is tried there as 127.0.0.1, too.
//
// # Names
//
// Where libraries would ask daemons on Unix sockets, whom no network namespace keeps
// away, these are hidden: nscd, and systemd-resolved, which nss-resolve asks before
// resolv.conf is read; it then counts as not there. The mount over resolv.conf is lost
// where another program puts a new file into the place of that below it; so who has the
// packets should answer what is asked of the machine's own nameservers as well.
// Abstract Unix sockets belong to a network namespace, so those of the machine are not there.
package sandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os/exec"
	"time"
)

// Config says what to run, and in what network.
type Config struct {
	Path string   // of the command; see Look
	Args []string // its name first
	Env  []string // nil: ours

	Stdin          io.Reader
	Stdout, Stderr io.Writer

	MTU        int
	Addrs      []netip.Addr // of the device
	ResolvConf []byte       // what /etc/resolv.conf says inside, where there is one

	// Leaves, if set, is told what the command has left behind, which is ended then, and
	// killed after Patience; 0 is process.DefaultPatience.
	Leaves   func(names []string)
	Patience time.Duration
}

// A RefusedError says what of this machine stands in the way of a sandbox.
type RefusedError struct {
	Why   string
	Allow string // a command that changes it, "" if none is known
	Err   error
}

func (e *RefusedError) Error() string { return e.Why + ": " + e.Err.Error() }
func (e *RefusedError) Unwrap() error { return e.Err }

// An ExecError is a command that there is not, or that cannot be run.
type ExecError struct {
	Name string
	Err  error
}

func (e *ExecError) Error() string { return fmt.Sprintf("run %s: %v", e.Name, e.Err) }
func (e *ExecError) Unwrap() error { return e.Err }

// Code is what a shell ends with in its place.
func (e *ExecError) Code() int {
	if errors.Is(e.Err, exec.ErrNotFound) || errors.Is(e.Err, fs.ErrNotExist) {
		return 127
	}
	return 126
}

// Look finds a command as a shell does.
func Look(name string) (path string, err error) {
	path, err = exec.LookPath(name)
	if err == nil || errors.Is(err, exec.ErrDot) { // who has "." in PATH wants it
		return path, nil
	}
	var why *exec.Error
	if errors.As(err, &why) {
		err = why.Err
	}
	return "", &ExecError{name, err}
}

// verb is the hidden one by which the binary is the child.
const verb = "sandbox"

// order is what the child is to make.
type order struct {
	MTU        int
	Addrs      []netip.Addr
	ResolvConf []byte
}

// answer comes with the descriptors of the device and of the table of sockets.
type answer struct {
	Error  string `json:",omitempty"`
	Denied bool   `json:",omitempty"` // the error is one of rights
}
