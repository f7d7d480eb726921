package wires

import (
	"context"
	"crypto/ecdh"
	"net/netip"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wgchan"
)

// WireGuard goes over UDP, and not over a byte stream: it has a Dial and a Serve of
// its own.
const WireGuard Wire = "wireguard"

// UDPChannel is the near end of a WireGuard wire.
type UDPChannel = wgchan.Channel

// DialUDP makes the near end of a WireGuard wire, to whichever of the endpoints
// answers. It has a key of its own, which the far end lets in. From the addresses in
// from packets are carried as they are, beside flows. ctx bounds the handshake only.
func DialUDP(ctx context.Context, endpoints []netip.AddrPort, own *ecdh.PrivateKey, from []netip.Addr, cfg Config) (*UDPChannel, error) {
	return wgchan.Dial(ctx, wgchan.Config{
		Key: own, Peer: cfg.Keys.tls.Peer, Endpoints: endpoints, Packets: from, Beat: cfg.Beat, OnAlive: cfg.OnAlive,
	})
}

// UDP is the far end of WireGuard wires.
type UDP struct {
	cfg  Config
	port *wgchan.Port
}

// ListenUDP listens at a port; nobody is let in before Serve.
func ListenUDP(port uint16, cfg Config) (*UDP, error) {
	p, err := wgchan.Listen(wgchan.Config{Key: cfg.Keys.tls.Key, Port: port, Beat: cfg.Beat})
	if err != nil {
		return nil, err
	}
	return &UDP{cfg, p}, nil
}

// Serve opens n up to who has a key, until ctx ends, and takes packets from its
// addresses. alive is called while it is heard.
func (u *UDP) Serve(ctx context.Context, key *ecdh.PublicKey, from []netip.Addr, alive func(), n channel.Network) error {
	return u.port.Serve(ctx, wgchan.Peer{Key: key, Packets: from, OnAlive: alive}, n)
}

// Close ends what Serve does, and lets the port go.
func (u *UDP) Close() error { return u.port.Close() }

// A Client is a stock client of WireGuard.
type Client = wgchan.Client

// Client fills in whom it talks to: the far end that the keys are for.
func (k Keys) Client(c Client) (text string, err error) {
	c.Peer = k.tls.Peer
	return c.Config()
}
