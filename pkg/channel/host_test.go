package channel_test

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

func TestMain(m *testing.M) { channeltest.Main(m) }

func TestHost(t *testing.T) {
	channeltest.RunNetwork(t, func(*testing.T) channel.Network { return &channel.Host{} })
}

// TestHostIdle: a flow that is silent ends; the next datagram begins another.
func TestHostIdle(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := &channel.Host{Idle: 50 * time.Millisecond}
	l, err := h.Listen(context.Background(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	far, err := net.Dial("udp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	for range 2 {
		far.Write([]byte("hello"))
		near, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		if n, err := near.Read(buf); err != nil || string(buf[:n]) != "hello" {
			t.Errorf("read %q, %v", buf[:n], err)
		}
		if _, err := near.Read(buf); err != io.EOF {
			t.Errorf("read of a silent flow: %v, want EOF", err)
		}
	}
}

// TestHostFamily: who listens at every address of one family is not reached by the other.
func TestHostFamily(t *testing.T) {
	for _, c := range []struct {
		at     string
		v4, v6 bool
	}{{"0.0.0.0:0", true, false}, {"[::]:0", false, true}, {":0", true, true}, {"127.0.0.1:0", true, false}} {
		for _, network := range []string{"tcp", "udp"} {
			l, err := (&channel.Host{}).Listen(t.Context(), network, c.at)
			if err != nil {
				t.Errorf("%s %s: %v", network, c.at, err)
				continue
			}
			_, port, _ := net.SplitHostPort(l.Addr().String())
			for host, want := range map[string]bool{"127.0.0.1": c.v4, "::1": c.v6} {
				if got := taken(network, net.JoinHostPort(host, port)); got != want {
					t.Errorf("%s %s takes port %s of %s: %v", network, c.at, port, host, got)
				}
			}
			l.Close()
		}
	}
}

// taken tells whether somebody else has that port of the address.
func taken(network, address string) bool {
	l, err := (&channel.Host{}).Listen(context.Background(), network, address)
	if err == nil {
		l.Close()
	}
	return errors.Is(err, syscall.EADDRINUSE)
}

// TestHostControl: every kind of socket is shown before it is used.
func TestHostControl(t *testing.T) {
	defer goleak.VerifyNone(t)
	no := errors.New("not this one")
	h := &channel.Host{Control: func(string, string, syscall.RawConn) error { return no }}
	for network, address := range map[string]string{"tcp": "127.0.0.1:1", "udp": "127.0.0.1:1", "ping": "127.0.0.1"} {
		if network == "ping" && runtime.GOOS == "darwin" {
			continue
		}
		_, err := h.DialContext(context.Background(), network, address)
		if network == "ping" && (errors.Is(err, syscall.EACCES) || errors.Is(err, errors.ErrUnsupported)) {
			continue // there is no such socket here
		}
		if !errors.Is(err, no) {
			t.Errorf("dial %s: %v", network, err)
		}
	}
	for _, network := range []string{"tcp", "udp"} {
		if _, err := h.Listen(context.Background(), network, "127.0.0.1:0"); !errors.Is(err, no) {
			t.Errorf("listen %s: %v", network, err)
		}
	}
}
