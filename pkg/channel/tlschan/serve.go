package tlschan

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Serve is the far end: it opens network up to whoever shows the right key on
// conn, which it takes over. It returns when the wire is gone and everything
// that ran for it has ended: net.ErrClosed after ctx, else the wire's error.
func Serve(ctx context.Context, conn net.Conn, cfg Config, network channel.Network) error {
	s := &server{network: network}
	w, err := handshake(ctx, conn, cfg.withDefaults(), farEnd, func(w *wire) { s.w = w }, s.open)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { w.Close() })()
	return w.Wait()
}

// server is the far end of one wire.
type server struct {
	w       *wire
	network channel.Network
}

func (s *server) open(st *yamux.Stream) {
	m, err := readMessage(st)
	switch {
	case err != nil:
		st.ResetWithError(code(err))
	case m.kind == msgDial:
		s.dial(st, m.a, m.b)
	case m.kind == msgListen:
		s.listen(st, m)
	default:
		s.w.refuse(st, errors.ErrUnsupported)
	}
}

// dial dials for the other end, and only then says yes.
func (s *server) dial(st *yamux.Stream, network, address string) {
	far, err := s.reach(network, address)
	if err != nil {
		s.w.refuse(st, err)
		return
	}
	if err := s.w.say(st, message{kind: msgYes}); err != nil {
		st.ResetWithError(codeClosed)
		relay.Abort(far, err)
		return
	}
	origin := wiring.Addr{Net: network, Text: s.w.conn.RemoteAddr().String()}
	s.w.Join(network, newConn(s.w, st, network, far.RemoteAddr(), origin), far, s.w.cfg.Idle)
}

// reach ends with the wire.
func (s *server) reach(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.w.Context(), s.w.cfg.DialTimeout)
	defer cancel()
	return s.network.DialContext(ctx, network, address)
}

// listen listens for the other end, for as long as that has not ended the stream.
func (s *server) listen(st *yamux.Stream, m message) {
	ctx, cancel := context.WithTimeout(s.w.Context(), s.w.cfg.DialTimeout)
	defer cancel()
	ln, err := s.network.Listen(ctx, m.a, m.b)
	if err != nil {
		s.w.refuse(st, err)
		return
	}
	if s.w.say(st, message{kind: msgYes, a: ln.Addr().String()}) == nil {
		s.serve(st, ln, m)
	}
	ln.Close()
	st.CloseWrite()
	st.ResetWithError(codeClosed)
}

// serve hands over what ln accepts until either end is done with it.
func (s *server) serve(st *yamux.Stream, ln net.Listener, m message) {
	var accepting sync.WaitGroup
	defer accepting.Wait()
	defer ln.Close()
	accepting.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				st.SetReadDeadline(time.Unix(1, 0)) // nobody is waited for any more
				return
			}
			s.w.Spawn(func() { s.forward(m, c) })
		}
	})
	st.Read(make([]byte, 1))
}

// forward opens a stream to the other end for a connection from the network. One
// that still waits for its answer gets that of the other end.
func (s *server) forward(m message, far net.Conn) {
	ctx := s.w.Context()
	st, err := s.w.begin(ctx, message{kind: msgAccepted, number: m.number, a: far.RemoteAddr().String()})
	if err == nil {
		_, err = s.w.answered(ctx, st, "")
	}
	if ctx.Err() != nil && err != nil {
		err = s.w.Gone()
	}
	if err != nil {
		wiring.Refuse(far, err)
		return
	}
	near := newConn(s.w, st, m.a, far.LocalAddr(), far.RemoteAddr())
	s.w.Hand(m.a, near, far, s.w.cfg.Idle)
}
