package wiring

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
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

// Say puts an error into words for the other end.
func Say(err error) string {
	var name *net.DNSError
	switch {
	case errors.As(err, &name) && name.IsNotFound:
		return unknownName
	case name != nil:
		return noAnswer
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded): // of a dial, the one or the other
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

// Hear is the error behind the words of the other end.
func Hear(text, name string) error {
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

// Wordy is an errno with the words that came along.
func Wordy(text string, errno syscall.Errno) error {
	if err := Hear(text, ""); errors.Is(err, errno) || text == "" {
		return errno
	}
	return fmt.Errorf("%s (%w)", text, errno)
}

// codes are what the end of a flow tells: the place of an error in the list.
var codes = []error{
	nil, // closed
	syscall.ECONNRESET,
	syscall.ECONNREFUSED,
	syscall.EHOSTUNREACH,
	syscall.ENETUNREACH,
	syscall.ETIMEDOUT,
	syscall.EACCES,
	syscall.EMSGSIZE,
	syscall.ENOBUFS, // a hub's, of which too much waits
}

// Closed is the code of an end in good order.
const Closed = 0

// Code is that of the reason for which a flow is broken off.
func Code(reason error) uint32 {
	for i, err := range codes {
		if err != nil && errors.Is(reason, err) {
			return uint32(i)
		}
	}
	return 1
}

// Coded is the error behind a code.
func Coded(code uint32) error {
	if code == Closed || code >= uint32(len(codes)) {
		return syscall.ECONNRESET
	}
	return codes[code]
}
