package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A Stack with addresses of its own is a Network there, of numbers only. It waits
// for Run to begin.
var _ channel.Network = (*Stack)(nil)

// own tells whether flows to addr are the stack's own affair: all are, where there is
// no Network.
func (r *run) own(addr netip.Addr) bool {
	return r.cfg.Network == nil || slices.Contains(r.cfg.Own, addr)
}

// address gives the NIC the stack's own addresses.
func (r *run) address() error {
	for _, a := range r.cfg.Own {
		with := tcpip.ProtocolAddress{Protocol: protocol(a), AddressWithPrefix: address(a).WithPrefix()}
		if err := r.ip.AddProtocolAddress(nic, with, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("netstack: take %s: %s", a, err)
		}
	}
	return nil
}

func protocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// SetMTU is for a path that has become wider or narrower: connections that are open
// keep the size of their segments.
func (s *Stack) SetMTU(mtu int) {
	<-s.begun
	s.run.link.mtu.Store(uint32(mtu))
}

// DialContext dials from an address of the stack's own: "tcp" or "udp".
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	r, to, err := s.running(ctx, network, address)
	if err == nil {
		defer r.flows.Done()
		var conn net.Conn
		if conn, err = r.dialOwn(ctx, network, to); err == nil {
			return conn, nil
		}
	}
	return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(to), Err: err}
}

// running waits for Run to have begun, which then waits for its flows.
func (s *Stack) running(ctx context.Context, network, address string) (*run, netip.AddrPort, error) {
	if network != "tcp" && network != "udp" {
		return nil, netip.AddrPort{}, net.UnknownNetworkError(network)
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, at, err
	}
	select {
	case <-s.begun:
	case <-ctx.Done():
		return nil, at, ctx.Err()
	}
	if !s.run.begin() {
		return nil, at, net.ErrClosed
	}
	return s.run, at, nil
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: address(a.Addr()), Port: a.Port()}
}

func (r *run) dialOwn(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	if network == "udp" {
		return r.dialUDP(to)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(r.ctx, func() { cancel(net.ErrClosed) })()
	wq := &waiter.Queue{}
	ep, err := r.ip.NewEndpoint(tcp.ProtocolNumber, protocol(to.Addr()), wq)
	if err != nil {
		return nil, toErrno(err)
	}
	if err := connect(ctx, ep, wq, to); err != nil {
		ep.Close()
		return nil, err
	}
	return newOwnConn(wq, ep, r.flight)
}

// An ownConn has an address of the stack's own. Addresses are asked for once: gVisor
// forgets those of a connection that is reset.
type ownConn struct {
	*tcpConn
	local, remote net.Addr
}

// newOwnConn fails for one that was reset as soon as it was there.
func newOwnConn(wq *waiter.Queue, ep tcpip.Endpoint, f *flight) (net.Conn, error) {
	c := newTCPConn(wq, ep, &counter{}, f)
	o := &ownConn{c, c.LocalAddr(), c.RemoteAddr()}
	if o.local == nil || o.remote == nil {
		c.Close()
		return nil, syscall.ECONNRESET
	}
	return o, nil
}

func (c *ownConn) LocalAddr() net.Addr  { return c.local }
func (c *ownConn) RemoteAddr() net.Addr { return c.remote }

func (r *run) dialUDP(to netip.AddrPort) (net.Conn, error) {
	wq := &waiter.Queue{}
	ep, err := r.ip.NewEndpoint(udp.ProtocolNumber, protocol(to.Addr()), wq)
	if err != nil {
		return nil, toErrno(err)
	}
	if err := ep.Connect(full(to)); err != nil {
		ep.Close()
		return nil, toErrno(err)
	}
	// gonet's readers wait for data only, but look for errors, too, when they wake.
	failed := waiter.NewFunctionEntry(waiter.EventErr, func(waiter.EventMask) { go wq.Notify(waiter.ReadableEvents) })
	wq.EventRegister(&failed)
	return &udpConn{gonet.NewUDPConn(wq, ep)}, nil
}

// connect connects an endpoint of TCP.
func connect(ctx context.Context, ep tcpip.Endpoint, wq *waiter.Queue, to netip.AddrPort) error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	err := ep.Connect(full(to))
	if _, started := err.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ready:
			err = ep.LastError()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return toErrno(err)
}

// toErrno is what the kernel calls an error of gVisor.
func toErrno(err tcpip.Error) error {
	if err == nil {
		return nil
	}
	for _, e := range errnos {
		if e.ip.String() == err.String() {
			return e.err
		}
	}
	return errors.New(err.String())
}

// Listen listens at an address of the stack's own: for "tcp".
func (s *Stack) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	r, at, err := s.running(ctx, network, address)
	if err == nil {
		defer r.flows.Done()
		var l net.Listener
		if l, err = r.listenOwn(network, at); err == nil {
			return l, nil
		}
	}
	return nil, &net.OpError{Op: "listen", Net: network, Addr: net.TCPAddrFromAddrPort(at), Err: err}
}

func (r *run) listenOwn(network string, at netip.AddrPort) (net.Listener, error) {
	if network != "tcp" {
		return nil, errors.ErrUnsupported
	}
	l := &ownListener{r: r}
	var err tcpip.Error
	if l.ep, err = r.ip.NewEndpoint(tcp.ProtocolNumber, protocol(at.Addr()), &l.wq); err != nil {
		return nil, toErrno(err)
	}
	if err = l.ep.Bind(full(at)); err == nil {
		err = l.ep.Listen(ownBacklog)
	}
	if err != nil {
		l.ep.Close()
		return nil, toErrno(err)
	}
	return l, nil
}

const ownBacklog = 4096

// ownListener listens at an address of the stack's own.
type ownListener struct {
	wq waiter.Queue
	ep tcpip.Endpoint
	r  *run
}

func (l *ownListener) Accept() (net.Conn, error) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventErr | waiter.EventHUp)
	l.wq.EventRegister(&entry)
	defer l.wq.EventUnregister(&entry)
	for {
		ep, wq, err := l.ep.Accept(nil)
		if err == nil {
			if c, err := newOwnConn(wq, ep, l.r.flight); err == nil {
				return c, nil
			}
			continue
		}
		if _, none := err.(*tcpip.ErrWouldBlock); !none {
			return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
		}
		<-ready
	}
}

func (l *ownListener) Addr() net.Addr {
	at, err := l.ep.GetLocalAddress()
	if err != nil {
		return &net.TCPAddr{}
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(fromAddress(at.Addr), at.Port))
}

func (l *ownListener) Close() error {
	l.ep.Close()
	return nil
}

// A udpConn is a flow of the stack's own.
type udpConn struct{ *gonet.UDPConn }

func (c *udpConn) Read(b []byte) (int, error) {
	n, err := c.UDPConn.Read(b)
	return n, errno(err)
}

func (c *udpConn) Write(b []byte) (int, error) {
	n, err := c.UDPConn.Write(b)
	return n, errno(err)
}
