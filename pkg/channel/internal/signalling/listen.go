package signalling

import (
	"context"
	"net"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// Backlog is how many connections wait to be accepted: as many as Linux has it.
// A burst is not to be refused that who accepts is about to take.
const Backlog = 4096

// listener is the near end of a listener at the far end.
type listener struct {
	n        *Near
	number   uint32
	network  string
	addr     net.Addr
	s        Stream // it lives as long
	incoming chan *incoming
	closed   chan struct{} // when either end has closed it
	err      error         // why; before closed
	gone     chan struct{} // closed when the far end has closed it, too
}

// Listen has the far end listen. The address is taken there as it is: for a
// Network of names, a name.
func (n *Near) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := n.listen(ctx, network, address)
	if err != nil {
		plain, _ := channel.CutWords(network)
		return nil, opError("listen", plain, address, err)
	}
	return l, nil
}

// listen waits for those to leave that may still have the address. What is accepted
// before the answer is here waits in the backlog.
func (n *Near) listen(ctx context.Context, network, address string) (*listener, error) {
	plain, _ := channel.CutWords(network)
	if plain != "tcp" && plain != "udp" {
		return nil, net.UnknownNetworkError(network)
	}
	if err := n.left(ctx); err != nil {
		return nil, err
	}
	l := n.add(plain)
	s, err := begin(ctx, n.mux, message{kind: msgListen, number: l.number, a: network, b: address})
	if err == nil {
		var m message
		m, err = answered(ctx, s, address)
		l.addr = wiring.ParseAddr(plain, m.a)
	}
	if err != nil {
		n.remove(l)
		l.refuseAll()
		return nil, err
	}
	l.s = s
	n.mux.Spawn(l.watch)
	return l, nil
}

// watch waits until the far end has closed the listener, too, or has ended it, and
// said why. Else it is the wire that has ended, of which it may be heard a little later.
func (l *listener) watch() {
	m, err := readMessage(l.s)
	if err == nil {
		err = m.refused("")
	} else {
		select {
		case <-l.closed:
		case <-l.n.mux.Context().Done():
			err = l.n.mux.Gone()
		case <-time.After(time.Second):
		}
	}
	l.end(err)
	l.s.Reset(nil)
	l.n.mu.Lock()
	delete(l.n.leaving, l)
	l.n.mu.Unlock()
	close(l.gone)
}

func (n *Near) left(ctx context.Context) error {
	n.mu.Lock()
	var leaving []*listener
	for l := range n.leaving {
		leaving = append(leaving, l)
	}
	n.mu.Unlock()
	for _, l := range leaving {
		select {
		case <-l.gone:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (n *Near) add(network string) *listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last++
	l := &listener{
		n: n, number: n.last, network: network,
		incoming: make(chan *incoming, Backlog),
		closed:   make(chan struct{}),
		gone:     make(chan struct{}),
	}
	n.listeners[l.number] = l
	return l
}

// remove takes the listener off the list; it tells whether it was on it.
func (n *Near) remove(l *listener) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[l.number] != l {
		return false
	}
	delete(n.listeners, l.number)
	if l.s != nil {
		n.leaving[l] = true
	}
	return true
}

// incoming is a connection that the far end accepted.
type incoming struct {
	l      *listener
	s      Stream
	origin net.Addr
}

func (in *incoming) LocalAddr() net.Addr  { return in.l.addr }
func (in *incoming) RemoteAddr() net.Addr { return in.origin }

func (in *incoming) Reject(why error) { refuse(in.s, why) }

// Accept takes one of "tcp".
func (in *incoming) Accept() (wiring.Stream, error) {
	c, err := in.accept()
	if err != nil {
		return nil, err
	}
	return c.(wiring.Stream), nil
}

func (in *incoming) accept() (net.Conn, error) {
	if err := say(in.s, message{kind: msgYes}); err != nil {
		in.s.Reset(nil)
		return nil, err
	}
	return in.l.n.mux.Conn(in.s, in.l.network, in.l.addr, in.origin), nil
}

// Open takes in a connection that was accepted at the far end. One that finds no
// listener, or no room in its backlog, is refused.
func (n *Near) Open(s Stream) {
	m, err := readMessage(s)
	if err != nil || m.kind != msgAccepted || !n.offer(m, s) {
		refuse(s, syscall.ECONNREFUSED)
	}
}

func (n *Near) offer(m message, s Stream) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.listeners[m.number]
	if l == nil {
		return false
	}
	select {
	case l.incoming <- &incoming{l, s, channel.WithWords(wiring.ParseAddr(l.network, m.a), m.b)}:
		return true
	default:
		return false
	}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, l.acceptError(l.err)
		case <-l.n.mux.Context().Done():
			return nil, l.acceptError(l.n.mux.Gone())
		case in := <-l.incoming:
			if l.network == "tcp" {
				return wiring.NewPending(in), nil
			}
			if c, err := in.accept(); err == nil {
				return c, nil
			}
		}
	}
}

func (l *listener) acceptError(err error) error {
	return &net.OpError{Op: "accept", Net: l.network, Addr: l.addr, Err: err}
}

func (l *listener) Addr() net.Addr { return l.addr }

// Close stops listening at the far end; connections that nobody accepted yet
// are refused. It does not wait for the far end.
func (l *listener) Close() error {
	l.end(net.ErrClosed)
	return nil
}

// end closes it, the first time; until the far end has too, its address is taken.
func (l *listener) end(why error) {
	if !l.n.remove(l) {
		return
	}
	l.err = why
	close(l.closed)
	l.s.CloseWrite()
	l.refuseAll()
}

func (l *listener) refuseAll() {
	for {
		select {
		case in := <-l.incoming:
			in.Reject(syscall.ECONNREFUSED)
		default:
			return
		}
	}
}
