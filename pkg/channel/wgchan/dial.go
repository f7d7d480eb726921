package wgchan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/netstack"
)

// Channel is the near end. It is a channel.Silent.
type Channel struct {
	w    *wire
	t    *tunnel
	asks *signalling.Near
	path *path
}

var _ channel.Silent = (*Channel)(nil)

// leastHandshake is for WireGuard to say again what was lost.
const leastHandshake = 2 * time.Second

// Dial makes a channel to the far end that listens at one of the endpoints, over a UDP
// socket of its own. WireGuard says nothing to strangers: a key that is not expected
// there is an end that does not answer. ctx bounds the handshake only.
func Dial(ctx context.Context, cfg Config) (*Channel, error) {
	cfg = cfg.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, max(wiring.Limit(cfg.Beat), leastHandshake))
	defer cancel()
	c, err := dial(ctx, cfg)
	if ctx.Err() != nil && err != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("wireguard handshake: %w", err)
	}
	return c, nil
}

func dial(ctx context.Context, cfg Config) (*Channel, error) {
	t, stack, leg, err := near(cfg)
	if err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		stack.Run(running)
		t.close()
	}()
	c := &Channel{t: t, path: newPath(leg, stack)}
	knocking, met := context.WithCancel(ctx)
	var knocks sync.WaitGroup
	knocks.Go(func() { c.knock(knocking, t, cfg) })
	control, streams, err := c.meet(ctx, stack, leg)
	met()
	knocks.Wait()
	if err != nil {
		stop()
		<-ran
		return nil, err
	}
	c.w = newWire(stack, leg, control, cfg.Beat, cfg.OnAlive, stop)
	c.w.probe(control)
	c.asks = signalling.NewNear(c.w)
	c.w.Begin(c.w.over, func() { c.w.accept(streams, c.asks.Open) }, func() { c.beat(cfg.Beat) }, func() { <-ran })
	return c, nil
}

// knock has WireGuard begin again while nothing was heard: by itself it says what was
// lost after 5 s. What is answered later than that begins anew must be given its time.
func (c *Channel) knock(ctx context.Context, t *tunnel, cfg Config) {
	for again := 250 * time.Millisecond; ; again *= 2 {
		select {
		case <-time.After(again):
		case <-c.path.first:
			return
		case <-ctx.Done():
			return
		}
		peer, _ := publicKey(cfg.Peer)
		t.expel(peer)
		t.admit(peer, everywhere, cfg.Endpoints)
		c.path.search(0)
	}
}

// near makes what the near end consists of, and nothing of it runs.
func near(cfg Config) (*tunnel, *netstack.Stack, *leg, error) {
	private, err := privateKey(cfg.Key)
	if err != nil {
		return nil, nil, nil, err
	}
	peer, err := publicKey(cfg.Peer)
	if err != nil {
		return nil, nil, nil, err
	}
	public, err := private.public()
	if err != nil {
		return nil, nil, nil, err
	}
	t, err := newTunnel(cfg.Key, 0, cfg.Control)
	if err != nil {
		return nil, nil, nil, err
	}
	own := public.addresses()
	t.sole = newLeg(t.seam, own[0], farAddress)
	t.sole.outer = cfg.Packets
	stack, err := netstack.New(netstack.Config{Device: t.sole, MTU: stackMTU, Own: own, Remote: true})
	if err == nil {
		err = t.admit(peer, everywhere, cfg.Endpoints)
	}
	if err != nil {
		t.close()
		return nil, nil, nil, err
	}
	return t, stack, t.sole, nil
}

var everywhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// meet looks what the path carries, and has the far end begin a wire, which it says
// with a byte.
func (c *Channel) meet(ctx context.Context, stack *netstack.Stack, leg *leg) (control net.Conn, streams net.Listener, err error) {
	streams, err = stack.Listen(ctx, "tcp", netip.AddrPortFrom(leg.self, streamPort).String())
	if err != nil {
		return nil, nil, err
	}
	c.path.search(0)
	select {
	case <-c.path.first:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	control, err = stack.DialContext(ctx, "tcp", netip.AddrPortFrom(leg.other, controlPort).String())
	if err != nil {
		return nil, nil, err
	}
	defer context.AfterFunc(ctx, func() { control.Close() })()
	if _, err := io.ReadFull(control, make([]byte, 1)); err != nil {
		return nil, nil, fmt.Errorf("the other end does not begin: %w", err)
	}
	return control, streams, nil
}

// beat shows the other end that this one lives.
func (c *Channel) beat(every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		c.path.beat()
		select {
		case <-t.C:
		case <-c.w.Context().Done():
			return
		}
	}
}

// Wait blocks until the wire is gone and says why.
func (c *Channel) Wait() error { return c.w.Wait() }

// Close ends the wire.
func (c *Channel) Close() error { return c.w.Close() }

// RTT is the round trip of the last sign of life; zero before the first.
func (c *Channel) RTT() time.Duration {
	c.path.mu.Lock()
	defer c.path.mu.Unlock()
	return c.path.rtt
}

// Endpoint is where the far end is: the one that answered, or where it has gone since.
func (c *Channel) Endpoint() netip.AddrPort { return c.t.bind.peer() }

// MTU is what the path carries, of packets in the tunnel.
func (c *Channel) MTU() int {
	c.path.mu.Lock()
	defer c.path.mu.Unlock()
	return c.path.size
}

// Silence is how long nothing came from the other end.
func (c *Channel) Silence() time.Duration { return c.w.Silence() }

// Retire closes the wire when the last connection over it is closed.
func (c *Channel) Retire() { c.w.Retire() }

// DialContext has the far end dial. The name is resolved there. What packets can be
// sent to is not asked for first, which is a round trip less, and datagrams stay such.
func (c *Channel) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().IsGlobalUnicast() || to.Addr().Zone() != "" || network != "tcp" && network != "udp" {
		return c.ask(ctx, network, address)
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	s, err := c.w.dial(ctx, network, to.String())
	switch {
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return c.ask(ctx, network, address) // who may know better why
	case err != nil:
		return nil, &net.OpError{Op: "dial", Net: network, Addr: wiring.Addr{Net: network, Text: address}, Err: err}
	case network == "tcp":
		return tcpFlow{c.w.flow(s, network, s.conn.LocalAddr(), s.conn.RemoteAddr())}, nil
	}
	return udpFlow{c.w.flow(s, network, s.conn.LocalAddr(), s.conn.RemoteAddr())}, nil
}

// ask has the far end dial.
func (c *Channel) ask(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := c.asks.DialContext(ctx, network, address)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
		return nil, c.w.ending(err)
	}
	return conn, err
}

// Listen has the far end listen. The address is taken there as it is: for a
// Network of names, a name.
func (c *Channel) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := c.asks.Listen(ctx, network, address)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
		return nil, c.w.ending(err)
	}
	return l, err
}
