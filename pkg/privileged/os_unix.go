//go:build unix

package privileged

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
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

// socketpair returns our end, and the child's to be.
func socketpair() (*net.UnixConn, *os.File, error) {
	syscall.ForkLock.RLock() // so that nobody else's child inherits them
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "privileged"), os.NewFile(uintptr(fds[1]), "user")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

func sendFiles(conn *net.UnixConn, frame []byte, files []*os.File) (int, error) {
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			if err := withFD(f, func(fd int) error { fds[i] = fd; return nil }); err != nil {
				return 0, err
			}
		}
		rights = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(frame, rights, nil)
	return n, err
}

// receiveFiles reads some bytes and the descriptors that came with them.
func receiveFiles(conn *net.UnixConn, buf []byte) (int, []*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return n, nil, err
	}
	files, err := parseFiles(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = errors.New("too many descriptors")
	case n == 0:
		err = io.EOF
	}
	return n, files, err
}

func parseFiles(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// withFD lends the descriptor of f. Fd would make it blocking, for all who
// share it.
func withFD(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = raw.Control(func(fd uintptr) { doErr = do(int(fd)) })
	return errors.Join(err, doErr)
}

// rawFD is a descriptor that the runtime's poller does not know.
type rawFD int

func (fd rawFD) Close() error { return unix.Close(int(fd)) }

func duplicate(f *os.File) (copy rawFD, err error) {
	err = withFD(f, func(fd int) error {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		copy = rawFD(n)
		return err
	})
	return copy, err
}
