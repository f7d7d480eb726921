// Package wgchan is both ends of a channel over WireGuard, where a UDP path leads from
// the one to the other: Dial is the near end, a channel.Channel; Port is the far end,
// which needs no privileges, and opens any channel.Network up to its peers.
//
// Behind WireGuard each end has a netstack of its own, and a flow is a connection of
// TCP between the two: so a lost packet delays one flow, and no other. What a flow is
// for is said at its beginning, as package signalling has it. Datagrams and packets of
// any kind may also be sent as they are: those to addresses that are not the far end's
// become dials on its Network, which is all that a stock WireGuard client asks for.
//
// The near end takes packets of this machine's kernel, too (packets.go), from addresses
// beside those of its netstack: then TCP is the kernel's own at this end, which is a
// third faster, loses less to a lossy path, and costs no connection here.
//
// The order of the files is that of a packet's way: netstack, leg.go, cut.go (large
// segments into packets, and back) with fragment.go, seam.go, WireGuard, bind.go, and the socket.
//
// The keys are those of the other wires, ed25519's, mapped to X25519: nothing else
// has to be handed over, and the other end's public key is as good as the one that
// WireGuard would have made. What is signed with a key and what is agreed on with
// its other form tell nothing about each other. Peers that are stock clients have
// keys of X25519 themselves.
//
// Signs of life are packets beside all flows (sign.go). They find out, too, what the path
// carries (path.go): all packets go unfragmented, and what is found holds both ways.
//
// A key is at one place at a time, so there are no two wires of one peer beside each
// other: one that was moved or cut off for a while goes on by itself.
package wgchan

import (
	"crypto"
	"net/netip"
	"syscall"
	"time"
)

// Config is what an end needs to know.
type Config struct {
	Key crypto.PrivateKey // its own: an ed25519.PrivateKey, or a *ecdh.PrivateKey of X25519

	// Peer is the far end's key, and Endpoints are where it may be, for Dial: they
	// are tried at once. Control, if set, is called with the socket before it is
	// bound, as net.ListenConfig.Control is.
	Peer      crypto.PublicKey
	Endpoints []netip.AddrPort
	Control   func(network, address string, c syscall.RawConn) error

	// Packets are addresses of this machine from which packets are carried as they are
	// (channel.Packets). The far end must know them, see Peer.
	Packets []netip.Addr

	// Port is the UDP port for Listen; zero means any.
	Port uint16

	// Beat is how often each end shows that it lives; after seven times of silence
	// the wire is dead, and a handshake has failed. Zero means 2 s.
	Beat time.Duration

	// DialTimeout bounds one dial or listen of Serve at its network, and Idle
	// the silence of a datagram flow there. Zero means 30 s and 2 min.
	DialTimeout, Idle time.Duration

	// OnAlive, if set, is called when the far end showed that it lives: after
	// the handshake, and while anything comes. It must return soon.
	OnAlive func()
}

// Peer is who may talk to a Port.
type Peer struct {
	Key crypto.PublicKey // an ed25519.PublicKey, or a *ecdh.PublicKey of X25519

	// OnAlive, if set, is called when the peer's wire showed that it lives.
	OnAlive func()

	// Packets are addresses that its packets come from, beside those that it has by its
	// key: four at most, and none of those that keys have. Of two peers that name the
	// same the later has it.
	Packets []netip.Addr

	// MaxTCP and MaxUDP are how many flows it may have at once. Zero means 16,384 and 1,024.
	MaxTCP, MaxUDP int
}

// withDefaults fills in what was left zero.
func (c Config) withDefaults() Config {
	for _, d := range []struct {
		at *time.Duration
		or time.Duration
	}{{&c.Beat, 2 * time.Second}, {&c.DialTimeout, 30 * time.Second}, {&c.Idle, 2 * time.Minute}} {
		if *d.at <= 0 {
			*d.at = d.or
		}
	}
	if c.OnAlive == nil {
		c.OnAlive = func() {}
	}
	return c
}
