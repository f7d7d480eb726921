package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// DefaultIdle is how long a flow of datagrams may be silent, both ways, for who
// has no reason of their own: longer than the keepalives of QUIC and DTLS, about
// what NATs allow.
const DefaultIdle = 60 * time.Second

// Datagrams copies datagrams both ways, one for one, until nothing came either
// way for idle, or one side ends or fails; it closes a and b, and tells how many
// datagrams went from a to b and from b to a. err is nil after silence or an
// end of file. What cannot be sent is left out, see Lost. A side that fails (ECONNREFUSED is an ICMP answer) is told to
// the other.
func Datagrams(a, b net.Conn, idle time.Duration) (ab, ba int64, err error) {
	f := &flow{idle: idle, began: time.Now()}
	back := make(chan struct{})
	go func() {
		defer close(back)
		ba = f.half(a, b)
	}()
	ab = f.half(b, a)
	<-back
	return ab, ba, f.first.err
}

// flow is what the two directions of datagrams share.
type flow struct {
	idle  time.Duration
	began time.Time
	last  atomic.Int64 // time of the last datagram, since began
	first firstError
}

// half copies one direction. Whatever ends it ends the other one too.
func (f *flow) half(dst, src net.Conn) (n int64) {
	n, err := f.copy(dst, src)
	if !f.first.is(err) {
		return n
	}
	if err != nil {
		Abort(dst, err)
		Abort(src, err)
	} else {
		dst.Close()
		src.Close()
	}
	return n
}

func (f *flow) copy(dst, src net.Conn) (n int64, err error) {
	buf := large.Get().(*[largeBuffer]byte)
	defer large.Put(buf)
	for {
		m, err := f.read(src, buf[:])
		if err != nil {
			return n, notEnd(err)
		}
		switch _, err := dst.Write(buf[:m]); {
		case err == nil:
			n++
		case !Lost(err):
			return n, notEnd(err)
		}
	}
}

// Lost tells whether a failed write has lost one datagram, and no more: it was
// too large, there was no room for it, or a filter or a full table of flows in
// the kernel was against it, as may happen to it anywhere on its way.
func Lost(err error) bool {
	return errors.Is(err, syscall.EMSGSIZE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.EPERM) || lost(err)
}

// read waits for a datagram as long as one came lately from either side.
func (f *flow) read(src net.Conn, buf []byte) (int, error) {
	for {
		src.SetReadDeadline(f.began.Add(time.Duration(f.last.Load()) + f.idle))
		n, err := src.Read(buf)
		if err == nil {
			f.last.Store(int64(time.Since(f.began)))
			return n, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || f.silent() >= f.idle {
			return 0, err
		}
	}
}

func (f *flow) silent() time.Duration {
	return time.Since(f.began) - time.Duration(f.last.Load())
}

// notEnd is nil for what ends a flow in good order: silence, an end of file,
// and a side that was closed.
func notEnd(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
