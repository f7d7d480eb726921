// Package memchan is a channel.Network without a wire: who dials an address
// meets who listens there, in this process.
//
// It is for names that lead to the other end of a wire rather than to a socket:
// sshchan.Serve, given such a Network, listens in it for its near end, and
// whoever dials the name here is answered by a dial that is made there. So what
// is accepted is a channel.Pending, and DialContext returns when it is answered.
//
// Who listens later at an address takes it over, for as long as he does: where a
// wire was opened again, the new listener is there before the old one is known to
// be dead. Should what was said over the old wire come late, and last, it does not
// outlive that wire.
package memchan

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Network is a Network in memory. The zero value is ready.
type Network struct {
	mu        sync.Mutex
	listeners map[addr][]*listener // the last one has the address
}

var _ channel.Network = (*Network)(nil)

// addr is an address in memory.
type addr struct{ network, text string }

func (a addr) Network() string { return a.network }
func (a addr) String() string  { return a.text }

func parseAddr(network, address string) (addr, error) {
	if network != "tcp" && network != "udp" {
		return addr{}, net.UnknownNetworkError(network)
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return addr{}, err
	}
	if port == "" || port == "0" {
		return addr{}, syscall.EADDRNOTAVAIL // there is none to choose for who does not care
	}
	return addr{network, address}, nil
}

type fromKey struct{}

// From has a dial with the returned context come from an address: it is the
// RemoteAddr of what is accepted.
func From(ctx context.Context, from net.Addr) context.Context {
	return context.WithValue(ctx, fromKey{}, from)
}

// origin is where a dial comes from: nowhere, if that was not said.
func origin(ctx context.Context, network string) net.Addr {
	if a, ok := ctx.Value(fromKey{}).(net.Addr); ok && a != nil {
		return a
	}
	nowhere := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	if network == "udp" {
		return net.UDPAddrFromAddrPort(nowhere)
	}
	return net.TCPAddrFromAddrPort(nowhere)
}

// DialContext meets the listener of the address, and waits for its answer.
func (n *Network) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	at, err := parseAddr(network, address)
	if err == nil {
		var c net.Conn
		if c, err = n.dial(ctx, at); err == nil {
			return c, nil
		}
	}
	return nil, &net.OpError{Op: "dial", Net: network, Addr: addr{network, address}, Err: err}
}

// ErrNobody is what a dial of an address says that has no listener: nobody has
// refused it.
var ErrNobody = fmt.Errorf("nobody listens: %w", syscall.ECONNREFUSED)

func (n *Network) dial(ctx context.Context, at addr) (net.Conn, error) {
	near, far, k := pair(at, origin(ctx, at.network))
	for {
		l := n.listener(at)
		if l == nil {
			return nil, ErrNobody
		}
		select {
		case l.backlog <- far:
			if err := k.wait(ctx); err != nil {
				return nil, err
			}
			return near, nil
		case <-l.closed: // and has left the address to another, or to nobody
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// listener is who has the address, or nil.
func (n *Network) listener(at addr) *listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := n.listeners[at]
	if len(all) == 0 {
		return nil
	}
	return all[len(all)-1]
}

// Listen takes the address, also from who has it.
func (n *Network) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	at, err := parseAddr(network, address)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: addr{network, address}, Err: err}
	}
	l := &listener{n: n, at: at, backlog: make(chan net.Conn), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners == nil {
		n.listeners = make(map[addr][]*listener)
	}
	n.listeners[at] = append(n.listeners[at], l)
	return l, nil
}

type listener struct {
	n       *Network
	at      addr
	backlog chan net.Conn
	closed  chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
	default:
		select {
		case c := <-l.backlog:
			return c, nil
		case <-l.closed:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: l.at.network, Addr: l.at, Err: net.ErrClosed}
}

func (l *listener) Addr() net.Addr { return l.at }

func (l *listener) Close() error {
	l.n.mu.Lock()
	defer l.n.mu.Unlock()
	all := l.n.listeners[l.at]
	i := slices.Index(all, l)
	if i < 0 {
		return nil
	}
	close(l.closed)
	if all = slices.Delete(all, i, i+1); len(all) > 0 {
		l.n.listeners[l.at] = all
	} else {
		delete(l.n.listeners, l.at)
	}
	return nil
}

// pair is a connection: near is for who dials, far for who listens.
func pair(at addr, from net.Addr) (near, far net.Conn, k *knock) {
	k = &knock{heard: make(chan struct{})}
	if at.network == "udp" {
		a, b := flows(from, at)
		b.knock = k
		return a, pendingFlow{b}, k
	}
	a, b := streams(from, at)
	b.knock = k
	return a, pendingStream{b}, k
}

// knock is what a dial waits for. Who decides first, decides.
type knock struct {
	once  sync.Once
	heard chan struct{}
	err   error
}

func (k *knock) decide(err error) error {
	k.once.Do(func() {
		k.err = err
		close(k.heard)
	})
	return k.err
}

// wait is the dialling side.
func (k *knock) wait(ctx context.Context) error {
	select {
	case <-k.heard:
		return k.err
	case <-ctx.Done():
		return k.decide(ctx.Err())
	}
}

// taken takes the connection if nobody answered yet. The dialling end has
// nothing to answer.
func (k *knock) taken() error {
	if k != nil && k.decide(nil) != nil {
		return net.ErrClosed
	}
	return nil
}

// refused refuses the connection if nobody answered yet.
func (k *knock) refused(err error) {
	if k != nil {
		k.decide(err)
	}
}

// pendingStream and pendingFlow are the ends that answer.
type pendingStream struct{ *stream }

func (p pendingStream) Answer(err error) error {
	if err != nil {
		return p.Abort(err)
	}
	return p.opError("accept", p.knock.taken())
}

type pendingFlow struct{ *flow }

func (p pendingFlow) Answer(err error) error {
	if err != nil {
		return p.Abort(err)
	}
	return p.opError("accept", p.knock.taken())
}

var _, _ channel.Pending = pendingStream{}, pendingFlow{}
