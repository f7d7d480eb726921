package shadow

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// ControlAddress is the shadow's own host: a "tcp" dial of it, on any wire,
// leads to what Ask asks. No other port of it and no resolver knows it.
const ControlAddress = controlHost + ":80"

const (
	controlHost = "shadow.culvert.dev"
	dialLimit   = 10 * time.Second // for pods that drop packets
)

// network is the pod's Network, as the laptop may use it.
type network struct {
	inner  channel.Network
	resolv ResolvConf

	memory memchan.Network // the control host, and what claims listen at
	claims bool            // whether there may be any

	flows   atomic.Int64
	control sync.WaitGroup
}

func newNetwork(inner channel.Network, resolv ResolvConf, claims bool) *network {
	return &network{inner: inner, resolv: resolv, claims: claims}
}

// wait waits for the control connections, which end with their wires.
func (n *network) wait() { n.control.Wait() }

// controlled counts control connections.
func (n *network) controlled(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		n.control.Add(1)
	case http.StateClosed:
		n.control.Done()
	}
}

// DialContext dials from the pod. A name is resolved here, and not below, so
// that what it stands for can be judged.
func (n *network) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if network == "tcp" && address == ControlAddress {
		return n.memory.DialContext(ctx, network, address)
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	addrs, port, err := n.resolve(ctx, network, address)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if err := n.permit(a, port); err != nil {
			return nil, err
		}
	}
	return n.dialAny(ctx, network, addrs, port)
}

// resolve returns at least one address. port is "" for a ping.
func (n *network) resolve(ctx context.Context, network, address string) (addrs []netip.Addr, port string, err error) {
	host := address
	if network != "ping" {
		if host, port, err = net.SplitHostPort(address); err != nil {
			return nil, "", err
		}
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, port, nil
	}
	if host == "" || host == controlHost || strings.HasSuffix(host, claimSuffix) {
		return nil, "", fmt.Errorf("%q is not the cluster's: %w", address, syscall.EACCES)
	}
	addrs, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	return addrs, port, err
}

// notTheClusters is where a dial would lead to this pod or this node rather
// than into the cluster: "this host", loopback, link-local with the metadata
// services of clouds, and the one of those that has an address elsewhere.
var notTheClusters = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fd00:ec2::254/128"),
}

// permit answers EACCES for what is not the cluster's. The pod's nameservers
// are, wherever they are: a cache on the node has a link-local address.
func (n *network) permit(a netip.Addr, port string) error {
	a = a.Unmap().WithZone("")
	if port == "53" && slices.Contains(n.resolv.Nameservers, a) {
		return nil
	}
	for _, p := range notTheClusters {
		if p.Contains(a) {
			return fmt.Errorf("%s is not the cluster's: %w", a, syscall.EACCES)
		}
	}
	return nil
}

// dialAny tries one after the other, each with its share of the time.
func (n *network) dialAny(ctx context.Context, network string, addrs []netip.Addr, port string) (net.Conn, error) {
	var first error
	for i, a := range addrs {
		end, _ := ctx.Deadline()
		one, cancel := context.WithTimeout(ctx, time.Until(end)/time.Duration(len(addrs)-i))
		address := a.Unmap().String()
		if network != "ping" {
			address = net.JoinHostPort(address, port)
		}
		c, err := n.inner.DialContext(one, network, address)
		cancel()
		if err == nil {
			return n.count(c), nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// Listen listens in the pod; for a claim, where only the router finds it.
func (n *network) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	if host, _, err := net.SplitHostPort(address); err == nil && strings.HasSuffix(host, claimSuffix) {
		if !n.claims {
			return nil, syscall.EACCES
		}
		return n.memory.Listen(ctx, network, address)
	}
	l, err := n.inner.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &listener{l, n}, nil
}

type listener struct {
	net.Listener
	network *network
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.network.count(c), nil
}

// count counts c among the flows until it is closed.
func (n *network) count(c net.Conn) net.Conn {
	n.flows.Add(1)
	f := &flow{Conn: c, closed: sync.OnceFunc(func() { n.flows.Add(-1) })}
	if s, ok := c.(stream); ok {
		return &streamFlow{f, s}
	}
	return f
}

type flow struct {
	net.Conn
	closed func()
}

func (f *flow) Close() error {
	defer f.closed()
	return f.Conn.Close()
}

// stream is what a relay needs of a TCP connection to keep half-closes and
// resets.
type stream interface {
	channel.CloseWriter
	SetLinger(seconds int) error
}

type streamFlow struct {
	*flow
	stream
}

var _ channel.Network = (*network)(nil)
