package tlschan

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/internal/mux"
	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// wire is one TLS connection and its streams, the same at both ends.
type wire struct {
	*wiring.Life
	tap  *wiring.Tap
	conn *tls.Conn
	mux  *mux.Session
}

// end is how the two ends of a wire differ.
type end struct {
	tls   func(net.Conn, *tls.Config) *tls.Conn
	near  bool
	greet func(*mux.Session) error
}

var (
	nearEnd = end{tls.Client, true, (*mux.Session).Greeted}
	farEnd  = end{tls.Server, false, (*mux.Session).Greet}
)

// handshake makes a wire of conn, bounded by ctx and as silence is, also where
// conn has no deadlines. made is called with it before anything goes on, and open
// with each stream that the other end opens.
func handshake(ctx context.Context, conn net.Conn, cfg Config, e end, known func(ssh.PublicKey) error, made func(*wire), open func(signalling.Stream)) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, wiring.Limit(cfg.Beat))
	defer cancel()
	t := wiring.NewTap(conn)
	stop := context.AfterFunc(ctx, func() { t.Close() })
	w, err := shake(ctx, t, cfg, e, known, open)
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("tls handshake: %w", err)
	}
	made(w)
	w.Begin(w.over, w.mux.Beat)
	return w, nil
}

func shake(ctx context.Context, t *wiring.Tap, cfg Config, e end, known func(ssh.PublicKey) error, open func(signalling.Stream)) (*wire, error) {
	settings, err := cfg.Identity.tls(known)
	if err != nil {
		return nil, err
	}
	conn := e.tls(t, settings)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	life := &wiring.Life{Line: t, Beat: cfg.Beat, OnAlive: cfg.OnAlive, HangUp: func() { conn.Close() }}
	w := &wire{life, t, conn, mux.New(life, t, conn, e.near, func(s *mux.Stream) { open(asked{s}) })}
	if err := e.greet(w.mux); err != nil && e.near {
		return nil, notLetIn{err}
	} else if err != nil {
		return nil, err
	}
	return w, nil
}

// ErrNotLetIn is by errors.Is what Dial meets when the other end has shown who it is, and then
// hangs up on this one: its key is not taken, or there was no time to.
var ErrNotLetIn = errors.New("not let in")

type notLetIn struct{ error }

func (n notLetIn) Error() string {
	return ErrNotLetIn.Error() + ": " + n.error.Error()
}

func (n notLetIn) Unwrap() error        { return n.error }
func (n notLetIn) Is(target error) bool { return target == ErrNotLetIn }

// over waits for the end of the mux, and for the tap to let go.
func (w *wire) over() error {
	err := w.mux.Run()
	w.HangUp()
	<-w.tap.Done()
	return err
}

// asked is a stream while its messages are exchanged, which are in nobody's turn.
type asked struct{ *mux.Stream }

func (a asked) Write(p []byte) (int, error) {
	if err := a.Say(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a asked) Reset(reason error) {
	if reason == nil {
		a.Close()
	} else {
		a.Stream.Reset(reason)
	}
}

// Open opens a stream with its first words.
func (w *wire) Open(_ context.Context, words []byte) (signalling.Stream, error) {
	s, err := w.mux.Open(words)
	if err != nil {
		return nil, err
	}
	return asked{s}, nil
}

// LocalAddr and RemoteAddr are those of the connection below.
func (w *wire) LocalAddr() net.Addr  { return w.conn.LocalAddr() }
func (w *wire) RemoteAddr() net.Addr { return w.conn.RemoteAddr() }
