package resume

import (
	"cmp"
	"context"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// A Stream is one end of a stream that goes on, a connection of "tcp". It is closed by
// whoever was given it; what was written is said after that, for as long as a stream is held.
//
// What came before a reset of the other end, or before it was given up, can still be read.
type Stream struct {
	deadline.Pair
	dials         bool // it is the end that dials
	local, remote net.Addr
	budget        *budget
	ended         chan struct{} // closed when there is nothing more to say, or nobody to say it to
	writing       sync.Mutex    // one writes

	// lost is called without the lock when a link is, which has been of use for a while or not.
	lost func(s *Stream, lasted bool, err error)

	mu       sync.Mutex
	readable sync.Cond
	writable sync.Cond
	talk     sync.Cond // there may be something to say
	link     *link     // the present one; nil: there is none
	links    int       // so far

	out     outgoing
	in      incoming
	grown   int64 // of the budget
	closed  bool  // on this side
	sending bool  // something is written that has to wait
	reset   bool  // by this side, for why
	why     uint32
	gone    error // why there is nothing any more; nil: there is
	over    bool
}

func newStream(dials bool, local, remote net.Addr, b *budget, lost func(*Stream, bool, error)) *Stream {
	s := &Stream{dials: dials, local: local, remote: remote, budget: b, lost: lost, ended: make(chan struct{})}
	s.readable.L, s.writable.L, s.talk.L = &s.mu, &s.mu, &s.mu
	s.ReadBy.Func, s.WriteBy.Func = s.wake, s.wake
	s.in.window, s.out.limit, s.out.most = firstWindow, firstWindow, firstKept
	return s
}

func (s *Stream) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readable.Broadcast()
	s.writable.Broadcast()
}

// Read reads what there is.
func (s *Stream) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.closed:
			return 0, s.opError("read", net.ErrClosed)
		case s.ReadBy.Passed():
			return 0, s.opError("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case s.in.size > 0:
			n := s.in.read(p)
			s.giveBack()
			s.talkIf(s.link != nil && s.link.due())
			return n, nil
		case s.in.end != nil:
			return 0, s.in.end
		case s.gone != nil:
			return 0, s.opError("read", s.gone)
		}
		s.readable.Wait()
	}
}

func (s *Stream) talkIf(need bool) {
	if need {
		s.talk.Broadcast()
	}
}

// Write writes p, as there is room for what is kept.
func (s *Stream) Write(p []byte) (n int, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sending = true
	defer func() { s.sending = false }()
	for {
		if err := s.unwritable(); err != nil {
			return n, s.opError("write", err)
		}
		room, grown := s.out.room(s.budget)
		s.grown += grown
		if m := min(room, int64(len(p)-n)); m > 0 {
			s.out.append(p[n : n+int(m)])
			n += int(m)
			s.talk.Broadcast()
		}
		if n == len(p) {
			return n, nil
		}
		s.writable.Wait()
	}
}

// unwritable is why nothing may be written. mu is held.
func (s *Stream) unwritable() error {
	switch {
	case s.closed:
		return net.ErrClosed
	case s.gone != nil:
		return s.gone
	case s.out.deaf, s.out.ended:
		return syscall.EPIPE
	case s.WriteBy.Passed():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite tells the other end that all was written.
func (s *Stream) CloseWrite() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return s.opError("close", net.ErrClosed)
	case s.gone != nil && !s.out.ended:
		return s.opError("close", s.gone)
	}
	s.out.ended = true
	s.talk.Broadcast()
	return nil
}

// Close tells the other end that all was written, unless a write is under way, and that
// nothing is read any more.
func (s *Stream) Close() error {
	s.mu.Lock()
	if s.sending {
		s.mu.Unlock()
		return s.Abort(nil)
	}
	defer s.mu.Unlock()
	s.out.ended = true
	s.close()
	return nil
}

// Abort breaks it off: the other end reads the reason in place of an end of file.
func (s *Stream) Abort(reason error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed && s.gone == nil && !s.complete() {
		s.reset, s.why = true, wiring.Code(reason)
		s.out.drop()
	}
	s.close()
	return nil
}

// close is for both. mu is held.
func (s *Stream) close() {
	s.closed = true
	s.in.drop()
	s.giveBack()
	for _, by := range []*deadline.Deadline{&s.ReadBy, &s.WriteBy} {
		if by.Armed() { // it would keep the stream in memory
			by.Set(time.Time{})
		}
	}
	s.readable.Broadcast()
	s.writable.Broadcast()
	s.talk.Broadcast()
}

// complete tells whether all that is to be heard was, at both ends. mu is held.
func (s *Stream) complete() bool {
	return (s.out.arrived || s.out.deaf) && (s.in.end != nil || s.in.deaf) || s.reset
}

// Ended is closed when the other end has all that was written, and there is nothing more to
// say; or nothing can be said to it any more.
func (s *Stream) Ended() <-chan struct{} { return s.ended }

// finish ends it for good. It may be called again.
func (s *Stream) finish(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finished(why)
}

// finishUnlinked does, unless the stream has ever gone by a connection. It tells whether it did.
func (s *Stream) finishUnlinked(why error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.links > 0 {
		return false
	}
	s.finished(why)
	return true
}

// finished does, where mu is held.
func (s *Stream) finished(why error) {
	if s.over {
		return
	}
	s.over = true
	s.gone = cmp.Or(s.gone, why)
	s.out.drop()
	s.giveBack()
	if l := s.link; l != nil {
		s.link = nil
		go l.conn.Close() // which may have something to say
	}
	s.readable.Broadcast()
	s.writable.Broadcast()
	s.talk.Broadcast()
	close(s.ended)
}

// giveBack is for when nothing is held any more: what came can be read after the end. mu is held.
func (s *Stream) giveBack() {
	if s.over && s.in.size == 0 {
		s.give(s.grown)
	}
}

// give gives back that much of what it has grown by. mu is held.
func (s *Stream) give(n int64) {
	s.budget.give(n)
	s.grown -= n
}

func (s *Stream) LocalAddr() net.Addr  { return s.local }
func (s *Stream) RemoteAddr() net.Addr { return s.remote }

// opError is err, of an operation; the end of a file is left as it is.
func (s *Stream) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: s.local, Addr: s.remote, Err: err}
}

// end breaks streams off, and waits for so long until their other ends know.
func end(all []*Stream, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, s := range all {
		s.Abort(net.ErrClosed)
	}
	for _, s := range all {
		if s.dials || s.linked() { // who has dialled may come back
			select {
			case <-s.ended:
			case <-ctx.Done():
			}
		}
		s.finish(net.ErrClosed)
	}
}

// linked tells whether there is a connection.
func (s *Stream) linked() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link != nil
}

// adrift tells whether there is none, and another is waited for.
func (s *Stream) adrift() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link == nil && !s.over
}

// giveUp ends it, unless there is a connection.
func (s *Stream) giveUp(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.link == nil {
		s.finished(why)
	}
}
