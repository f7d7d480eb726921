package tlschan

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// flow is a stream of the mux as a net.Conn.
type flow struct {
	w             *wire
	s             *yamux.Stream
	local, remote net.Addr

	once    sync.Once
	closed  chan struct{}
	writeBy deadline.Deadline
	writing chan struct{} // holds a token while somebody writes
}

// newConn makes a stream a connection of its network.
func newConn(w *wire, s *yamux.Stream, network string, local, remote net.Addr) net.Conn {
	w.Count(1)
	f := &flow{w: w, s: s, local: local, remote: remote, closed: make(chan struct{}), writing: make(chan struct{}, 1)}
	if network == "tcp" {
		return stream{f}
	}
	return &wiring.Datagrams{Flow: f}
}

func (f *flow) Read(p []byte) (int, error) {
	if f.isClosed() {
		return 0, f.OpError("read", net.ErrClosed)
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := f.s.Read(p)
	switch {
	case n > 0 || err == nil:
		return n, nil // an error with data is met again
	case err == io.EOF:
		return 0, io.EOF
	}
	return 0, f.OpError("read", f.why(err))
}

// Write gives the mux p, as there is room for it on the wire.
func (f *flow) Write(p []byte) (int, error) {
	if err := f.lockWrite(); err != nil {
		return 0, f.OpError("write", err)
	}
	defer f.unlockWrite()
	n, err := f.w.Tap.InTurns(p, f.give, f.closed, f.writeBy.Done())
	switch {
	case err == nil:
		return n, nil
	case err == wiring.ErrShutOut && f.writeBy.Passed():
		err = os.ErrDeadlineExceeded
	}
	var reset *yamux.StreamError
	if errors.As(err, &reset) && reset.ErrorCode == codeClosed && !f.isClosed() {
		err = yamux.ErrStreamClosed // it has read all that it wanted to
	}
	return n, f.OpError("write", f.why(err))
}

func (f *flow) give(p []byte) (int, error) { return f.w.give(f.s, p) }

// lockWrite waits for its turn to write.
func (f *flow) lockWrite() error {
	if f.isClosed() {
		return net.ErrClosed
	}
	if f.writeBy.Passed() {
		return os.ErrDeadlineExceeded
	}
	select {
	case f.writing <- struct{}{}:
		return nil
	case <-f.writeBy.Done():
		return os.ErrDeadlineExceeded
	case <-f.closed:
		return net.ErrClosed
	}
}

func (f *flow) unlockWrite() { <-f.writing }

// why is the reason behind an error of the mux.
func (f *flow) why(err error) error {
	var reset *yamux.StreamError
	switch {
	case f.isClosed():
		return net.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	case errors.As(err, &reset):
		return coded(reset.ErrorCode)
	case f.w.Tap.Cause() != nil || f.w.mux.IsClosed():
		return f.w.Gone()
	case errors.Is(err, yamux.ErrStreamClosed):
		return syscall.EPIPE
	}
	return err
}

// Close tells the other end that all was sent, unless a write is under way, and
// then that nothing is read any more.
func (f *flow) Close() error {
	f.end(func() {
		select {
		case f.writing <- struct{}{}:
			f.s.CloseWrite()
			f.unlockWrite()
		default:
		}
		f.s.ResetWithError(codeClosed)
	})
	return nil
}

// Abort closes with the reason: the other end reads it in place of an end of
// file.
func (f *flow) Abort(reason error) error {
	f.end(func() { f.s.ResetWithError(code(reason)) })
	return nil
}

// end ends it once, with a last word. A deadline would keep it in memory.
func (f *flow) end(last func()) {
	f.once.Do(func() {
		defer f.w.Count(-1)
		defer f.writeBy.Set(time.Time{})
		close(f.closed)
		last()
	})
}

func (f *flow) isClosed() bool {
	select {
	case <-f.closed:
		return true
	default:
		return false
	}
}

func (f *flow) SetDeadline(t time.Time) error {
	f.SetReadDeadline(t)
	return f.SetWriteDeadline(t)
}

func (f *flow) SetReadDeadline(t time.Time) error { return f.s.SetReadDeadline(t) }

// SetWriteDeadline is for the turns and for the window.
func (f *flow) SetWriteDeadline(t time.Time) error {
	f.writeBy.Set(t)
	return f.s.SetWriteDeadline(t)
}

func (f *flow) LocalAddr() net.Addr  { return f.local }
func (f *flow) RemoteAddr() net.Addr { return f.remote }

// OpError is err, of an operation on the connection.
func (f *flow) OpError(op string, err error) error {
	return &net.OpError{Op: op, Net: f.remote.Network(), Source: f.local, Addr: f.remote, Err: err}
}

// stream is a flow of "tcp".
type stream struct{ *flow }

// CloseWrite ends what is sent; reading goes on.
func (s stream) CloseWrite() error {
	if err := s.lockWrite(); err != nil {
		return s.OpError("close", err)
	}
	defer s.unlockWrite()
	if err := s.s.CloseWrite(); err != nil {
		return s.OpError("close", s.why(err))
	}
	return nil
}

// WriteTo copies all to dst.
func (s stream) WriteTo(dst io.Writer) (int64, error) { return relay.Copy(dst, s.flow) }
