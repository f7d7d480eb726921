package wiretest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// forwarded has the near end listen in a Network in memory and forward to a
// local address, which may change.
func forwarded(t *testing.T, ch channel.Channel, address func() string) {
	t.Helper()
	l, err := ch.Listen(within(t), "tcp", "web:80")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- relay.Forward(ctx, l, to(address), "tcp", "") }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// to dials where address says.
type to func() string

func (f to) DialContext(ctx context.Context, network, _ string) (net.Conn, error) {
	var h channel.Host
	return h.DialContext(ctx, network, f())
}

// testForwardRefused: a dial that is refused at the one end is refused at the
// other, before a byte was taken, in the time of a round trip.
func testForwardRefused(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	n := &memchan.Network{}
	var mu sync.Mutex
	address := "127.0.0.1:" + freePort(t)
	forwarded(t, reach(t, sites, Beats{}, Way{}, n), func() string {
		mu.Lock()
		defer mu.Unlock()
		return address
	})
	for range 20 {
		began := time.Now()
		if _, err := n.DialContext(within(t), "tcp", "web:80"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("dial: %v, want ECONNREFUSED", err)
		}
		if took := time.Since(began); took > 500*time.Millisecond {
			t.Errorf("refused after %v", took)
		}
	}
	mu.Lock()
	address = channeltest.ServeTCP(t, channeltest.Echo)
	mu.Unlock()
	c, err := n.DialContext(within(t), "tcp", "web:80")
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, c)
}

// testForwardBurst: many that come at once are all answered.
func testForwardBurst(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	n := &memchan.Network{}
	k, _ := keep(t, sites, n, channel.KeepConfig{})
	local := channeltest.ServeTCP(t, channeltest.Echo)
	forwarded(t, k, func() string { return local })
	var all sync.WaitGroup
	start := make(chan struct{})
	for range 1000 {
		all.Go(func() {
			<-start
			c, err := n.DialContext(within(t), "tcp", "web:80")
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	close(start)
	all.Wait()
}

// testForwardGivenUp: who dials in vain for too long is gone; what was dialled
// for it is closed.
func testForwardGivenUp(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	n := &memchan.Network{}
	dialling, release := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	local := channeltest.ServeTCP(t, func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	forwarded(t, reach(t, sites, Beats{}, Way{}, n), func() string {
		close(dialling)
		<-release
		return local
	})
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() {
		_, err := n.DialContext(ctx, "tcp", "web:80")
		res <- err
	}()
	receive(t, dialling)
	cancel()
	if err := receive(t, res); !errors.Is(err, context.Canceled) {
		t.Errorf("dial: %v", err)
	}
	close(release)
	receive(t, ended)
}

// testForwardKept: over a Keep, as a claim is; the wire breaks now and then.
func testForwardKept(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	n := &memchan.Network{}
	k, s := keep(t, sites, n, channel.KeepConfig{MinBackoff: time.Millisecond})
	local := channeltest.ServeTCP(t, channeltest.Echo)
	forwarded(t, k, func() string { return local })
	for range 3 {
		transfer(t, eventually(t, n))
		s.Cut()
	}
}

// eventually dials until the listener is there again.
func eventually(t *testing.T, n *memchan.Network) net.Conn {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if c, err := n.DialContext(within(t), "tcp", "web:80"); err == nil {
			return c
		}
	}
	t.Fatal("nobody answers")
	return nil
}

// testForwardUDP: a flow is taken when the near end has it.
func testForwardUDP(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	n := &memchan.Network{}
	ch := reach(t, sites, Beats{}, Way{}, n)
	l, err := ch.Listen(within(t), "udp", "dns:53")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.CopyBuffer(c, io.LimitReader(c, 5), make([]byte, 5))
			c.Close()
		}
	}()
	from := &net.UDPAddr{IP: net.IPv4(10, 244, 0, 7), Port: 4711}
	c, err := n.DialContext(memchan.From(within(t), from), "udp", "dns:53")
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("hello"))
	buf := make([]byte, 10)
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	c.Close()
	l.Close()
	if _, err := n.DialContext(within(t), "udp", "dns:53"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
}
