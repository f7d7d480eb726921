package signalling

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Far is the end that is asked: it opens Network up to the streams of a Mux, which
// go to Open.
type Far struct {
	Mux     Mux
	Network channel.Network

	// DialTimeout bounds one dial or listen, and Idle the silence of a datagram flow.
	DialTimeout, Idle time.Duration
}

// Open does what a stream was opened for, to its end.
func (f *Far) Open(st Stream) {
	st.SetReadDeadline(time.Now().Add(f.DialTimeout))
	m, err := readMessage(st)
	st.SetReadDeadline(time.Time{})
	switch {
	case err != nil:
		st.Reset(err)
	case m.kind == msgDial:
		f.dial(st, m.a, m.b)
	case m.kind == msgListen:
		f.listen(st, m)
	default:
		refuse(st, errors.ErrUnsupported)
	}
}

// dial dials for the other end, and only then says yes.
func (f *Far) dial(st Stream, network, address string) {
	far, err := f.reach(network, address)
	network, _ = channel.CutWords(network)
	if err != nil {
		refuse(st, err)
		return
	}
	if err := say(st, message{kind: msgYes}); err != nil {
		st.Reset(nil)
		relay.Abort(far, err)
		return
	}
	origin := wiring.Addr{Net: network, Text: f.Mux.RemoteAddr().String()}
	wiring.Join(f.Mux.Context(), network, f.Mux.Conn(st, network, far.RemoteAddr(), origin), far, f.Idle)
}

// reach ends with the wire.
func (f *Far) reach(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(f.Mux.Context(), f.DialTimeout)
	defer cancel()
	return f.Network.DialContext(ctx, network, address)
}

// listen listens for the other end, for as long as that has not ended the stream.
func (f *Far) listen(st Stream, m message) {
	ctx, cancel := context.WithTimeout(f.Mux.Context(), f.DialTimeout)
	defer cancel()
	ln, err := f.Network.Listen(ctx, m.a, m.b)
	if err != nil {
		refuse(st, err)
		return
	}
	if say(st, message{kind: msgYes, a: ln.Addr().String()}) == nil {
		f.serve(st, ln, m)
	}
	ln.Close()
	st.CloseWrite()
	st.Reset(nil)
}

// serve hands over what ln accepts until either end is done with it. The other end is
// told why, where it is this one.
func (f *Far) serve(st Stream, ln net.Listener, m message) {
	ctx, cancel := context.WithCancel(f.Mux.Context())
	var accepting sync.WaitGroup
	accepting.Go(func() {
		if err := f.accept(ctx, ln, m); ctx.Err() == nil {
			say(st, refusal(err))
		}
		st.SetReadDeadline(time.Unix(1, 0)) // nobody is waited for any more
	})
	st.Read(make([]byte, 1))
	cancel()
	ln.Close()
	accepting.Wait()
}

// accept accepts until ln fails. What it is short of for a while it waits for.
func (f *Far) accept(ctx context.Context, ln net.Listener, m message) error {
	pause := leastPause
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			pause = leastPause
			f.Mux.Spawn(func() { f.forward(m, c) })
			continue
		case !short(err):
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		pause = min(2*pause, mostPause)
	}
}

const leastPause, mostPause = 5 * time.Millisecond, time.Second

// short tells an error of Accept that passes: of who has left already, or for want of
// descriptors or memory.
func short(err error) bool {
	for _, e := range []error{syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// forward opens a stream to the other end for a connection from the network. One
// that still waits for its answer gets that of the other end.
func (f *Far) forward(m message, far net.Conn) {
	ctx := f.Mux.Context()
	st, err := begin(ctx, f.Mux, message{kind: msgAccepted, number: m.number, a: far.RemoteAddr().String(), b: channel.Words(far.RemoteAddr())})
	if err == nil {
		_, err = answered(ctx, st, "")
	}
	if ctx.Err() != nil && err != nil {
		err = f.Mux.Gone()
	}
	if err != nil {
		wiring.Refuse(far, err)
		return
	}
	network, _ := channel.CutWords(m.a)
	near := f.Mux.Conn(st, network, far.LocalAddr(), far.RemoteAddr())
	wiring.Hand(ctx, network, near, far, f.Idle)
}
