package wgchan

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// maxPacketAddrs is how many a device may have.
const maxPacketAddrs = 4

// Port is the far end: a UDP port with WireGuard behind it.
type Port struct {
	cfg Config
	t   *tunnel
	ctx context.Context // ends with Close
	end context.CancelFunc

	mu      sync.Mutex
	serving sync.WaitGroup
}

// Listen listens at the UDP port that cfg says. Nobody is let in before Serve.
func Listen(cfg Config) (*Port, error) {
	t, err := newTunnel(cfg.Key, cfg.Port, nil)
	if err != nil {
		return nil, err
	}
	p := &Port{cfg: cfg.withDefaults(), t: t}
	p.ctx, p.end = context.WithCancel(context.Background())
	return p, nil
}

// Number is that of the UDP port.
func (p *Port) Number() uint16 { return p.t.bind.port() }

// Close ends what Serve does, and lets the port go.
func (p *Port) Close() error {
	p.mu.Lock()
	p.end()
	p.mu.Unlock()
	p.serving.Wait() // who is served hears of it
	p.t.close()
	return nil
}

// Serve opens network up to a peer, until ctx ends or the port is closed, and then
// returns net.ErrClosed when everything has ended that ran for it. One wire of the
// peer is served at a time, since it has one key: a new one ends that before it.
// Beside that it may send packets to any address: they become dials on network.
func (p *Port) Serve(ctx context.Context, peer Peer, network channel.Network) error {
	s, err := p.newServer(peer, network)
	if err != nil {
		return fmt.Errorf("wireguard: %w", err)
	}
	if !p.serve() {
		s.leg.Close()
		return net.ErrClosed
	}
	defer p.serving.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ctx, func() { cancel(nil) })()
	return s.run(ctx, cancel)
}

// serve counts one that serves, unless it is too late.
func (p *Port) serve() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return false
	}
	p.serving.Add(1)
	return true
}

// server is the far end of one peer.
type server struct {
	p         *Port
	peer      Peer
	key       key
	addresses []netip.Addr
	network   channel.Network
	leg       *leg
	stack     *netstack.Stack

	mu   sync.Mutex
	wire *farWire // the present one; nil between wires
}

// farWire is a wire and what is done on it.
type farWire struct {
	*wire
	far *signalling.Far
}

func (p *Port) newServer(peer Peer, network channel.Network) (*server, error) {
	k, err := publicKey(peer.Key)
	if err != nil {
		return nil, err
	}
	if peer.OnAlive == nil {
		peer.OnAlive = func() {}
	}
	peer.MaxTCP = cmp.Or(peer.MaxTCP, 16384)
	if err := checkPackets(peer.Packets); err != nil {
		return nil, err
	}
	s := &server{p: p, peer: peer, key: k, addresses: k.addresses(), network: network}
	s.leg = newLeg(p.t.seam, farAddress, s.addresses[0])
	s.leg.asked = func(sign sign) { s.leg.adopt(s.stack, sign.mtu) }
	s.stack, err = netstack.New(netstack.Config{
		Device: s.leg, MTU: stockMTU, Own: []netip.Addr{farAddress}, Remote: true, Network: network,
		DialTimeout: p.cfg.DialTimeout, UDPIdle: min(p.cfg.Idle, time.Minute), MaxTCP: peer.MaxTCP, MaxUDP: peer.MaxUDP,
	})
	if err != nil {
		s.leg.Close()
	}
	return s, err
}

// checkPackets refuses addresses that are the tunnel's own.
func checkPackets(from []netip.Addr) error {
	if len(from) > maxPacketAddrs {
		return fmt.Errorf("packets from %d addresses, which are %d at most", len(from), maxPacketAddrs)
	}
	own := netip.PrefixFrom(farAddress, 64).Masked()
	if i := slices.IndexFunc(from, own.Contains); i >= 0 {
		return fmt.Errorf("packets from %s, which is the tunnel's own", from[i])
	}
	return nil
}

// run lets the peer in, and out again. Should the netstack fail, that is the end.
func (s *server) run(ctx context.Context, fail context.CancelCauseFunc) error {
	if !s.p.t.add(s.leg, s.addresses) {
		s.leg.Close()
		return fmt.Errorf("wireguard: another peer is at %s", s.addresses)
	}
	defer s.p.t.remove(s.leg)
	s.addresses = append(s.addresses, s.p.t.lead(s.leg, s.peer.Packets)...)
	running, stop := context.WithCancel(context.Background())
	defer stop()
	var parts sync.WaitGroup
	parts.Go(func() { fail(s.stack.Run(running)) })
	err := s.admit(ctx, &parts)
	if err == nil {
		<-ctx.Done()
		err = net.ErrClosed
	}
	if cause := context.Cause(ctx); ctx.Err() != nil && cause != ctx.Err() {
		err = cause
	}
	s.replace(nil)
	s.p.t.expel(s.key)
	stop()
	parts.Wait()
	s.replace(nil) // one that came late
	return err
}

// admit lets the peer in when there are listeners.
func (s *server) admit(ctx context.Context, parts *sync.WaitGroup) error {
	control, err := s.stack.Listen(ctx, "tcp", netip.AddrPortFrom(farAddress, controlPort).String())
	if err != nil {
		return err
	}
	streams, err := s.stack.Listen(ctx, "tcp", netip.AddrPortFrom(farAddress, streamPort).String())
	if err != nil {
		return err
	}
	parts.Go(func() { s.begin(control) })
	parts.Go(func() { s.open(streams) })
	var from []netip.Prefix
	for _, a := range s.addresses {
		from = append(from, netip.PrefixFrom(a, a.BitLen()))
	}
	return s.p.t.admit(s.key, from, nil)
}

// begin begins a wire with each connection to the control port.
func (s *server) begin(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		w := newWire(s.stack, s.leg, c, s.p.cfg.Beat, s.peer.OnAlive, s.stack.Reset)
		far := &signalling.Far{Mux: w, Network: s.network, DialTimeout: s.p.cfg.DialTimeout, Idle: s.p.cfg.Idle}
		w.Begin(w.over)
		s.replace(&farWire{w, far})
		if _, err := c.Write([]byte{0}); err != nil {
			w.cut()
		}
	}
}

// replace makes a wire the present one, and waits until that before it is gone.
func (s *server) replace(w *farWire) {
	s.mu.Lock()
	before := s.wire
	s.wire = w
	s.mu.Unlock()
	if before != nil {
		before.Close()
		before.Wait()
	}
}

// open takes the streams of the present wire.
func (s *server) open(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		w := s.wire
		s.mu.Unlock()
		if w == nil || w.many() >= s.peer.MaxTCP {
			relay.Abort(c, net.ErrClosed)
			continue
		}
		if st, err := w.stream(c); err == nil {
			w.Spawn(func() { w.far.Open(st) })
		}
	}
}
