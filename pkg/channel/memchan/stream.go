package memchan

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
)

// stream is one end of a "tcp" connection.
type stream struct {
	in, out       *lane
	local, remote net.Addr
	knock         *knock // of the end that answers; nil at the other one

	deadline.Pair
	once   sync.Once
	closed chan struct{}

	rmu   sync.Mutex // one reader
	block []byte     // taken, to be freed
	rest  []byte     // of it, not yet read
	wmu   sync.Mutex // one writer
}

func streams(near, far net.Addr) (a, b *stream) {
	up, down := newLane(), newLane()
	a = &stream{in: down, out: up, local: near, remote: far, closed: make(chan struct{})}
	b = &stream{in: up, out: down, local: far, remote: near, closed: make(chan struct{})}
	return a, b
}

func (s *stream) Read(p []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if err := s.fill(); err != nil || len(p) == 0 {
		return 0, s.opError("read", err)
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	s.emptied()
	return n, nil
}

// WriteTo writes what comes from where it lies.
func (s *stream) WriteTo(dst io.Writer) (n int64, err error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	for {
		if err := s.fill(); err != nil {
			return n, notEOF(s.opError("read", err))
		}
		m, err := dst.Write(s.rest)
		n, s.rest = n+int64(m), s.rest[m:]
		s.emptied()
		if err != nil {
			return n, err
		}
	}
}

func notEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// fill waits until there is something to read.
func (s *stream) fill() error {
	if err := s.usable(&s.ReadBy); err != nil {
		return err
	}
	for len(s.rest) == 0 {
		block, err := s.in.take()
		if err != nil {
			return err
		}
		if block == nil {
			if err := s.wait(s.in.more, &s.ReadBy); err != nil {
				return err
			}
		}
		s.block, s.rest = block, block
	}
	return nil
}

// emptied frees what was read to its end.
func (s *stream) emptied() {
	if len(s.rest) == 0 {
		free(s.block)
		s.block, s.rest = nil, nil
	}
}

func (s *stream) Write(p []byte) (n int, err error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := s.usable(&s.WriteBy); err != nil {
		return 0, s.opError("write", err)
	}
	for n < len(p) {
		m, err := s.out.put(p[n:])
		n += m
		if err == nil && m == 0 {
			err = s.wait(s.out.room, &s.WriteBy)
		}
		if err != nil {
			return n, s.opError("write", s.orClosed(err))
		}
	}
	return n, nil
}

// usable takes the connection, and tells why it may not be used.
func (s *stream) usable(d *deadline.Deadline) error {
	if err := s.knock.taken(); err != nil {
		return err
	}
	if d.Passed() {
		return s.orClosed(os.ErrDeadlineExceeded)
	}
	return s.orClosed(nil)
}

// orClosed is err, unless this end was closed.
func (s *stream) orClosed(err error) error {
	select {
	case <-s.closed:
		return net.ErrClosed
	default:
		return err
	}
}

// wait waits for a change of a lane.
func (s *stream) wait(change <-chan struct{}, d *deadline.Deadline) error {
	select {
	case <-change:
		return nil
	case <-s.closed:
		return net.ErrClosed
	case <-d.Done():
		return os.ErrDeadlineExceeded
	}
}

// CloseWrite ends what is written; reading goes on.
func (s *stream) CloseWrite() error {
	if err := s.knock.taken(); err != nil {
		return s.opError("close", err)
	}
	s.out.finish()
	return nil
}

// Close lets the other end read what was written. What nobody answered yet is
// refused.
func (s *stream) Close() error {
	s.end(syscall.ECONNREFUSED, s.out.finish, syscall.EPIPE)
	return nil
}

// Abort closes with the reason: the other end reads it in place of all that it
// has not read.
func (s *stream) Abort(reason error) error {
	why := broken(reason)
	s.end(cmp.Or(reason, why), func() { s.out.sever(why) }, why)
	return nil
}

func (s *stream) end(refusal error, last func(), deaf error) {
	s.knock.refused(refusal)
	s.once.Do(func() {
		close(s.closed)
		last()
		s.in.deafen(deaf)
	})
}

// broken is what the other end of an aborted connection sees. That this one was
// closed here is none of its affairs.
func broken(reason error) error {
	if reason == nil || errors.Is(reason, net.ErrClosed) || errors.Is(reason, io.EOF) || errors.Is(reason, context.Canceled) {
		return syscall.ECONNRESET
	}
	return reason
}

func (s *stream) LocalAddr() net.Addr  { return s.local }
func (s *stream) RemoteAddr() net.Addr { return s.remote }

func (s *stream) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: s.local, Addr: s.remote, Err: err}
}
