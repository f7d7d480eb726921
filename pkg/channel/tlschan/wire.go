package tlschan

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// wire is one TLS connection and its streams, the same at both ends.
type wire struct {
	*wiring.Life
	cfg  Config
	conn net.Conn
	mux  *yamux.Session

	control *yamux.Stream
	born    time.Time
	asked   atomic.Int64 // when the sign that has no answer yet was asked for
	rtt     atomic.Int64
}

// end is how the two ends of a wire differ.
type end struct {
	tls     func(net.Conn, *tls.Config) *tls.Conn
	mux     func(net.Conn, *yamux.Config, func() (yamux.MemoryManager, error)) (*yamux.Session, error)
	control func(context.Context, *yamux.Session) (*yamux.Stream, error)
}

var (
	nearEnd = end{tls.Client, yamux.Client, func(_ context.Context, s *yamux.Session) (*yamux.Stream, error) { return s.AcceptStream() }}
	farEnd  = end{tls.Server, yamux.Server, func(ctx context.Context, s *yamux.Session) (*yamux.Stream, error) { return s.OpenStream(ctx) }}
)

// handshake makes a wire of conn, bounded by ctx and as silence is, also where
// conn has no deadlines. made is called with it before anything goes on, and open
// with each stream that the other end opens.
func handshake(ctx context.Context, conn net.Conn, cfg Config, e end, made func(*wire), open func(*yamux.Stream)) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, wiring.Limit(cfg.Beat))
	defer cancel()
	t := wiring.NewTap(conn)
	stop := context.AfterFunc(ctx, func() { t.Close() })
	w, err := shake(ctx, t, cfg, e)
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		t.Close()
		if w != nil {
			w.mux.Close()
		}
		return nil, fmt.Errorf("tls handshake: %w", err)
	}
	made(w)
	w.Begin(w.over, func() { w.streams(open) }, w.beat, w.listen)
	return w, nil
}

// shake returns a wire with its error, where the mux has begun.
func shake(ctx context.Context, t *wiring.Tap, cfg Config, e end) (*wire, error) {
	settings, err := cfg.Identity.tls()
	if err != nil {
		return nil, err
	}
	conn := e.tls(t, settings)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	w := &wire{cfg: cfg, conn: conn, born: time.Now()}
	if w.mux, err = e.mux(&secured{conn, t}, muxSettings(), newBudget().share); err != nil {
		return nil, err
	}
	w.Life = &wiring.Life{Tap: t, Beat: cfg.Beat, OnAlive: cfg.OnAlive, HangUp: func() { conn.Close() }}
	if w.control, err = e.control(ctx, w.mux); err != nil && t.Cause() != nil {
		err = t.Cause()
	}
	return w, err
}

// muxSettings leave to yamux the streams and their windows only. It is the tap
// that knows whether the wire lives, and the flows' turns that keep data waiting.
func muxSettings() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = backlog
	c.MaxIncomingStreams = math.MaxUint32
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = time.Hour
	c.ReadBufSize = 0 // TLS has one, and the tap
	c.LogOutput = io.Discard
	return c
}

// secured is the TLS connection below the mux. It tells the tap why it ends, before
// the mux closes it.
type secured struct {
	*tls.Conn
	t *wiring.Tap
}

const frameHeader = 12

var errMux = errors.New("the other end broke the rules of the mux")

func (s *secured) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if err == io.EOF {
		s.t.Fail(wiring.ErrHungUp)
	} else if err != nil {
		s.t.Fail(err)
	}
	return n, err
}

func (s *secured) Close() error {
	s.t.Fail(errMux) // if nobody knows a better reason
	return s.Conn.Close()
}

// Write writes a frame: the mux never gives less or more.
func (s *secured) Write(p []byte) (int, error) {
	n, err := s.Conn.Write(p)
	if err != nil {
		s.t.Fail(err)
	}
	if data := len(p) - frameHeader; data > 0 {
		s.t.Passing(-data)
	}
	return n, err
}

// over waits for the end of the mux, and of its goroutines. The mux closes itself
// when it cannot read or write any more, and holds a lock until that has ended.
func (w *wire) over() error {
	<-w.mux.CloseChan()
	<-w.Tap.Done()
	w.mux.Close()
	return errMux
}

func (w *wire) streams(open func(*yamux.Stream)) {
	for {
		s, err := w.mux.AcceptStream()
		if err != nil {
			return
		}
		w.Spawn(func() { open(s) })
	}
}

// Signs of life, each a byte.
const (
	ask    = 1 // is answered
	answer = 2
	tell   = 3 // is said while an answer is on its way, perhaps behind megabytes of data
)

// beat shows the other end that this one lives.
func (w *wire) beat() {
	t := time.NewTicker(w.cfg.Beat)
	defer t.Stop()
	for {
		sign := byte(tell)
		if w.asked.CompareAndSwap(0, w.age()) {
			sign = ask
		}
		if _, err := w.give(w.control, []byte{sign}); err != nil {
			return
		}
		select {
		case <-t.C:
		case <-w.Context().Done():
			return
		}
	}
}

// age is never zero.
func (w *wire) age() int64 { return int64(time.Since(w.born)) + 1 }

// listen takes the other end's signs.
func (w *wire) listen() {
	defer func() { // without signs of life the wire is none
		w.Tap.Fail(errMux)
		w.HangUp()
	}()
	var sign [1]byte
	for {
		if _, err := w.control.Read(sign[:]); err != nil {
			return
		}
		w.cfg.OnAlive()
		switch sign[0] {
		case ask:
			w.give(w.control, []byte{answer})
		case answer:
			if began := w.asked.Swap(0); began != 0 {
				w.rtt.Store(w.age() - began)
			}
		}
	}
}

// give gives the mux data of a stream. It is written later.
func (w *wire) give(s *yamux.Stream, p []byte) (int, error) {
	n, err := s.Write(p)
	w.Tap.Passing(n)
	return n, err
}

// say gives a stream's first words to the mux, which are in nobody's turn.
func (w *wire) say(s *yamux.Stream, m message) error {
	b, err := m.append(nil)
	if err == nil {
		_, err = w.give(s, b)
	}
	return err
}

// begin opens a stream with a message.
func (w *wire) begin(ctx context.Context, m message) (*yamux.Stream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if w.Tap.Cause() != nil {
		return nil, w.Gone()
	}
	s, err := w.mux.OpenStream(ctx)
	if err == nil {
		if err = w.say(s, m); err == nil {
			return s, nil
		}
		s.ResetWithError(code(err))
	}
	return nil, w.failed(ctx, err)
}

// answered waits for the answer to what a stream began with.
func (w *wire) answered(ctx context.Context, s *yamux.Stream, name string) (message, error) {
	stop := context.AfterFunc(ctx, func() { s.ResetWithError(code(ctx.Err())) })
	m, err := readMessage(s)
	if !stop() {
		return m, ctx.Err()
	}
	if err != nil {
		err = w.failed(ctx, err)
	} else {
		err = m.refused(name)
	}
	if err != nil {
		s.ResetWithError(codeClosed)
	}
	return m, err
}

// failed is why a stream is not there, or not any more.
func (w *wire) failed(ctx context.Context, err error) error {
	var reset *yamux.StreamError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case w.Tap.Cause() != nil || w.mux.IsClosed():
		return w.Gone()
	case errors.As(err, &reset):
		return coded(reset.ErrorCode)
	}
	return err
}

// refuse answers no to what a stream began with; there is nothing more to say.
func (w *wire) refuse(s *yamux.Stream, why error) {
	w.say(s, refusal(why))
	s.CloseWrite()
	s.ResetWithError(codeClosed)
}
