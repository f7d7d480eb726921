package netstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// handshakeTimeout is for a kernel on the same machine.
const handshakeTimeout = 10 * time.Second

// An attempt is a SYN that is dialed for.
type attempt struct {
	ctx    context.Context
	cancel context.CancelFunc
	quote  quote
}

// tcpHandler takes the segments that belong to no connection. A SYN begins an
// attempt, a RST ends it: so says an app that gives up before it's answered.
func (r *run) tcpHandler() func(stack.TransportEndpointID, *stack.PacketBuffer) bool {
	forwarder := tcp.NewForwarder(r.ip, receiveWindow, r.cfg.MaxDials, r.serveTCP)
	return func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		h := header.TCP(pkt.TransportHeader().Slice())
		if len(h) < header.TCPMinimumSize {
			return true
		}
		switch flags := h.Flags(); {
		case flags.Contains(header.TCPFlagRst):
			r.abandon(id)
			return true
		case flags.Contains(header.TCPFlagSyn) && !flags.Contains(header.TCPFlagAck):
			if r.attempt(id, h) && !forwarder.HandlePacket(id, pkt) {
				r.settled(id) // it was malformed
			}
			return true
		}
		return false // and gVisor answers with a RST
	}
}

// attempt notes a SYN, unless it's one that is being dialed for, or one too
// many. The app's kernel sends it again.
func (r *run) attempt(id stack.TransportEndpointID, h header.TCP) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dialing[id] != nil || len(r.dialing) >= r.cfg.MaxDials {
		return false
	}
	a := &attempt{quote: quoteOf(id, uint8(tcp.ProtocolNumber), h)}
	a.ctx, a.cancel = context.WithTimeout(r.ctx, r.cfg.DialTimeout)
	r.dialing[id] = a
	return true
}

func quoteOf(id stack.TransportEndpointID, proto uint8, transport []byte) quote {
	q := quote{src: fromAddress(id.RemoteAddress), dst: fromAddress(id.LocalAddress), proto: proto}
	copy(q.head[:], transport)
	return q
}

func (r *run) abandon(id stack.TransportEndpointID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.dialing[id]; a != nil {
		a.cancel()
	}
}

// settled forgets the attempt: another SYN would be a new one.
func (r *run) settled(id stack.TransportEndpointID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dialing[id].cancel()
	delete(r.dialing, id)
}

// serveTCP dials for a SYN, answers it, and joins the two connections.
func (r *run) serveTCP(req *tcp.ForwarderRequest) {
	id := req.ID()
	if !r.begin() {
		req.Complete(false)
		return
	}
	defer r.flows.Done()
	app, far := r.connectTCP(id, req)
	if app == nil {
		return
	}
	r.tcp.open.Add(1)
	defer r.tcp.open.Add(-1)
	defer context.AfterFunc(r.ctx, func() {
		relay.Abort(app, net.ErrClosed)
		relay.Abort(far, net.ErrClosed)
	})()
	relay.Join(app, far)
}

// connectTCP dials first and only then completes the app's handshake.
func (r *run) connectTCP(id stack.TransportEndpointID, req *tcp.ForwarderRequest) (*tcpConn, net.Conn) {
	r.mu.Lock()
	a := r.dialing[id]
	r.mu.Unlock()
	defer r.settled(id)

	to := netip.AddrPortFrom(a.quote.dst, id.LocalPort).String()
	far, err := r.cfg.Network.DialContext(a.ctx, "tcp", to)
	if err != nil {
		r.tcp.failed.Add(1)
		r.cfg.Log.Debug("dial failed", "network", "tcp", "address", to, "err", err)
		v := judge(err)
		if !v.silent && !v.refused {
			r.link.write(a.quote.unreachable(v))
		}
		req.Complete(v.refused)
		return nil, nil
	}
	app, err := r.handshake(a.ctx, req)
	req.Complete(false)
	if err != nil {
		relay.Abort(far, err)
		return nil, nil
	}
	return app, far
}

// handshake completes the app's handshake, which is over at once unless the
// app has left meanwhile.
func (r *run) handshake(ctx context.Context, req *tcp.ForwarderRequest) (*tcpConn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var wq waiter.Queue
	// gVisor waits for an event, and then looks what has become of it.
	defer context.AfterFunc(ctx, func() { wq.Notify(waiter.WritableEvents) })()
	ep, err := req.CreateEndpoint(&wq)
	if err != nil {
		return nil, errors.New(err.String())
	}
	return &tcpConn{TCPConn: gonet.NewTCPConn(&wq, ep), ep: ep, count: &r.tcp}, nil
}

// A tcpConn is the app's connection: gonet's, with errors that can be told
// apart, and with a reset as *net.TCPConn has it.
type tcpConn struct {
	*gonet.TCPConn
	ep    tcpip.Endpoint
	count *counter
}

func (c *tcpConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.count.sent.Add(uint64(n))
	return n, errno(err)
}

func (c *tcpConn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	c.count.received.Add(uint64(n))
	return n, errno(err)
}

// CloseWrite is a half-close.
func (c *tcpConn) CloseWrite() error { return errno(c.TCPConn.CloseWrite()) }

// SetLinger with 0 makes Close a reset.
func (c *tcpConn) SetLinger(sec int) error {
	c.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: sec >= 0, Timeout: time.Duration(max(sec, 0)) * time.Second})
	return nil
}

// errno gives an error of gonet, which is only words, the errno of the kernel.
func errno(err error) error {
	var op *net.OpError
	if err == nil || err == io.EOF || !errors.As(err, &op) || op.Timeout() {
		return err
	}
	switch op.Err.Error() {
	case (&tcpip.ErrConnectionReset{}).String():
		op.Err = syscall.ECONNRESET
	case (&tcpip.ErrTimeout{}).String():
		op.Err = syscall.ETIMEDOUT
	case (&tcpip.ErrClosedForSend{}).String():
		op.Err = syscall.EPIPE
	case (&tcpip.ErrAborted{}).String(), (&tcpip.ErrConnectionAborted{}).String(),
		(&tcpip.ErrInvalidEndpointState{}).String(), (&tcpip.ErrNotConnected{}).String():
		op.Err = net.ErrClosed
	}
	return err
}
