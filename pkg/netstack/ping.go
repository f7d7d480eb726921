package netstack

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// An echoKey tells the runs of ping apart, as the kernel does.
type echoKey struct {
	src, dst netip.Addr
	id       uint16
}

// An echo is a flow of echo messages.
type echo struct {
	*run
	life     context.Context
	key      echoKey
	requests chan []byte
}

// echoWaiting is how many requests may wait for a flow's dial. They are sent
// one a second, so that more are a flood.
const echoWaiting = 64

// assembledEcho takes the echo requests that came in fragments, which only
// gVisor can put together again. It does not answer them itself: none of the
// addresses here is truly its own.
func (r *run) assembledEcho(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.ICMPv4(pkt.TransportHeader().Slice())
	if r.own(fromAddress(id.LocalAddress)) {
		return false
	}
	if len(h) < header.ICMPv4MinimumSize || h.Type() != header.ICMPv4Echo {
		return false
	}
	payload := pkt.Data().AsRange().ToSlice()
	r.echoRequest(fromAddress(id.RemoteAddress), fromAddress(id.LocalAddress), append([]byte(h), payload...))
	return true
}

// echoRequest gives a request to its flow, and begins the flow with the first.
func (r *run) echoRequest(src, dst netip.Addr, msg []byte) {
	key := echoKey{src, dst, binary.BigEndian.Uint16(msg[4:6])}
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.echoes[key]
	if e == nil {
		if r.over || !r.pings.enter(r.cfg.MaxPing) {
			return
		}
		e = &echo{run: r, life: r.life, key: key, requests: make(chan []byte, echoWaiting)}
		r.echoes[key] = e
		r.flows.Go(e.serve)
	}
	select {
	case e.requests <- msg:
	default: // lost, as on any way that is too narrow
	}
}

// leave makes the next request the first of another flow.
func (e *echo) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.echoes, e.key)
	e.pings.open.Add(-1)
}

// serve dials with the first request and carries them until none has come for
// a while.
func (e *echo) serve() {
	defer e.leave()
	first := <-e.requests
	far, err := e.dial()
	if err != nil {
		e.pings.failed.Add(1)
		e.cfg.Log.Debug("dial failed", "network", "ping", "address", e.key.dst, "err", err)
		e.tell(err, e.quote(first))
		return
	}
	e.carry(far, first)
}

func (e *echo) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(e.life, e.cfg.DialTimeout)
	defer cancel()
	return e.run.dial(ctx, e.key.src, "ping", e.key.dst.String())
}

// tell says of a request what has become of it. There are no ports here that
// could be the ones refused.
func (e *echo) tell(err error, q quote) {
	v := judge(err)
	if v.refused {
		v = noHost
	}
	if !v.silent {
		e.link.write(q.unreachable(v))
	}
}

func (e *echo) quote(msg []byte) quote {
	q := quote{src: e.key.src, dst: e.key.dst, proto: protoICMP}
	if e.key.dst.Is6() {
		q.proto = protoICMPv6
	}
	copy(q.head[:], msg)
	return q
}

// carry sends msg and the requests after it. What ends the flow is told of the
// last of them.
func (e *echo) carry(far net.Conn, msg []byte) {
	ctx, cancel := context.WithCancelCause(e.life)
	defer context.AfterFunc(ctx, func() { far.Close() })()
	var replies sync.WaitGroup
	replies.Go(func() { cancel(e.receive(far)) })

	idle := time.AfterFunc(pingIdle, func() { cancel(nil) })
	defer idle.Stop()
	var last quote
	for ctx.Err() == nil {
		last = e.quote(msg)
		n, err := far.Write(msg)
		e.pings.sent.Add(uint64(n))
		if err != nil && !relay.Lost(err) {
			cancel(err)
		}
		idle.Reset(pingIdle)
		select {
		case msg = <-e.requests:
		case <-ctx.Done():
		}
	}
	replies.Wait()
	e.tell(broken(context.Cause(ctx)), last)
}

// receive carries the far end's replies.
func (e *echo) receive(far net.Conn) error {
	buf := make([]byte, maxPacket)
	for {
		n, err := far.Read(buf)
		if err != nil {
			return err
		}
		if packet := e.reply(buf[:n]); packet != nil {
			e.link.write(packet)
			e.pings.received.Add(uint64(n))
		}
	}
}

// reply returns the packet for a reply, or nil if it's none.
func (e *echo) reply(msg []byte) []byte {
	kind := byte(header.ICMPv4EchoReply)
	if e.key.dst.Is6() {
		kind = byte(header.ICMPv6EchoReply)
	}
	if len(msg) < header.ICMPv4MinimumSize || msg[0] != kind || len(msg) > maxPacket-header.IPv4MinimumSize {
		return nil
	}
	binary.BigEndian.PutUint16(msg[4:6], e.key.id)
	return icmpPacket(e.key.dst, e.key.src, msg)
}
