package sshchan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// TestErrorsCross: said at one end, heard at the other.
func TestErrorsCross(t *testing.T) {
	kernel := func(e error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", e)}
	}
	for _, test := range []struct {
		far  error
		text string // as stock clients show it
		want error
	}{
		{kernel(syscall.ECONNREFUSED), "Connection refused", syscall.ECONNREFUSED},
		{kernel(syscall.EHOSTUNREACH), "No route to host", syscall.EHOSTUNREACH},
		{kernel(syscall.ENETUNREACH), "Network is unreachable", syscall.ENETUNREACH},
		{kernel(syscall.ETIMEDOUT), "Connection timed out", syscall.ETIMEDOUT},
		{kernel(syscall.EACCES), "Permission denied", syscall.EACCES},
		{context.DeadlineExceeded, "Connection timed out", syscall.ETIMEDOUT},
		{fmt.Errorf("node db-01: %w", syscall.ECONNREFUSED), "Connection refused", syscall.ECONNREFUSED},
		{fmt.Errorf("rule 3 forbids: %w", syscall.EACCES), "rule 3 forbids: permission denied", syscall.EACCES},
		{errors.New("something else"), "something else", nil},
	} {
		open := &ssh.OpenChannelError{Reason: reason(test.far), Message: wiring.Say(test.far)}
		if open.Message != test.text {
			t.Errorf("%v is said as %q, want %q", test.far, open.Message, test.text)
		}
		got := refused(open, "db:1")
		if test.want != nil && !errors.Is(got, test.want) {
			t.Errorf("%v is heard as %v, want %v", test.far, got, test.want)
		}
		if test.want == nil && got.Error() != test.text {
			t.Errorf("%v is heard as %v", test.far, got)
		}
		if strings.HasPrefix(test.text, "rule") && !strings.Contains(got.Error(), "rule 3") {
			t.Errorf("%v lost its words: %v", test.far, got)
		}
	}
}
