package sshchan

import (
	"errors"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

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
		return wiring.Wordy(open.Message, syscall.EACCES)
	}
	return wiring.Hear(open.Message, name)
}
