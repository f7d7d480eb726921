//go:build unix

package privileged

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/fdpass"
)

// Main is the child: Serve on standard input, deaf to every signal that a
// terminal or a dying parent sends. Those end the user's side, and its end is
// what counts.
func Main(log *slog.Logger) error {
	// SIGPIPE too: a log line to a stderr that died with the parent must not
	// end the undo.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	unix.Setsid() // fails for a group's leader, who is deaf anyway
	conn, err := stdin()
	if err != nil {
		return err
	}
	return Serve(context.Background(), conn, log)
}

func stdin() (*net.UnixConn, error) {
	conn, err := net.FileConn(os.Stdin)
	if err != nil {
		return nil, fmt.Errorf("standard input is not culvert's socket (this is started by culvert itself; sudo must not log its input): %w", err)
	}
	// The original would keep the socket open after conn is closed.
	if err := os.Stdin.Close(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if u, ok := conn.(*net.UnixConn); ok {
		return u, nil
	}
	return nil, errors.Join(errors.New("standard input is not a Unix socket"), conn.Close())
}

// Look sees the World of this process.
func Look() World {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	sudo, _ := exec.LookPath("sudo")
	pkexec, _ := exec.LookPath("pkexec")
	return World{
		Self:    self,
		EUID:    os.Geteuid(),
		Capable: capable(),
		Sudo:    sudo,
		Pkexec:  pkexec,
		TTY:     hasTTY(),
		Display: os.Getenv("DISPLAY") != "" || os.Getenv("WAYLAND_DISPLAY") != "",
	}
}

// hasTTY tells whether sudo could ask: it reads the terminal, not its input.
func hasTTY() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	return tty.Close() == nil
}

// rawFD is a descriptor that the runtime's poller does not know.
type rawFD int

func (fd rawFD) Close() error { return unix.Close(int(fd)) }

func duplicate(f *os.File) (copy rawFD, err error) {
	err = fdpass.Lend(f, func(fd int) error {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		copy = rawFD(n)
		return err
	})
	return copy, err
}
