package signalling

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// FuzzMessage: what is said is what is read, and nothing is read beyond it.
func FuzzMessage(f *testing.F) {
	f.Add(byte(msgDial), uint32(0), "tcp", "web.shop:80", []byte("rest"))
	f.Add(byte(msgNo), uint32(prohibited), "", "", []byte{})
	f.Fuzz(func(t *testing.T, kind byte, number uint32, a, b string, rest []byte) {
		m := message{kind, number, a, b}
		said, err := m.append(nil)
		if err != nil {
			if len(a)+len(b) < mostMessage-leastMessage {
				t.Fatal(err)
			}
			return
		}
		wire := bytes.NewBuffer(append(said, rest...))
		got, err := readMessage(wire)
		if err != nil || got != m {
			t.Fatalf("%+v, %v; want %+v", got, err, m)
		}
		if !bytes.Equal(wire.Bytes(), rest) {
			t.Fatalf("%d bytes are left, want %d", wire.Len(), len(rest))
		}
	})
}

// FuzzMessageIn: whatever comes is a message, or an error.
func FuzzMessageIn(f *testing.F) {
	yes, _ := message{kind: msgYes, a: "127.0.0.1:80"}.append(nil)
	f.Add(yes)
	f.Add([]byte{0, 7, 'd', 0, 0, 0, 0, 0xff, 0xff})
	f.Add([]byte{0, 6, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, stream []byte) {
		src := bytes.NewReader(stream)
		m, err := readMessage(src)
		if err == nil {
			if again, err := m.append(nil); err != nil || !bytes.Equal(again, stream[:len(stream)-src.Len()]) {
				t.Fatalf("%x is read as %x", stream, again)
			}
		} else if err != errMessage && err != io.EOF && err != io.ErrUnexpectedEOF {
			t.Fatal(err)
		}
	})
}

// TestErrorsCross: said at one end, heard at the other, by an answer or a reset.
func TestErrorsCross(t *testing.T) {
	kernel := func(e error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", e)}
	}
	for _, test := range []struct {
		far           error
		answer, reset error
	}{
		{kernel(syscall.ECONNREFUSED), syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{kernel(syscall.EHOSTUNREACH), syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{kernel(syscall.ETIMEDOUT), syscall.ETIMEDOUT, syscall.ETIMEDOUT},
		{kernel(syscall.EACCES), syscall.EACCES, syscall.EACCES},
		{context.DeadlineExceeded, syscall.ETIMEDOUT, syscall.ECONNRESET},
		{fmt.Errorf("rule 3 forbids: %w", syscall.EACCES), syscall.EACCES, syscall.EACCES},
		{net.ErrClosed, nil, syscall.ECONNRESET},
		{errors.New(strings.Repeat("long ", mostMessage)), nil, syscall.ECONNRESET},
	} {
		said, err := refusal(test.far).append(nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := readMessage(bytes.NewReader(said))
		if err != nil {
			t.Fatal(err)
		}
		got := m.refused("db:1")
		if got == nil || test.answer != nil && !errors.Is(got, test.answer) {
			t.Errorf("%v is heard as %v", test.far, got)
		}
		if strings.HasPrefix(test.far.Error(), "rule") && !strings.Contains(got.Error(), "rule 3") {
			t.Errorf("%v lost its words: %v", test.far, got)
		}
		if got := wiring.Coded(wiring.Code(test.far)); got != test.reset {
			t.Errorf("%v is reset as %v", test.far, got)
		}
	}
	for _, c := range []uint32{wiring.Closed, 1, 1000} {
		if got := wiring.Coded(c); got != syscall.ECONNRESET {
			t.Errorf("code %d is %v", c, got)
		}
	}
}
