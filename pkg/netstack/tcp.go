package netstack

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/ports"
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
	life   context.Context // of the flow, once it's dialed for
	ctx    context.Context
	cancel context.CancelFunc
	quote  quote
}

// tcpHandler takes the segments that belong to no connection. A SYN begins an
// attempt, a RST ends it: so says an app that gives up before it's answered.
func (r *run) tcpHandler() func(stack.TransportEndpointID, *stack.PacketBuffer) bool {
	window, few := receiveWindow, int64(math.MaxInt64)
	if r.cfg.Remote {
		window, few = remoteWindow, remoteFew
	}
	first := tcp.NewForwarder(r.ip, window, r.cfg.MaxDials, r.serveTCP)
	others := tcp.NewForwarder(r.ip, crowdedWindow, r.cfg.MaxDials, r.serveTCP)
	return func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		if r.own(fromAddress(id.LocalAddress)) {
			return false // nobody listens there
		}
		h := header.TCP(pkt.TransportHeader().Slice())
		if len(h) < header.TCPMinimumSize {
			return true
		}
		switch flags := h.Flags(); {
		case flags.Contains(header.TCPFlagRst):
			r.abandon(id)
			return true
		case flags.Contains(header.TCPFlagSyn) && !flags.Contains(header.TCPFlagAck):
			forwarder := first
			if r.tcp.open.Load() >= few {
				forwarder = others
			}
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
	dials := len(r.dialing)
	if r.dialing[id] != nil || dials >= r.cfg.MaxDials || r.tcp.open.Load()+int64(dials) >= int64(r.cfg.MaxTCP) {
		return false
	}
	a := &attempt{life: r.life, quote: quoteOf(id, uint8(tcp.ProtocolNumber), h)}
	a.ctx, a.cancel = context.WithTimeout(a.life, r.cfg.DialTimeout)
	r.dialing[id] = a
	return true
}

// reopen makes way for the SYN of a port that comes again while gVisor still waits for
// what strays: it drops that otherwise, and resets it if the wait ends just then. The
// connection before hears of no packet any more, and what it got may still be read. That
// an old SYN may come so late is bearable: nobody confirms the answer (RFC 6191).
func (r *run) reopen(p packet, segment []byte) {
	ip, id := protocol(p.dst), p.endpoint(segment)
	ep, ok := r.ip.FindTransportEndpoint(ip, tcp.ProtocolNumber, id, nic).(*tcp.Endpoint)
	if ok && tcp.EndpointState(ep.State()) == tcp.StateTimeWait {
		r.ip.UnregisterTransportEndpoint([]tcpip.NetworkProtocolNumber{ip}, tcp.ProtocolNumber, id, ep, ports.Flags{}, 0)
	}
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

func (r *run) dials(id stack.TransportEndpointID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dialing[id] != nil
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
	r.mu.Lock()
	a := r.dialing[id]
	r.mu.Unlock()
	app, far := r.connectTCP(a, id, req)
	if app == nil {
		return
	}
	r.tcp.open.Add(1)
	defer r.tcp.open.Add(-1)
	ctx, cancel := context.WithCancelCause(a.life)
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
func (r *run) connectTCP(a *attempt, id stack.TransportEndpointID, req *tcp.ForwarderRequest) (*tcpConn, net.Conn) {
	defer r.settled(id)

	to := netip.AddrPortFrom(a.quote.dst, id.LocalPort).String()
	far, err := r.dial(a.ctx, a.quote.src, "tcp", to)
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
	return newTCPConn(&wq, ep, &r.tcp, r.flight), nil
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

	flight *flight      // nil: its other end is on this machine
	epoch  atomic.Int64 // of the flight, when it was asked last
	full   atomic.Bool  // its buffer was, since then
}

// newTCPConn makes one. The other end is asked now and then whether it still knows of
// the connection: of one that the app has closed its kernel forgets after a minute, and
// says nothing, and what another machine said may be lost.
func newTCPConn(wq *waiter.Queue, ep tcpip.Endpoint, count *counter, f *flight) *tcpConn {
	c := &tcpConn{TCPConn: gonet.NewTCPConn(wq, ep), wq: wq, ep: ep, count: count, flight: f}
	c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: appIdle})
	return c
}

// SetKeepAliveConfig is that of *net.TCPConn; what is zero stays as it is.
func (c *tcpConn) SetKeepAliveConfig(k net.KeepAliveConfig) error {
	idle, interval := tcpip.KeepaliveIdleOption(k.Idle), tcpip.KeepaliveIntervalOption(k.Interval)
	if interval > 0 {
		c.ep.SetSockOpt(&interval)
	}
	if k.Count > 0 {
		c.ep.SetSockOptInt(tcpip.KeepaliveCountOption, k.Count)
	}
	if idle > 0 {
		c.ep.SetSockOpt(&idle)
	}
	c.ep.SocketOptions().SetKeepAlive(k.Enable)
	return nil
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
	n, err := c.flight.write(c, b)
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

// errnos are what the kernel calls gVisor's errors.
var errnos = []struct {
	ip  tcpip.Error
	err error
}{
	{&tcpip.ErrConnectionReset{}, syscall.ECONNRESET},
	{&tcpip.ErrConnectionRefused{}, syscall.ECONNREFUSED},
	{&tcpip.ErrTimeout{}, syscall.ETIMEDOUT},
	{&tcpip.ErrHostUnreachable{}, syscall.EHOSTUNREACH},
	{&tcpip.ErrNetworkUnreachable{}, syscall.ENETUNREACH},
	{&tcpip.ErrMessageTooLong{}, syscall.EMSGSIZE},
	{&tcpip.ErrPortInUse{}, syscall.EADDRINUSE},
	{&tcpip.ErrBadLocalAddress{}, syscall.EADDRNOTAVAIL},
	{&tcpip.ErrClosedForSend{}, syscall.EPIPE},
	{&tcpip.ErrAborted{}, net.ErrClosed},
	{&tcpip.ErrConnectionAborted{}, net.ErrClosed},
	{&tcpip.ErrInvalidEndpointState{}, net.ErrClosed},
	{&tcpip.ErrNotConnected{}, net.ErrClosed},
}

// errno gives an error of gonet, which is only words, the errno of the kernel.
func errno(err error) error {
	var op *net.OpError
	if err == nil || err == io.EOF || !errors.As(err, &op) || op.Timeout() {
		return err
	}
	for _, e := range errnos {
		if op.Err.Error() == e.ip.String() {
			op.Err = e.err
			break
		}
	}
	return err
}
