package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
)

// A crossing dials for programs that know hosts by name: what is the cluster's there, by
// the name that its DNS knows, and all else from this machine.
type crossing struct {
	far    channel.Network
	names  *dns.Server
	inside func(netip.Addr) bool // tells of addresses that are the cluster's
	only   bool                  // these
}

func (c *crossing) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if c.inside(a.Unmap()) {
			return c.far.DialContext(ctx, network, address)
		}
		return c.dialOutside(ctx, network, address)
	}
	full, err := c.names.Expand(ctx, host)
	switch {
	case err != nil:
		return nil, err
	case full != "":
		return c.far.DialContext(ctx, network, net.JoinHostPort(full, port))
	}
	return c.dialOutside(ctx, network, address)
}

// An insideError is that a name which is not the cluster's leads there all the same.
type insideError struct{ address string }

func (e *insideError) Error() string { return e.address + " is the cluster's" }

// dialOutside dials from this machine, unless that leads to an address of the cluster.
func (c *crossing) dialOutside(ctx context.Context, network, address string) (net.Conn, error) {
	if c.only {
		return nil, fmt.Errorf("%s is not the cluster's: %w", address, syscall.EACCES)
	}
	host := &channel.Host{Control: func(_, address string, _ syscall.RawConn) error {
		if at, err := netip.ParseAddrPort(address); err == nil && c.inside(at.Addr().Unmap()) {
			return &insideError{address}
		}
		return nil
	}}
	conn, err := host.DialContext(ctx, network, address)
	var inside *insideError
	if errors.As(err, &inside) {
		return c.far.DialContext(ctx, network, inside.address)
	}
	return conn, err
}
