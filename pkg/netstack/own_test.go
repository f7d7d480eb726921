package netstack_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/netstack"
)

var own1, own2 = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")

// tunnelled are two stacks, each with an address of its own, behind one another.
func tunnelled(t *testing.T, network channel.Network) (near, far *netstack.Stack, stop func()) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	a, b := newPipe(), newPipe()
	a.in, b.in = b.out, a.out
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	run := func(d netstack.Device, own []netip.Addr, n channel.Network) *netstack.Stack {
		s, err := netstack.New(netstack.Config{Device: d, MTU: 1400, Network: n, Own: own, Remote: true})
		if err != nil {
			t.Fatal(err)
		}
		go func() { ended <- s.Run(ctx) }()
		return s
	}
	near, far = run(a, []netip.Addr{own1, app4}, nil), run(b, []netip.Addr{own2}, network)
	stop = func() {
		cancel()
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Errorf("Run: %v", err)
			}
		}
		ended <- nil
		ended <- nil
	}
	t.Cleanup(func() {
		stop()
		goleak.VerifyNone(t, before)
	})
	return near, far, stop
}

// TestOwn: a stack dials and listens at its own addresses, and what is not its own is
// dialed on the Network.
func TestOwn(t *testing.T) {
	n := &memchan.Network{}
	near, far, stop := tunnelled(t, n)
	web, err := n.Listen(t.Context(), "tcp", "[fd00:10:96::10]:80")
	if err != nil {
		t.Fatal(err)
	}
	defer web.Close()
	l, err := far.Listen(t.Context(), "tcp", "[fd00::2]:80")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{l, web} {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { io.Copy(c, c); c.Close() }()
			}
		}()
	}
	near.SetMTU(1300)
	conns := map[string]net.Conn{"[fd00::2]:80": nil, "[fd00:10:96::10]:80": nil}
	for address := range conns {
		if conns[address], err = near.DialContext(t.Context(), "tcp", address); err != nil {
			t.Fatal(err)
		}
		hello(t, conns[address])
	}
	far.Reset()
	hello(t, conns["[fd00::2]:80"])
	if _, err := conns["[fd00:10:96::10]:80"].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want ECONNRESET", err)
	}
	stop()
	if _, err := conns["[fd00::2]:80"].Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read: %v, want an error", err)
	}
	if _, err := near.DialContext(t.Context(), "tcp", "[fd00::2]:80"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v, want net.ErrClosed", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v, want net.ErrClosed", err)
	}
}

func hello(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Errorf("%s: %v", c.RemoteAddr(), err)
	}
	c.SetDeadline(time.Time{})
}

// TestOwnErrors: they are the kernel's, as far as gVisor tells them apart.
func TestOwnErrors(t *testing.T) {
	near, far, _ := tunnelled(t, failing{syscall.EHOSTUNREACH})
	for address, want := range map[string]error{
		"[fd00::2]:81": syscall.ECONNREFUSED, "[fd00:10:96::10]:80": syscall.ENETUNREACH, "10.96.0.10:80": syscall.EHOSTUNREACH,
	} {
		if _, err := near.DialContext(t.Context(), "tcp", address); !errors.Is(err, want) {
			t.Errorf("dial %s: %v, want %v", address, err, want)
		}
		c, err := near.DialContext(t.Context(), "udp", address)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		c.Write([]byte("anybody?"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("read udp %s: %v, want ECONNREFUSED", address, err)
		}
		c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := far.DialContext(ctx, "tcp", "[fd00::99]:80"); err == nil {
		t.Error("nobody is there")
	}
	if _, err := near.Listen(t.Context(), "tcp", "[fd00::1]:80"); err != nil {
		t.Error(err)
	}
	if _, err := near.Listen(t.Context(), "tcp", "[fd00::1]:80"); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen: %v, want EADDRINUSE", err)
	}
	if _, err := near.Listen(t.Context(), "udp", "[fd00::1]:80"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("listen: %v, want ErrUnsupported", err)
	}
	var unknown net.UnknownNetworkError
	if _, err := near.DialContext(t.Context(), "ping", "fd00::2"); !errors.As(err, &unknown) {
		t.Errorf("dial: %v, want UnknownNetworkError", err)
	}
}
