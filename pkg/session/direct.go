package session

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// direct makes wires that lead past the API server.
type direct struct {
	wire   wires.Wire             // that was asked for; "" is any
	avoid  func(netip.Addr) bool  // addresses that a wire may not use; nil: none
	keep   func() channel.Network // over which a shadow is asked to let a key in
	device func() []netip.Addr    // its addresses; nil: there is no device
	say    func(string)
	log    *slog.Logger

	mu      sync.Mutex
	last    went
	carrier *wires.UDPChannel // the last one that was to carry the device's packets
	failed  int               // attempts
}

// went is how the last of them goes.
type went struct {
	kind     wires.Wire
	at       netip.AddrPort
	noStream error // why not over TCP, where that was tried
}

func (w went) String() string { return fmt.Sprintf("%s to %s", w.kind, w.at) }

// way is that of the wire that status tells.
func (w went) way() string { return "endpoint " + w.at.String() }

func (d *direct) went() went {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}

func (d *direct) goes(w went) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = w
}

// streamLimit is how long TCP may take of the time for a wire past the API server,
// where UDP is to have its turn, too.
const streamLimit = 2 * time.Second

// dial dials the shadow, and, unless a wire was asked for, over whatever leads there:
// TCP, which is faster, or UDP. What leads there for TCP may be a moment in coming.
func (d *direct) dial(ctx context.Context, s *kube.Shadow, keys wires.Keys) (channel.Channel, error) {
	wire, err := d.attempt(ctx, s, keys)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err == nil:
		d.failed = 0
	case !errors.Is(ctx.Err(), context.Canceled):
		if d.failed++; d.failed == 2 { // the first may be too early
			d.say(fmt.Sprintf("the wire does not get past the API server: %v", err))
		}
	}
	return wire, err
}

func (d *direct) attempt(ctx context.Context, s *kube.Shadow, keys wires.Keys) (channel.Channel, error) {
	at, err := s.Endpoints(ctx, d.avoided)
	switch {
	case err != nil:
		return nil, err
	case d.wire == wires.WireGuard:
		return d.dialUDP(ctx, s, at, keys, nil)
	case d.wire != "" || at.New:
		return d.dialStream(ctx, s, at, keys)
	}
	first, cancel := context.WithTimeout(ctx, streamLimit)
	defer cancel()
	wire, err := d.dialStream(first, s, at, keys)
	if err == nil {
		return wire, nil
	}
	other, otherErr := d.dialUDP(ctx, s, at, keys, err)
	if otherErr != nil {
		return nil, errors.Join(err, otherErr)
	}
	return other, nil
}

func (d *direct) avoided(a netip.Addr) bool { return d.avoid != nil && d.avoid(a) }

// dialStream makes a wire of as many connections as help what a device brings, all to
// where the first leads.
func (d *direct) dialStream(ctx context.Context, s *kube.Shadow, at kube.Endpoints, keys wires.Keys) (channel.Channel, error) {
	lane := func(ctx context.Context, at kube.Endpoints) (channel.Lane, netip.AddrPort, error) {
		conn, to, err := s.DialDirect(ctx, at)
		if err != nil {
			return nil, to, err
		}
		wire, err := streamOf(d.wire).Dial(ctx, conn, wires.Config{Keys: keys, Log: d.log})
		return wire, to, err
	}
	first, to, err := lane(ctx, at)
	if err != nil {
		return nil, err
	}
	d.goes(went{kind: streamOf(d.wire), at: to})
	if d.device == nil {
		return first, nil
	}
	return channel.Spread(first, func(ctx context.Context) (channel.Lane, error) {
		another, _, err := lane(ctx, kube.Endpoints{TCP: []netip.AddrPort{to}})
		return another, err
	}), nil
}

// dialUDP makes a wire of WireGuard. It carries the packets of this machine's device,
// unless there is one already that does: the far end knows one way back to an address.
func (d *direct) dialUDP(ctx context.Context, s *kube.Shadow, at kube.Endpoints, keys wires.Keys, noStream error) (channel.Channel, error) {
	var from []netip.Addr
	if d.device != nil && !d.carries() {
		from = d.device()
	}
	wire, err := d.tryUDP(ctx, s, at, keys, from)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = went{wires.WireGuard, wire.Endpoint(), noStream}
	if len(from) > 0 {
		d.carrier = wire
	}
	return wire, nil
}

// carries tells whether there is a wire still that carries packets.
func (d *direct) carries() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.carrier == nil {
		return false
	}
	select {
	case <-d.carrier.Packets(netip.Addr{}).Done():
		return false
	default:
		return true
	}
}

// tryUDP makes a wire of WireGuard, with a key that is made for it.
func (d *direct) tryUDP(ctx context.Context, s *kube.Shadow, at kube.Endpoints, keys wires.Keys, from []netip.Addr) (*wires.UDPChannel, error) {
	if len(at.UDP) == 0 {
		return nil, errors.New("no UDP leads to the shadow")
	}
	own, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if err := shadow.Admit(ctx, d.keep(), own.PublicKey(), from); err != nil {
		return nil, err
	}
	wire, err := wires.DialUDP(ctx, at.UDP, own, from, wires.Config{Keys: keys, Log: d.log})
	s.Reached(at, err == nil)
	if err != nil {
		return nil, fmt.Errorf("udp %v: %w", at.UDP, err)
	}
	return wire, nil
}

// streamOf is what is spoken over a byte stream where w was asked for.
func streamOf(w wires.Wire) wires.Wire {
	if w == wires.SSH {
		return wires.SSH
	}
	return wires.TLS
}

// others tells why each wire but the one that is used is not.
func (d *direct) others(used wires.Wire, endpoint string, noBetter error) map[string]string {
	why := map[string]string{}
	for _, w := range []wires.Wire{wires.TLS, wires.SSH, wires.WireGuard} {
		switch {
		case w == used:
		case d.wire != "" && d.wire != w:
			why[string(w)] = "--wire " + string(d.wire)
		case w == wires.SSH:
			why[string(w)] = "tls is faster"
		case w == wires.WireGuard && endpoint == "":
			why[string(w)] = "it needs an --endpoint"
		case w == wires.WireGuard && noBetter != nil:
			why[string(w)] = noBetter.Error()
		case w == wires.WireGuard && d.wire == w:
			why[string(w)] = "it is being tried"
		case w == wires.WireGuard:
			why[string(w)] = "tls is faster where it works"
		case d.went().noStream != nil:
			why[string(w)] = d.went().noStream.Error()
		}
	}
	return why
}

// status fills in what is known of the wire.
func (d *direct) status(k channel.KeepState, way kube.Way, endpoint string) WireStatus {
	s := wireStatus(k, streamOf(d.wire), way)
	if k.Better {
		last := d.went()
		s.Kind, s.Way = string(last.kind), last.way()
	}
	if s.Kind != string(wires.WireGuard) && (k.Better || way == kube.PodsProxy) {
		s.Congestion = channel.CongestionName()
	}
	s.Others = d.others(wires.Wire(s.Kind), endpoint, k.NoBetter)
	return s
}
