package tlschan

import (
	"io"
	"net"
	"sync"

	"github.com/culvert-dev/culvert/pkg/channel/internal/mux"
	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// flow is a stream of the mux as a net.Conn.
type flow struct {
	*mux.Stream
	w             *wire
	local, remote net.Addr
	once          sync.Once // counted off
}

// Conn makes a stream a connection of its network.
func (w *wire) Conn(s signalling.Stream, network string, local, remote net.Addr) net.Conn {
	w.Count(1)
	f := &flow{Stream: s.(asked).Stream, w: w, local: local, remote: remote}
	if network == "tcp" {
		return stream{f}
	}
	return &wiring.Datagrams{Flow: f}
}

func (f *flow) Read(p []byte) (int, error) {
	n, err := f.Stream.Read(p)
	return n, f.OpError("read", err)
}

func (f *flow) Write(p []byte) (int, error) {
	n, err := f.Stream.Write(p)
	return n, f.OpError("write", err)
}

// Close tells the other end that all was sent, and that nothing is read any more.
func (f *flow) Close() error {
	defer f.end()
	return f.Stream.Close()
}

// Abort closes with the reason: the other end reads it in place of an end of
// file.
func (f *flow) Abort(reason error) error {
	defer f.end()
	f.Stream.Reset(reason)
	return nil
}

func (f *flow) end() { f.once.Do(func() { f.w.Count(-1) }) }

func (f *flow) LocalAddr() net.Addr  { return f.local }
func (f *flow) RemoteAddr() net.Addr { return f.remote }

// OpError is err, of an operation on the connection; none, and the end of a file,
// are left as they are.
func (f *flow) OpError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: f.remote.Network(), Source: f.local, Addr: f.remote, Err: err}
}

// stream is a flow of "tcp".
type stream struct{ *flow }

// CloseWrite ends what is sent; reading goes on.
func (s stream) CloseWrite() error { return s.OpError("close", s.Stream.CloseWrite()) }

// WriteTo copies all to dst.
func (s stream) WriteTo(dst io.Writer) (int64, error) {
	n, rerr, werr := s.CopyTo(dst)
	if werr != nil {
		return n, werr
	}
	return n, s.OpError("read", rerr)
}
