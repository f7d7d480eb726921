package wgchan

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/netstack"
)

// Where each end listens in the tunnel.
const (
	controlPort = 1 // the far end only: a connection lives as long as a wire
	streamPort  = 2
)

// wire is what the connection to the control port stands for, at both ends. Its
// streams are connections between the netstacks.
type wire struct {
	*wiring.Life
	stack   *netstack.Stack
	control net.Conn
	self    netip.Addr
	other   netip.Addr

	mu      sync.Mutex
	streams map[place]*stream // nil when there can be no more
}

// place is where a stream is, as this end sees it.
type place struct {
	network     string
	self, other netip.AddrPort
}

func placeOf(c net.Conn) place {
	self, _ := netip.ParseAddrPort(c.LocalAddr().String())
	other, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	return place{c.LocalAddr().Network(), self, other}
}

// line is what a wire runs over: all that comes by the leg is a sign of life.
type line struct {
	heard *atomic.Uint64
	end   func() // what runs below the wire, and for it only
	cut   func()

	mu  sync.Mutex
	err error
}

func (l *line) Fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
}

func (l *line) Cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *line) Heard() uint64 { return l.heard.Load() }

func (l *line) Close() error {
	l.cut()
	l.end()
	return nil
}

func (l *line) Cut() { l.cut() }

// newWire makes a wire of a connection between the control ports.
func newWire(stack *netstack.Stack, leg *leg, control net.Conn, beat time.Duration, alive func(), end func()) *wire {
	w := &wire{stack: stack, control: control, self: leg.self, other: leg.other, streams: make(map[place]*stream)}
	line := &line{heard: &leg.heard, end: end, cut: w.cut}
	w.Life = &wiring.Life{Line: line, Beat: beat, OnAlive: alive, HangUp: w.hangUp}
	return w
}

// probe has the near end's netstack ask with each beat whether the far end still knows of
// a connection where nothing is said. Signs of life are answered without a wire, too: of
// one that was dropped while this machine slept, nothing else tells. Of silence Life does.
func (w *wire) probe(c net.Conn) {
	every := max(w.Beat, time.Second) // gVisor answers twice a second at most
	c.(interface {
		SetKeepAliveConfig(net.KeepAliveConfig) error
	}).SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: every, Interval: every, Count: 2 * wiring.Beats})
}

// lastWords is how long the other end has to hear that the wire is closed.
const lastWords = time.Second

// hangUp ends the streams, and tells the other end, which does the same.
func (w *wire) hangUp() {
	w.breakStreams()
	w.control.(interface{ CloseWrite() error }).CloseWrite()
	w.control.SetReadDeadline(time.Now().Add(lastWords))
}

// cut ends the wire without a word.
func (w *wire) cut() {
	w.breakStreams()
	w.control.Close()
}

// over waits until the other end hangs up, or answers that this one has. What comes
// before that are the streams that it has reset: this end's netstack asks whether
// they are, and is told in TCP's own order, behind what came before.
func (w *wire) over() error {
	var p [4]byte
	for {
		if _, err := io.ReadFull(w.control, p[:]); err != nil {
			return wiring.ErrHungUp
		}
		other, self := binary.BigEndian.Uint16(p[:]), binary.BigEndian.Uint16(p[2:])
		at := place{"tcp", netip.AddrPortFrom(w.self, self), netip.AddrPortFrom(w.other, other)}
		w.mu.Lock()
		s := w.streams[at]
		w.mu.Unlock()
		if s != nil {
			w.probe(s.conn)
		}
	}
}

// tell tells the other end of a stream that is reset. TCP says that once, and never
// again should it be lost, while the other end may only wait to read.
func (w *wire) tell(at place) {
	if at.network != "tcp" || at.other.Addr() != w.other {
		return
	}
	b := binary.BigEndian.AppendUint16(nil, at.self.Port())
	w.control.SetWriteDeadline(time.Now().Add(lastWords))
	w.control.Write(binary.BigEndian.AppendUint16(b, at.other.Port()))
}

// breakStreams resets what is open, and lets nothing open any more.
func (w *wire) breakStreams() {
	w.mu.Lock()
	all := w.streams
	w.streams = nil
	w.mu.Unlock()
	for _, s := range all {
		s.reset()
	}
}

// LocalAddr and RemoteAddr are the ends' addresses in the tunnel.
func (w *wire) LocalAddr() net.Addr  { return &net.IPAddr{IP: w.self.AsSlice()} }
func (w *wire) RemoteAddr() net.Addr { return &net.IPAddr{IP: w.other.AsSlice()} }

// Open opens a stream.
func (w *wire) Open(ctx context.Context, words []byte) (signalling.Stream, error) {
	s, err := w.dial(ctx, "tcp", netip.AddrPortFrom(w.other, streamPort).String())
	if err != nil && ctx.Err() == nil {
		err = w.ending(err)
	}
	if err != nil {
		return nil, err
	}
	if _, err := s.Write(words); err != nil {
		s.Reset(err)
		return nil, err
	}
	return s, nil
}

// ending is the error of what met the end of the wire, which is told on another
// connection and may come later. It is no answer to what was asked for.
func (w *wire) ending(err error) error {
	t := time.NewTimer(lastWords)
	defer t.Stop()
	select {
	case <-w.Context().Done():
		return w.Gone()
	case <-t.C:
		return fmt.Errorf("no answer: %v", err)
	}
}

// dial connects the netstacks, or this one to an address that is the other's to dial.
func (w *wire) dial(ctx context.Context, network, address string) (*stream, error) {
	if w.Line.Cause() != nil {
		return nil, w.Gone()
	}
	c, err := w.stack.DialContext(ctx, network, address)
	if err != nil {
		return nil, w.why(err)
	}
	return w.stream(c)
}

// stream makes a stream of a connection between the netstacks.
func (w *wire) stream(c net.Conn) (*stream, error) {
	at := placeOf(c)
	s := &stream{conn: c, w: w, at: at, closed: make(chan struct{}), writing: make(chan struct{}, 1)}
	w.mu.Lock()
	over := w.streams == nil
	if !over {
		w.streams[at] = s
	}
	w.mu.Unlock()
	if over {
		s.reset()
		return nil, w.Gone()
	}
	return s, nil
}

// many is how many streams are open.
func (w *wire) many() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.streams)
}

// accept takes in the streams that the other end opens.
func (w *wire) accept(l net.Listener, open func(signalling.Stream)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if s, err := w.stream(c); err == nil {
			w.Spawn(func() { open(s) })
		}
	}
}

// why is the reason behind an error of the netstack.
func (w *wire) why(err error) error {
	var op *net.OpError
	if w.Line.Cause() != nil {
		return w.Gone()
	}
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
