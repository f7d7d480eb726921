package session

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// surroundings are all that a command in a sandbox sees: a Network that decides by the
// address whose it is.
type surroundings struct {
	*Run
	host channel.Host
}

var (
	here4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	here6 = netip.IPv6Loopback()
)

// DialContext asks our own nameserver also what is meant for one of the machine's: the
// resolv.conf that names ours may be lost (see sandbox), and a program may know another.
func (s *surroundings) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := destination(network, address)
	switch a := to.Addr(); {
	case err != nil:
		return nil, err
	case to.Port() == 53 && network != "ping" && s.names53(a):
		return s.ask(s.names, network), nil
	case s.routed(a):
		return s.keep.DialContext(ctx, network, address)
	case s.cfg.Only && a.IsLoopback():
		return nil, syscall.ECONNREFUSED
	case s.cfg.Only:
		return nil, syscall.ENETUNREACH
	}
	conn, err := s.host.DialContext(ctx, network, address)
	if errors.Is(err, syscall.ECONNREFUSED) && to.Addr() == here4 {
		// Who listens at ::1 only is found as "localhost" elsewhere.
		return s.host.DialContext(ctx, network, netip.AddrPortFrom(here6, to.Port()).String())
	}
	return conn, err
}

// Listen is for nobody: all that comes is dialled.
func (s *surroundings) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

func destination(network, address string) (netip.AddrPort, error) {
	if network == "ping" {
		a, err := netip.ParseAddr(address)
		return netip.AddrPortFrom(a, 0), err
	}
	return netip.ParseAddrPort(address)
}

// names53 tells whether port 53 of an address is a nameserver that ours stands for.
func (s *surroundings) names53(a netip.Addr) bool {
	return a == s.server || a.IsLoopback() || slices.ContainsFunc(s.outer(), func(o netip.AddrPort) bool { return o.Addr() == a })
}
