package netstack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// udpPacket takes a datagram that belongs to no flow: it begins one. What comes
// while the flow is dialed waits in its endpoint.
func (r *run) udpPacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	if r.own(fromAddress(id.LocalAddress)) {
		return false // nobody listens there
	}
	q := quoteOf(id, uint8(udp.ProtocolNumber), pkt.TransportHeader().Slice())
	begin := func(req *udp.ForwarderRequest) {
		f := &udpFlow{run: r, life: r.alive(), quote: q, to: netip.AddrPortFrom(q.dst, id.LocalPort)}
		if !f.begin(req) {
			r.udp.open.Add(-1)
			return
		}
		go func() {
			defer r.flows.Done()
			defer r.udp.open.Add(-1)
			f.serve()
		}()
	}
	if r.udp.enter(r.cfg.MaxUDP) {
		udp.NewForwarder(r.ip, begin).HandlePacket(id, pkt)
	}
	return true
}

// A udpFlow is all datagrams between two sockets.
type udpFlow struct {
	*run
	life  context.Context
	quote quote
	to    netip.AddrPort
	wq    waiter.Queue
	ep    tcpip.Endpoint
	idle  *time.Timer
}

// begin makes the flow's endpoint, unless it's too late.
func (f *udpFlow) begin(req *udp.ForwarderRequest) bool {
	var err tcpip.Error
	if f.ep, err = req.CreateEndpoint(&f.wq); err != nil {
		return false
	}
	if !f.run.begin() {
		f.ep.Close()
		return false
	}
	return true
}

// serve dials and carries datagrams until there have been none for a while, or
// one of the ends says that there is nobody.
func (f *udpFlow) serve() {
	defer f.ep.Close()
	far, err := f.dial()
	if err != nil {
		f.udp.failed.Add(1)
		f.cfg.Log.Debug("dial failed", "network", "udp", "address", f.to, "err", err)
	} else {
		err = broken(f.carry(far))
	}
	if v := judge(err); !v.silent {
		f.link.write(f.quote.unreachable(v))
	}
}

// broken is why a flow of datagrams ended that was open once. That it was just
// closed is nothing to tell the app: its next datagram begins another.
func broken(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
		return context.Canceled
	}
	return err
}

func (f *udpFlow) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(f.life, f.cfg.DialTimeout)
	defer cancel()
	return f.run.dial(ctx, f.quote.src, "udp", f.to.String())
}

// carry returns what ended the flow.
func (f *udpFlow) carry(far net.Conn) error {
	ctx, cancel := context.WithCancelCause(f.life)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { far.Close() })()
	f.idle = time.AfterFunc(f.patience(), func() { cancel(nil) })
	defer f.idle.Stop()

	var up sync.WaitGroup
	up.Go(func() { cancel(f.send(ctx, far)) })
	cancel(f.receive(far))
	up.Wait()
	return context.Cause(ctx)
}

func (f *udpFlow) patience() time.Duration {
	if f.to.Port() == 53 {
		return min(shortIdle, f.cfg.UDPIdle)
	}
	return f.cfg.UDPIdle
}

// send carries the app's datagrams until there is an error, nil being that the
// app has left. It holds no more memory than they need, since most flows are
// few and small ones.
func (f *udpFlow) send(ctx context.Context, far net.Conn) error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventErr | waiter.EventHUp)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	var datagram bytes.Buffer
	for {
		datagram.Reset()
		_, err := f.ep.Read(&datagram, tcpip.ReadOptions{})
		if _, none := err.(*tcpip.ErrWouldBlock); none {
			select {
			case <-ready:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		if err != nil {
			return nil
		}
		f.idle.Reset(f.patience())
		n, werr := far.Write(datagram.Bytes())
		f.udp.sent.Add(uint64(n))
		if werr != nil && !relay.Lost(werr) {
			return werr
		}
	}
}

// receive carries the far end's datagrams, and returns what ends them.
func (f *udpFlow) receive(far net.Conn) error {
	datagram := make([]byte, maxPacket)
	for {
		n, err := far.Read(datagram)
		if err != nil {
			return err
		}
		f.idle.Reset(f.patience())
		if _, err := f.ep.Write(bytes.NewReader(datagram[:n]), tcpip.WriteOptions{}); err == nil {
			f.udp.received.Add(uint64(n))
		}
	}
}
