// Package relay joins two connections: what is read from the one is written to
// the other, until there is no more.
//
// A stream has two halves that end on their own, and both ways of ending: an
// end of file is passed on as a half-close, and the other half goes on; an
// error is passed on as an error, so that a reset on one side is a reset on the
// other and cannot be taken for the whole of the data. A flow of datagrams has
// no end of its own; it ends when nothing came for a while, either way.
//
// Buffers come from a pool and are small until a connection has shown that it
// has much to say, because most connections of a session are idle.
package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Join copies both ways until both directions have ended, closes a and b, and
// tells how many bytes went from a to b and from b to a. err is the first thing
// that went wrong: nil where both sides ended with an end of file.
func Join(a, b net.Conn) (ab, ba int64, err error) {
	var first firstError
	back := make(chan struct{})
	go func() {
		defer close(back)
		ba = half(a, b, &first)
	}()
	ab = half(b, a, &first)
	<-back
	a.Close()
	b.Close()
	return ab, ba, first.err
}

// half copies one direction and passes its end on.
func half(dst, src net.Conn, first *firstError) int64 {
	n, err := copyStream(dst, src)
	if err == nil {
		err = closeWrite(dst)
	}
	if err != nil && first.is(err) {
		Abort(dst, err)
		Abort(src, err)
	}
	return n
}

// closeWrite passes an end of file on. A connection that cannot be half closed
// is left: it is closed when the other direction has ended too. One that is
// already gone has nothing left to be told; the other direction tells why.
func closeWrite(c net.Conn) error {
	cw, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return nil
	}
	if err := cw.CloseWrite(); err != nil && !gone(err) {
		return err
	}
	return nil
}

// Abort closes c so that its far side sees that something went wrong, and what
// if the connection can say it: by its method Abort, or else by a TCP reset.
func Abort(c net.Conn, reason error) {
	switch c := c.(type) {
	case interface{ Abort(error) error }:
		c.Abort(reason)
		return
	case interface{ SetLinger(int) error }:
		c.SetLinger(0)
	}
	c.Close()
}

// firstError keeps the first of the two directions' errors; the other one is
// mostly a consequence. Where it is also told of a good end, that may be first.
type firstError struct {
	mu  sync.Mutex
	set bool
	err error
}

// is tells whether err came first.
func (f *firstError) is(err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.set {
		return false
	}
	f.set, f.err = true, err
	return true
}

// copyStream copies in the cheapest way there is: in the kernel between two
// sockets, without a buffer of ours where src brings its own.
func copyStream(dst, src net.Conn) (int64, error) {
	if to, ok := dst.(*net.TCPConn); ok {
		if _, ok := src.(*net.TCPConn); ok {
			return to.ReadFrom(src)
		}
	}
	switch from := src.(type) {
	case *net.TCPConn, *net.UnixConn: // their WriteTo is a plain copy with a buffer of its own
	case io.WriterTo:
		return from.WriteTo(dst)
	}
	return Copy(dst, src)
}

const (
	smallBuffer = 4 << 10
	largeBuffer = 64 << 10
	calmReads   = 16 // small reads in a row after which the large buffer goes back
)

var small = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
var large = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// Copy is io.Copy with pooled buffers that grow and shrink with the traffic.
func Copy(dst io.Writer, src io.Reader) (n int64, err error) {
	for {
		more, err := copySmall(dst, src)
		if n += more; err != nil {
			return n, notEOF(err)
		}
		more, err = copyLarge(dst, src)
		if n += more; err != nil {
			return n, notEOF(err)
		}
	}
}

// copySmall copies until a read fills the buffer.
func copySmall(dst io.Writer, src io.Reader) (n int64, err error) {
	buf := small.Get().(*[smallBuffer]byte)
	defer small.Put(buf)
	for {
		m, err := copyOnce(dst, src, buf[:])
		if n += int64(m); err != nil || m == len(buf) {
			return n, err
		}
	}
}

// copyLarge copies until reads have been small for a while.
func copyLarge(dst io.Writer, src io.Reader) (n int64, err error) {
	buf := large.Get().(*[largeBuffer]byte)
	defer large.Put(buf)
	for calm := 0; calm < calmReads; calm++ {
		m, err := copyOnce(dst, src, buf[:])
		if n += int64(m); err != nil {
			return n, err
		}
		if m > smallBuffer {
			calm = 0
		}
	}
	return n, nil
}

// copyOnce reads once and writes what was read.
func copyOnce(dst io.Writer, src io.Reader, buf []byte) (int, error) {
	n, rerr := src.Read(buf)
	if n == 0 {
		return 0, rerr
	}
	w, err := dst.Write(buf[:n])
	if err == nil && w < n {
		err = io.ErrShortWrite
	}
	if err != nil {
		return w, err
	}
	return w, rerr
}

func notEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// A Dialer is the dialing half of a channel.Network. One that wants to see
// failed dials, or to try a second way, wraps another.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Forward dials address for every connection that ln accepts and joins the two,
// until ctx ends or ln fails for good; it closes ln, and returns when all of it is gone.
// A connection whose dial failed is aborted with the dial's error; one that is
// Pending is answered with what the dial met.
func Forward(ctx context.Context, ln net.Listener, to Dialer, network, address string) error {
	return Serve(ctx, ln, func(ctx context.Context, c net.Conn) { forward(ctx, c, to, network, address) })
}

// Serve calls serve for every connection that ln accepts, until ctx ends or ln fails for
// good; it closes ln, and returns when all of these calls have. Their context ends then.
func Serve(ctx context.Context, ln net.Listener, serve func(ctx context.Context, c net.Conn)) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return net.ErrClosed
		}
		if passing(err) {
			pause(ctx)
			continue
		}
		if err != nil {
			return err
		}
		all.Go(func() { serve(ctx, c) })
	}
}

// passing tells of an error of Accept after which the next one may succeed: too
// many open files, or no memory. A wire that is gone is none, whatever it says.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func pause(ctx context.Context) {
	t := time.NewTimer(100 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func forward(ctx context.Context, a net.Conn, to Dialer, network, address string) {
	b, err := to.DialContext(ctx, network, address)
	if p, ok := a.(channel.Pending); ok {
		err = answer(p, b, err)
	} else if err != nil {
		Abort(a, err)
	}
	if err == nil {
		Carry(ctx, network, a, b)
	}
}

// Carry joins two connections of a network until they have ended, or breaks them off when
// ctx does.
func Carry(ctx context.Context, network string, a, b net.Conn) {
	defer context.AfterFunc(ctx, func() {
		Abort(a, net.ErrClosed)
		Abort(b, net.ErrClosed)
	})()
	if network == "tcp" {
		Join(a, b)
	} else {
		Datagrams(a, b, DefaultIdle)
	}
}

// answer tells p what the dial met. If p has not waited, b has come in vain.
func answer(p channel.Pending, b net.Conn, err error) error {
	if err != nil {
		p.Answer(err)
		return err
	}
	if err = p.Answer(nil); err != nil {
		Abort(b, err)
	}
	return err
}

// gone tells of errors that a connection gives that has already ended.
func gone(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || notConnected(err)
}
