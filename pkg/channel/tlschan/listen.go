package tlschan

import (
	"context"
	"io"
	"net"
	"syscall"

	"github.com/libp2p/go-yamux/v5"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// backlog is how many connections wait to be accepted: as many as Linux has it.
// A burst is not to be refused that who accepts is about to take.
const backlog = 4096

// listener is the near end of a listener at the far end.
type listener struct {
	c        *Channel
	number   uint32
	network  string
	addr     net.Addr
	s        *yamux.Stream // it lives as long
	incoming chan *incoming
	closed   chan struct{}
	gone     chan struct{} // closed when the far end has closed it, too
}

// Listen has the far end listen. The address is taken there as it is: for a
// Network of names, a name.
func (c *Channel) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := c.listen(ctx, network, address)
	if err != nil {
		return nil, opError("listen", network, address, err)
	}
	return l, nil
}

// listen waits for those to leave that may still have the address. What is accepted
// before the answer is here waits in the backlog.
func (c *Channel) listen(ctx context.Context, network, address string) (*listener, error) {
	if network != "tcp" && network != "udp" {
		return nil, net.UnknownNetworkError(network)
	}
	if err := c.left(ctx); err != nil {
		return nil, err
	}
	l := c.add(network)
	s, err := c.w.begin(ctx, message{kind: msgListen, number: l.number, a: network, b: address})
	if err == nil {
		var m message
		m, err = c.w.answered(ctx, s, address)
		l.s, l.addr = s, wiring.ParseAddr(network, m.a)
	}
	if err != nil {
		c.remove(l)
		l.refuseAll()
		return nil, err
	}
	return l, nil
}

func (c *Channel) left(ctx context.Context) error {
	c.mu.Lock()
	var leaving []*listener
	for l := range c.leaving {
		leaving = append(leaving, l)
	}
	c.mu.Unlock()
	for _, l := range leaving {
		select {
		case <-l.gone:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (c *Channel) add(network string) *listener {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last++
	l := &listener{
		c: c, number: c.last, network: network,
		incoming: make(chan *incoming, backlog),
		closed:   make(chan struct{}),
		gone:     make(chan struct{}),
	}
	c.listeners[l.number] = l
	return l
}

// remove takes the listener off the list; it tells whether it was on it.
func (c *Channel) remove(l *listener) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.listeners[l.number] != l {
		return false
	}
	delete(c.listeners, l.number)
	return true
}

// incoming is a connection that the far end accepted.
type incoming struct {
	l      *listener
	s      *yamux.Stream
	origin net.Addr
}

func (in *incoming) LocalAddr() net.Addr  { return in.l.addr }
func (in *incoming) RemoteAddr() net.Addr { return in.origin }

func (in *incoming) Reject(why error) { in.l.c.w.refuse(in.s, why) }

// Accept takes one of "tcp".
func (in *incoming) Accept() (wiring.Stream, error) {
	c, err := in.accept()
	if err != nil {
		return nil, err
	}
	return c.(stream), nil
}

func (in *incoming) accept() (net.Conn, error) {
	w := in.l.c.w
	if err := w.say(in.s, message{kind: msgYes}); err != nil {
		in.s.ResetWithError(codeClosed)
		return nil, w.failed(context.Background(), err)
	}
	return newConn(w, in.s, in.l.network, in.l.addr, in.origin), nil
}

// open takes in a connection that was accepted at the far end. One that finds no
// listener, or no room in its backlog, is refused.
func (c *Channel) open(s *yamux.Stream) {
	m, err := readMessage(s)
	if err != nil || m.kind != msgAccepted || !c.offer(m, s) {
		c.w.refuse(s, syscall.ECONNREFUSED)
	}
}

func (c *Channel) offer(m message, s *yamux.Stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.listeners[m.number]
	if l == nil {
		return false
	}
	select {
	case l.incoming <- &incoming{l, s, wiring.ParseAddr(l.network, m.a)}:
		return true
	default:
		return false
	}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, l.acceptError(net.ErrClosed)
		case <-l.c.w.Context().Done():
			return nil, l.acceptError(l.c.w.Gone())
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
	if !l.c.remove(l) {
		return nil
	}
	close(l.closed)
	l.c.leave(l)
	l.refuseAll()
	return nil
}

// leave has the far end close the listener, and notes when it has.
func (c *Channel) leave(l *listener) {
	c.mu.Lock()
	c.leaving[l] = true
	c.mu.Unlock()
	l.s.CloseWrite()
	c.w.Spawn(func() {
		io.Copy(io.Discard, l.s) // ends with the stream
		l.s.ResetWithError(codeClosed)
		c.mu.Lock()
		delete(c.leaving, l)
		c.mu.Unlock()
		close(l.gone)
	})
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
