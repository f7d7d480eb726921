package sshchan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/crypto/ssh"
)

// errnos are the errors that keep their meaning over the wire, with the words
// that OpenSSH has for them: what strerror says.
var errnos = []struct {
	err  error
	text string
}{
	{syscall.ECONNREFUSED, "Connection refused"},
	{syscall.EHOSTUNREACH, "No route to host"},
	{syscall.ENETUNREACH, "Network is unreachable"},
	{syscall.ETIMEDOUT, "Connection timed out"},
	{syscall.ETIMEDOUT, "Operation timed out"}, // as other systems say it
	{syscall.ECONNRESET, "Connection reset by peer"},
	{syscall.EADDRINUSE, "Address already in use"},
	{syscall.EADDRNOTAVAIL, "Cannot assign requested address"},
	{syscall.EACCES, "Permission denied"},
	{syscall.EMSGSIZE, "Message too long"},
}

// What getaddrinfo says of a name.
const (
	unknownName = "Name or service not known"
	noAnswer    = "Temporary failure in name resolution"
)

// say puts an error into words for the other end.
func say(err error) string {
	var name *net.DNSError
	switch {
	case errors.As(err, &name) && name.IsNotFound:
		return unknownName
	case name != nil:
		return noAnswer
	case errors.Is(err, context.DeadlineExceeded):
		return "Connection timed out"
	case errors.Is(err, syscall.EACCES) && !plain(err):
		return err.Error() // a policy's words, which name its rule
	}
	for _, e := range errnos {
		if errors.Is(err, e.err) {
			return e.text
		}
	}
	return err.Error()
}

// plain tells a kernel's word from one that has more to say.
func plain(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		err = sys.Err
	}
	_, ok := err.(syscall.Errno)
	return ok
}

// hear is the error behind the words of the other end.
func hear(text, name string) error {
	switch text {
	case unknownName:
		return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	case noAnswer:
		return &net.DNSError{Err: "no answer", Name: name, IsTemporary: true}
	}
	for _, e := range errnos {
		if text == e.text {
			return e.err
		}
	}
	return errors.New(text)
}

// reason is the kind of a refused dial.
func reason(err error) ssh.RejectionReason {
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		return ssh.Prohibited
	}
	return ssh.ConnectionFailed
}

// refused is the near end's error of a dial that the far end refused.
func refused(err error, name string) error {
	var open *ssh.OpenChannelError
	if !errors.As(err, &open) {
		return err
	}
	if open.Reason == ssh.Prohibited {
		return wordy(open.Message, syscall.EACCES)
	}
	return hear(open.Message, name)
}

// wordy is an errno with the words that came along.
func wordy(text string, errno syscall.Errno) error {
	if err := hear(text, ""); errors.Is(err, errno) || text == "" {
		return errno
	}
	return fmt.Errorf("%s (%w)", text, errno)
}
