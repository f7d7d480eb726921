package sshchan

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// to dials where address says.
type to func() string

func (f to) DialContext(ctx context.Context, network, _ string) (net.Conn, error) {
	var h channel.Host
	return h.DialContext(ctx, network, f())
}

// TestStockClientRemoteRefused: an OpenSSH that cannot reach its target refuses
// the channel, and so it does with a name that only it knows.
func TestStockClientRemoteRefused(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	n := &announced{at: make(chan string, 1)}
	cmd := s.ssh(t, s.serveStock(t, n), "-N", "-R", "web:80:127.0.0.1:"+freePort(t))
	run(t, cmd)
	receive(t, n.at)
	if _, err := n.DialContext(within(t), "tcp", "web:80"); err == nil {
		t.Error("a refused dial was taken")
	}
}

// TestStockClientRemoteTaken: the same, when somebody is there.
func TestStockClientRemoteTaken(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	n := &announced{at: make(chan string, 1)}
	cmd := s.ssh(t, s.serveStock(t, n), "-N", "-R", "web:80:"+channeltest.ServeTCP(t, channeltest.Echo))
	run(t, cmd)
	receive(t, n.at)
	for range 3 {
		c, err := n.DialContext(within(t), "tcp", "web:80")
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c)
	}
}

// announced tells when somebody listens.
type announced struct {
	memchan.Network
	at chan string
}

func (a *announced) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := a.Network.Listen(ctx, network, address)
	a.at <- address
	return l, err
}

// TestStockServerForward: a stock server's clients are accepted before anybody
// is asked; a refusal is a connection that ends.
func TestStockServerForward(t *testing.T) {
	channeltest.NoLeak(t)
	ch := newStock(t).dialSSHD(t)
	l, err := ch.Listen(within(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := "127.0.0.1:" + freePort(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- relay.Forward(ctx, l, to(func() string { return address }), "tcp", "") }()
	far := "127.0.0.1:" + portText(l.Addr().String())
	c, err := net.Dial("tcp", far)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	if b, err := io.ReadAll(c); len(b) > 0 || errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	cancel()
	<-done
}

// BenchmarkForward is a router's way to a laptop and back: dialled in memory,
// or at a listening socket, over the wire, relayed to a local socket.
func BenchmarkForward(b *testing.B) {
	b.Run("memory", func(b *testing.B) { benchForward(b, &memchan.Network{}, "web:80") })
	b.Run("kernel", func(b *testing.B) { benchForward(b, &channel.Host{}, "127.0.0.1:0") })
}

const benchChunk = 1 << 20

func benchForward(b *testing.B, n channel.Network, at string) {
	near, far := tcpPipe(b)
	ch := connect(b, near, far, n)
	l, err := ch.Listen(context.Background(), "tcp", at)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	address := channeltest.ServeTCP(b, channeltest.Echo)
	go relay.Forward(ctx, l, to(func() string { return address }), "tcp", "")
	c, err := n.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, benchChunk)
	b.Run("RoundTrip", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c.Write(buf[:1])
			c.Read(buf)
		}
	})
	b.Run("Echo1M", func(b *testing.B) {
		b.SetBytes(benchChunk)
		got := make([]byte, benchChunk)
		for b.Loop() {
			go c.Write(buf)
			if _, err := io.ReadFull(c, got); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Dial", func(b *testing.B) {
		for b.Loop() {
			c, err := n.DialContext(ctx, "tcp", l.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			c.Write(buf[:1])
			c.Read(buf[:1])
			c.Close()
		}
	})
}
