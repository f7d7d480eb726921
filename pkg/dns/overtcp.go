package dns

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/miekg/dns"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// OverTCP is a Network that carries no datagrams, but for those to a DNS server: it
// is asked over TCP.
func OverTCP(network channel.Network, server netip.AddrPort) channel.Network {
	return overTCP{network, server}
}

type overTCP struct {
	channel.Network
	server netip.AddrPort
}

func (n overTCP) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "udp" || address != n.server.String() {
		return n.Network.DialContext(ctx, network, address)
	}
	conn, err := n.Network.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &framed{Conn: conn}
	c.room.Store(dns.MinMsgSize)
	return c, nil
}

// framed is a flow of datagrams over TCP: each message has its length before it there.
type framed struct {
	net.Conn
	room atomic.Int64 // the largest answer that whoever asks has room for
}

func (c *framed) Write(message []byte) (int, error) {
	m := new(dns.Msg)
	if m.Unpack(message) == nil && m.IsEdns0() != nil {
		c.room.Store(max(c.room.Load(), int64(m.IsEdns0().UDPSize())))
	}
	if err := (frames{}).write(c.Conn, message); err != nil {
		return 0, err
	}
	return len(message), nil
}

// Read gives one answer, cut where there is no room for it, so that it is asked for
// over TCP.
func (c *framed) Read(p []byte) (int, error) {
	buf := make([]byte, dns.MaxMsgSize)
	n, err := frames{}.read(c.Conn, buf)
	if err != nil {
		return 0, err
	}
	answer := buf[:n]
	if m := new(dns.Msg); int64(n) > c.room.Load() && m.Unpack(answer) == nil {
		m.Truncate(int(c.room.Load()))
		if cut, err := m.Pack(); err == nil {
			answer = cut
		}
	}
	return copy(p, answer), nil
}
