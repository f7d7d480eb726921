package channel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Host is the Network of this machine's own sockets. The zero value is ready.
type Host struct {
	// Control, if set, is called with every socket before it is bound or
	// connected, as net.Dialer.Control is: to mark it, or tie it to a link.
	// On macOS it does not get to see those of "ping".
	Control func(network, address string, c syscall.RawConn) error

	// Idle is how long an accepted "udp" flow may be silent both ways before
	// it ends with io.EOF. Zero means two minutes.
	Idle time.Duration
}

const defaultIdle = 2 * time.Minute

// DialContext connects a socket of this machine.
func (h *Host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	switch network {
	case "tcp", "udp":
		d := net.Dialer{Control: h.Control}
		c, err := d.DialContext(ctx, network, address)
		return c, posix(err)
	case "ping":
		return h.dialPing(ctx, address)
	}
	return nil, &net.OpError{Op: "dial", Net: network, Err: net.UnknownNetworkError(network)}
}

// Listen binds a socket of this machine. A "udp" listener shares one socket
// among its flows, so that they end when the listener is closed.
//
// An address is of its own family: 0.0.0.0 is every one of IPv4 alone (RFC 4254, 7.1,
// has it so), where package net takes that for every address, as one without a host is.
func (h *Host) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	lc := net.ListenConfig{Control: h.Control}
	family := ""
	if a, err := netip.ParseAddrPort(address); err == nil {
		family = "6"
		if a.Addr().Unmap().Is4() {
			family = "4"
		}
	}
	switch network {
	case "tcp":
		l, err := lc.Listen(ctx, network+family, address)
		return l, posix(err)
	case "udp":
		pc, err := lc.ListenPacket(ctx, network+family, address)
		if err != nil {
			return nil, posix(err)
		}
		return newFlows(pc.(*net.UDPConn), h.idle()), nil
	}
	return nil, &net.OpError{Op: "listen", Net: network, Err: net.UnknownNetworkError(network)}
}

func (h *Host) idle() time.Duration {
	if h.Idle > 0 {
		return h.Idle
	}
	return defaultIdle
}

// dialPing resolves first: an echo socket belongs to one family.
func (h *Host) dialPing(ctx context.Context, address string) (net.Conn, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", address)
	if err != nil {
		return nil, err
	}
	c, err := h.openPing(addrs[0].Unmap())
	if err != nil {
		return nil, fmt.Errorf("ping %s: %w", address, posix(err))
	}
	return c, nil
}
