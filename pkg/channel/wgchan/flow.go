package wgchan

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// stream is a connection between the netstacks, and then a flow's.
type stream struct {
	conn net.Conn
	w    *wire
	at   place

	once    sync.Once
	closed  chan struct{}
	broken  error         // why closed, where that was not this end's wish; before closed
	writing chan struct{} // holds a token while somebody writes
}

var _ signalling.Stream = (*stream)(nil)

func (s *stream) Read(p []byte) (int, error) {
	if s.isClosed() {
		return 0, s.ended()
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.conn.Read(p)
	if n > 0 || err == nil {
		return n, nil
	}
	return 0, s.why(err)
}

// Write writes all of p without other writes in between.
func (s *stream) Write(p []byte) (int, error) {
	select {
	case s.writing <- struct{}{}:
	case <-s.closed:
		return 0, s.ended()
	}
	defer func() { <-s.writing }()
	if s.isClosed() {
		return 0, s.ended()
	}
	n, err := s.conn.Write(p)
	return n, s.why(err)
}

// why is the reason behind an error of the netstack.
func (s *stream) why(err error) error {
	var timeout net.Error
	switch {
	case err == nil:
		return nil
	case s.isClosed():
		return s.ended()
	case errors.As(err, &timeout) && timeout.Timeout() && errors.Unwrap(timeout) != os.ErrDeadlineExceeded:
		return os.ErrDeadlineExceeded
	case err == io.EOF && s.w.Line.Cause() == nil:
		return io.EOF
	}
	return s.w.why(err)
}

func (s *stream) CloseWrite() error {
	if s.isClosed() {
		return s.ended()
	}
	return s.why(s.conn.(interface{ CloseWrite() error }).CloseWrite())
}

// end closes it, the first time, in one way or the other.
func (s *stream) end(how func(), why error) {
	s.once.Do(func() {
		s.w.mu.Lock()
		if s.w.streams[s.at] == s {
			delete(s.w.streams, s.at)
		}
		s.w.mu.Unlock()
		s.broken = why
		close(s.closed)
		how()
	})
}

// reset closes it so that nothing of it is taken for the whole.
func (s *stream) reset() { s.end(func() { relay.Abort(s.conn, net.ErrClosed) }, syscall.ECONNRESET) }

// Reset closes it, with a reset where there is a reason.
func (s *stream) Reset(reason error) {
	if reason == nil {
		s.end(func() { s.conn.Close() }, nil)
		return
	}
	s.end(func() {
		relay.Abort(s.conn, reason)
		s.w.tell(s.at)
	}, nil)
}

// ended is the error of what is asked of it when it is closed.
func (s *stream) ended() error {
	switch {
	case s.w.Line.Cause() != nil:
		return s.w.Gone()
	case s.broken != nil:
		return s.broken
	}
	return net.ErrClosed
}

func (s *stream) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

func (s *stream) SetReadDeadline(t time.Time) error { return s.conn.SetReadDeadline(t) }

// flow is a stream as a net.Conn.
type flow struct {
	*stream
	network       string
	local, remote net.Addr
	uncount       sync.Once
}

// Conn makes a stream a connection of its network.
func (w *wire) Conn(s signalling.Stream, network string, local, remote net.Addr) net.Conn {
	f := w.flow(s.(*stream), network, local, remote)
	if network == "tcp" {
		return tcpFlow{f}
	}
	return &wiring.Datagrams{Flow: f, Tells: true}
}

func (w *wire) flow(s *stream, network string, local, remote net.Addr) *flow {
	w.Count(1)
	return &flow{stream: s, network: network, local: local, remote: remote}
}

func (f *flow) Read(p []byte) (int, error) {
	n, err := f.stream.Read(p)
	return n, f.opError("read", err)
}

func (f *flow) Write(p []byte) (int, error) {
	n, err := f.stream.Write(p)
	return n, f.opError("write", err)
}

func (f *flow) Close() error {
	f.Reset(nil)
	f.uncount.Do(func() { f.w.Count(-1) })
	return nil
}

// Abort resets it: the other end reads no end of file.
func (f *flow) Abort(reason error) error {
	f.Reset(reason)
	return f.Close()
}

func (f *flow) SetDeadline(t time.Time) error      { return f.conn.SetDeadline(t) }
func (f *flow) SetWriteDeadline(t time.Time) error { return f.conn.SetWriteDeadline(t) }
func (f *flow) LocalAddr() net.Addr                { return f.local }
func (f *flow) RemoteAddr() net.Addr               { return f.remote }

// OpError is err, of an operation on the connection.
func (f *flow) OpError(op string, err error) error {
	return &net.OpError{Op: op, Net: f.network, Source: f.local, Addr: f.remote, Err: err}
}

func (f *flow) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return f.OpError(op, err)
}

// tcpFlow is one of "tcp".
type tcpFlow struct{ *flow }

// CloseWrite ends what is sent; reading goes on.
func (f tcpFlow) CloseWrite() error { return f.opError("close", f.flow.CloseWrite()) }

// WriteTo copies all to dst.
func (f tcpFlow) WriteTo(dst io.Writer) (int64, error) { return relay.Copy(dst, f.flow) }

// udpFlow is one of datagrams that are packets.
type udpFlow struct{ wiring.Flow }
