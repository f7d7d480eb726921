package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hosts dials real sockets under other names, and nothing else: an address, or the error
// of a dial.
type hosts map[string]any

func (h hosts) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	switch to := h[network+" "+address].(type) {
	case string:
		return (&channel.Host{}).DialContext(ctx, network, to)
	case error:
		return nil, to
	}
	return nil, &net.DNSError{Err: "no such host", Name: address, IsNotFound: true}
}

// serve runs a proxy until the test ends, and sees that it then ends.
func serve(t *testing.T, run func(context.Context, net.Listener, relay.Dialer) error, to hosts) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, l, to) }()
	t.Cleanup(func() {
		stop()
		select {
		case err := <-ended:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("the proxy ended with %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("the proxy did not end")
		}
	})
	return l.Addr().String()
}

// echo says hello, and then what it hears, until there is no more.
func echo(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		relay.Serve(ctx, l, func(ctx context.Context, c net.Conn) {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			io.WriteString(c, "hello ")
			io.Copy(c, c)
		})
	}()
	t.Cleanup(func() { stop(); <-ended })
	return l.Addr().String()
}

// echoUDP sends each datagram back, with a word before it.
func echoUDP(t *testing.T, word string) (address string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 65535)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(append([]byte(word+" "), buf[:n]...), from)
		}
	}()
	t.Cleanup(func() { pc.Close(); <-ended })
	return pc.LocalAddr().String()
}

func dialTo(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(5 * time.Second))
	return c.(*net.TCPConn)
}
