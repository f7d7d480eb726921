package netstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
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

// appIdle is as long as the app's kernel keeps what it might forget.
const appIdle = 60 * time.Second

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
	ctx, cancel := context.WithCancelCause(r.ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() {
		err := reason(ctx)
		relay.Abort(far, err) // first, or the far end might be told of an end of file
		relay.Abort(app, err)
	})()
	defer app.onReset(cancel)()
	relay.Join(app, far)
}

// reason is why a connection is aborted: a stop, or what became of the app.
func reason(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return net.ErrClosed
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
	keepAlive(ep)
	return &tcpConn{TCPConn: gonet.NewTCPConn(&wq, ep), wq: &wq, ep: ep, count: &r.tcp}, nil
}

// keepAlive asks the app's kernel now and then whether it still knows of the
// connection: of one that the app has closed it forgets after a minute, and says
// nothing, while the far end may be silent for ever.
func keepAlive(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(appIdle)
	ep.SetSockOpt(&idle)
	ep.SocketOptions().SetKeepAlive(true)
}

// A tcpConn is the app's connection: gonet's, with errors that can be told
// apart, and with a reset as *net.TCPConn has it.
type tcpConn struct {
	*gonet.TCPConn
	wq    *waiter.Queue
	ep    tcpip.Endpoint
	count *counter
	ended atomic.Bool // the app's end of file has been read
	shut  atomic.Bool // the app has been told of the far end's
}

// Read takes no reset for an end of file. gVisor gives the error of an endpoint
// to the first who asks, which may have been a Write, and to others ends.
func (c *tcpConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.count.sent.Add(uint64(n))
	if err == io.EOF {
		c.ended.Store(true) // before the look at the state, see onReset
		if c.state() == tcp.StateError {
			return n, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
		}
	}
	return n, errno(err)
}

func (c *tcpConn) state() tcp.EndpointState { return tcp.EndpointState(c.ep.State()) }

// onReset calls end when the app resets between its end of file and the far
// end's, which nobody might see: nothing is read from it any more, and perhaps
// nothing written to it. Before that, Read tells, once all that came ahead of
// the reset is read. To gVisor an app's connection is closed by such a reset.
func (c *tcpConn) onReset(end func(error)) (stop func()) {
	entry := waiter.NewFunctionEntry(waiter.EventErr|waiter.EventHUp, func(waiter.EventMask) {
		gone := c.state() == tcp.StateError || c.state() == tcp.StateClose
		if gone && c.ended.Load() && !c.shut.Load() {
			end(syscall.ECONNRESET)
		}
	})
	c.wq.EventRegister(&entry)
	return func() { c.wq.EventUnregister(&entry) }
}

func (c *tcpConn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	c.count.received.Add(uint64(n))
	return n, errno(err)
}

// CloseWrite is a half-close.
func (c *tcpConn) CloseWrite() error {
	c.shut.Store(true)
	return errno(c.TCPConn.CloseWrite())
}

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
