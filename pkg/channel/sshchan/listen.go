package sshchan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// bound is where a listener listens at the far end: the host as it was asked
// for, which is how forwarded connections name it, and the port as it was given.
type bound struct {
	network, host string
	port          uint32
}

// forwardRequest is the payload of tcpip-forward and its cancellation.
type forwardRequest struct {
	Host string
	Port uint32
}

// dgramForward is the same for datagrams.
type dgramForward struct {
	Network string
	Host    string
	Port    uint32
}

type forwardReply struct{ Port uint32 }

// requests are what a listener of the network is asked for and cancelled with.
func (b bound) requests() (ask, cancel string, payload []byte) {
	if b.network == "tcp" {
		return forwardTCP, cancelTCP, ssh.Marshal(forwardRequest{b.host, b.port})
	}
	return forwardDatagram, cancelDatagram, ssh.Marshal(dgramForward{b.network, b.host, b.port})
}

// Listen has the far end listen. The address is taken there as it is: for a
// Network of names, a name.
func (c *Channel) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := c.listen(ctx, network, address)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: wiring.Addr{Net: network, Text: address}, Err: err}
	}
	return l, nil
}

func (c *Channel) listen(ctx context.Context, network, address string) (*listener, error) {
	if network != "tcp" && network != "udp" {
		return nil, net.UnknownNetworkError(network)
	}
	if err := c.w.carries(network); err != nil {
		return nil, err
	}
	if c.attached {
		return nil, fmt.Errorf("no listener through a control socket: %w", errors.ErrUnsupported)
	}
	t, err := parseTarget(address)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.w.Context().Err() != nil {
		return nil, c.w.Gone()
	}
	type result struct {
		l   *listener
		err error
	}
	res := make(chan result, 1)
	go func() {
		l, err := c.ask(bound{network, t.Host, t.Port})
		res <- result{l, err}
	}()
	select {
	case r := <-res:
		return r.l, r.err
	case <-ctx.Done():
		go func() {
			if r := <-res; r.err == nil {
				r.l.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// ask asks the far end. Until its answer is noted, connections that it forwards
// are not looked up in vain.
func (c *Channel) ask(b bound) (*listener, error) {
	c.asking.Lock()
	defer c.asking.Unlock()
	ask, _, payload := b.requests()
	ok, reply, err := c.w.conn.SendRequest(ask, true, payload)
	if err != nil {
		return nil, c.w.Gone()
	}
	if !ok {
		return nil, notForwarded(reply)
	}
	var r forwardReply
	if b.port == 0 {
		if err := ssh.Unmarshal(reply, &r); err != nil {
			return nil, err
		}
		b.port = r.Port
	}
	return c.add(b), nil
}

// notForwarded is the error of a refused request. Only our own ends say why.
func notForwarded(reply []byte) error {
	if len(reply) > 0 {
		return wiring.Hear(string(reply), "")
	}
	return wiring.Wordy("the other end refused", syscall.EACCES)
}

// backlog is how many connections wait to be accepted: as many as Linux has it.
// A burst is not to be refused that who accepts is about to take.
const backlog = 4096

// listener is the near end of a listener at the far end.
type listener struct {
	c        *Channel
	at       bound
	addr     net.Addr
	incoming chan *incoming
	closed   chan struct{}
}

func (c *Channel) add(b bound) *listener {
	l := &listener{
		c: c, at: b,
		addr:     wiring.ParseAddr(b.network, target{Host: b.host, Port: b.port}.address(b.network)),
		incoming: make(chan *incoming, backlog),
		closed:   make(chan struct{}),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listeners[b] = l
	return l
}

// open takes in a connection that was accepted at the far end.
func (c *Channel) open(nc ssh.NewChannel) {
	if kind := nc.ChannelType(); kind != forwardedTCP && kind != forwardedDgram {
		nc.Reject(ssh.UnknownChannelType, "unknown channel type "+kind)
		return
	}
	network, t, err := parsePayload(nc.ChannelType(), nc.ExtraData())
	if err != nil {
		nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	b := bound{network, t.Host, t.Port}
	in := &incoming{w: c.w, nc: nc, network: network, origin: wiring.ParseAddr(network, net.JoinHostPort(t.OriginHost, fmt.Sprint(t.OriginPort)))}
	if c.offer(b, in) {
		return
	}
	c.asking.RLock() // a Listen may just be learning its port
	defer c.asking.RUnlock()
	if !c.offer(b, in) {
		nc.Reject(ssh.ConnectionFailed, "Connection refused")
	}
}

// incoming is a connection that the far end accepted, from before its SSH channel
// is confirmed.
type incoming struct {
	w             *wire
	nc            ssh.NewChannel
	network       string
	local, origin net.Addr
}

func (in *incoming) LocalAddr() net.Addr  { return in.local }
func (in *incoming) RemoteAddr() net.Addr { return in.origin }

func (in *incoming) Reject(why error) { in.nc.Reject(reason(why), wiring.Say(why)) }

// Accept takes one of "tcp".
func (in *incoming) Accept() (wiring.Stream, error) {
	c, err := in.accept()
	if err != nil {
		return nil, err
	}
	return c.(stream), nil
}

func (in *incoming) accept() (net.Conn, error) {
	ch, reqs, err := in.nc.Accept()
	if err != nil {
		return nil, in.w.Gone()
	}
	return newConn(in.w, ch, reqs, in.network, in.local, in.origin), nil
}

// offer puts a connection into its listener's backlog; one that finds no room
// is refused.
func (c *Channel) offer(b bound, in *incoming) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.listeners[b]
	if l == nil {
		return false
	}
	in.local = l.addr
	select {
	case l.incoming <- in:
	default:
		go in.nc.Reject(ssh.ResourceShortage, "too many connections wait")
	}
	return true
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, l.acceptError(net.ErrClosed)
		case <-l.c.w.Context().Done():
			return nil, l.acceptError(l.c.w.Gone())
		case in := <-l.incoming:
			if l.at.network == "tcp" {
				return wiring.NewPending(in), nil
			}
			if c, err := in.accept(); err == nil {
				return c, nil
			}
		}
	}
}

func (l *listener) acceptError(err error) error {
	return &net.OpError{Op: "accept", Net: l.at.network, Addr: l.addr, Err: err}
}

func (l *listener) Addr() net.Addr { return l.addr }

// Close stops listening at the far end; connections that nobody accepted yet
// are refused.
func (l *listener) Close() error {
	if !l.remove() {
		return nil
	}
	close(l.closed)
	_, cancel, payload := l.at.requests()
	l.c.w.conn.SendRequest(cancel, false, payload)
	for {
		select {
		case in := <-l.incoming:
			in.Reject(syscall.ECONNREFUSED)
		default:
			return nil
		}
	}
}

// remove takes the listener off the list; it tells whether it was on it.
func (l *listener) remove() bool {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	if l.c.listeners[l.at] != l {
		return false
	}
	delete(l.c.listeners, l.at)
	return true
}
