package mux

import (
	"cmp"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// Stream is one of a Session's. It is closed by whoever was given it.
//
// What came before a FIN or a reset of the other end, or the end of the wire, can
// still be read, as from a socket of Linux; after a close from this side nothing is.
type Stream struct {
	s     *Session
	id    uint32
	from  int           // 0 if it was opened here, 1 if there
	ended chan struct{} // closed when nothing is written any more
	deadline.Pair

	writing sync.Mutex  // one writes
	reading sync.Mutex  // one reads
	sending atomic.Bool // something is written that may have to wait

	mu       sync.Mutex
	readable sync.Cond
	writable sync.Cond

	in     buffer
	window window
	rerr   error // what reading ends with

	credit int   // may be written
	fin    bool  // was sent
	werr   error // why nothing may be written

	closed bool // on this side
	gone   bool // both ends know, and nothing more is to be said
}

func newStream(s *Session, id uint32, from, window int) *Stream {
	st := &Stream{s: s, id: id, from: from, ended: make(chan struct{}), credit: leastWindow}
	st.readable.L, st.writable.L = &st.mu, &st.mu
	st.ReadBy.Func = st.wake
	st.WriteBy.Func = st.wake
	st.window.size, st.window.allowed, st.window.owed = window, leastWindow, window-leastWindow
	st.window.began = time.Now()
	return st
}

func (st *Stream) wake() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.readable.Broadcast()
	st.writable.Broadcast()
}

// Read reads what there is. Of nothing, it tells whether it is closed, or late.
func (st *Stream) Read(p []byte) (int, error) {
	st.reading.Lock()
	defer st.reading.Unlock()
	b, err := st.next(len(p) > 0)
	if err != nil || len(p) == 0 {
		return 0, err
	}
	n := copy(p, b)
	st.took(n)
	return n, nil
}

// CopyTo copies all to dst, and tells why reading ended, unless all was read, or
// writing.
func (st *Stream) CopyTo(dst io.Writer) (n int64, rerr, werr error) {
	st.reading.Lock()
	defer st.reading.Unlock()
	for {
		b, err := st.next(true)
		if err == io.EOF {
			return n, nil, nil
		}
		if err != nil {
			return n, err, nil
		}
		m, err := dst.Write(b)
		n += int64(m)
		st.took(m)
		if err == nil && m < len(b) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return n, nil, err
		}
	}
}

// next is what comes next; it stays until it is taken.
func (st *Stream) next(wait bool) ([]byte, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		switch {
		case st.closed:
			return nil, net.ErrClosed
		case st.ReadBy.Passed():
			return nil, os.ErrDeadlineExceeded
		case !wait:
			return nil, nil
		case st.in.size > 0:
			return st.in.next(), nil
		case st.rerr != nil:
			return nil, st.rerr
		}
		st.readable.Wait()
	}
}

// took gives back what was read, when that is worth it.
func (st *Stream) took(n int) {
	if more := st.dropped(n); more > 0 {
		st.s.write(nil, frame{kindWindow, st.id, more})
	}
}

func (st *Stream) dropped(n int) uint32 {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return 0
	}
	st.in.drop(n)
	st.window.read(n)
	return st.giveBack(st.window.due())
}

// giveBack is what the other end is told of, once it is so much. mu is held.
func (st *Stream) giveBack(least int) uint32 {
	if st.closed || st.rerr != nil || st.window.owed < least { // nothing more comes, or it can wait
		return 0
	}
	st.window.tune(time.Now(), time.Duration(st.s.path.Load()), &st.s.budget)
	return st.window.give()
}

// Write writes p, as there is room in the window and on the wire.
func (st *Stream) Write(p []byte) (n int, err error) {
	st.writing.Lock()
	defer st.writing.Unlock()
	st.sending.Store(true)
	defer st.sending.Store(false)
	late := st.WriteBy.Done()
	for {
		size, err := st.take(len(p) - n)
		if err != nil || size == 0 {
			return n, err
		}
		in, ok := st.s.tap.Enter(size, st.ended, late)
		if !ok {
			return n, st.shutOut(size)
		}
		err = st.send(p[n:n+in], st.settle(size-in))
		st.s.tap.Leave(in)
		if err != nil {
			return n, err
		}
		if n += in; n == len(p) {
			return n, nil
		}
		late = nil // what is sent in part, a datagram perhaps, is sent in whole
	}
}

// take waits for a part of the window, and takes as much as a frame may have.
func (st *Stream) take(most int) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		switch {
		case st.werr != nil:
			return 0, st.werr
		case st.WriteBy.Passed():
			return 0, os.ErrDeadlineExceeded
		case most == 0 || st.credit > 0:
			n := min(most, st.credit, mostData)
			st.credit -= n
			return n, nil
		}
		st.writable.Wait()
	}
}

// settle puts back what was not let in, and gives what is owed to the other end
// along with the rest, if it is much.
func (st *Stream) settle(back int) uint32 {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.credit += back
	return st.giveBack(leastWindow)
}

// shutOut puts back all, and tells why.
func (st *Stream) shutOut(back int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.credit += back
	switch {
	case st.werr != nil:
		return st.werr
	case st.WriteBy.Passed():
		return os.ErrDeadlineExceeded
	}
	return st.s.life.Gone()
}

func (st *Stream) send(p []byte, more uint32) error {
	data := frame{kindData, st.id, uint32(len(p))}
	if more > 0 {
		return st.s.write(p, frame{kindWindow, st.id, more}, data)
	}
	return st.s.write(p, data)
}

// Say writes a few words in nobody's turn, as an answer that others wait for.
func (st *Stream) Say(words []byte) error {
	st.mu.Lock()
	if st.werr != nil || st.credit < len(words) {
		defer st.mu.Unlock()
		return cmp.Or[error](st.werr, syscall.ENOBUFS)
	}
	st.credit -= len(words)
	more := st.giveBack(leastWindow)
	st.mu.Unlock()
	return st.send(words, more)
}

// CloseWrite tells the other end that all was written.
func (st *Stream) CloseWrite() error {
	st.writing.Lock()
	defer st.writing.Unlock()
	st.mu.Lock()
	if st.fin || st.werr != nil {
		defer st.mu.Unlock()
		if st.fin && !st.closed {
			return nil
		}
		return st.werr
	}
	gone := st.rerr == io.EOF
	st.fin, st.gone, st.werr = true, gone, syscall.EPIPE
	st.mu.Unlock()
	if gone {
		st.s.forget(st)
	}
	return st.s.write(nil, frame{kindFin, st.id, 0})
}

// Close tells the other end that all was written, unless a write is under way, and
// then that nothing is read any more.
func (st *Stream) Close() error {
	st.close(true, wiring.Closed)
	return nil
}

// Reset breaks it off: the other end reads the reason in place of an end of file.
func (st *Stream) Reset(reason error) { st.close(false, wiring.Code(reason)) }

func (st *Stream) close(whole bool, code uint32) {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return
	}
	whole = whole && !st.sending.Load()
	last := st.lastWords(whole, code)
	st.closed, st.gone = true, true
	st.in = buffer{}
	st.stop(net.ErrClosed)
	grown := st.window.grown
	st.mu.Unlock()
	for _, by := range []*deadline.Deadline{&st.ReadBy, &st.WriteBy} {
		if by.Armed() { // it would keep the stream in memory
			by.Set(time.Time{})
		}
	}
	st.s.release(st, grown)
	if whole { // a FIN that is being written comes first; nothing else is, any more
		st.writing.Lock()
		defer st.writing.Unlock()
	}
	if len(last) > 0 {
		st.s.write(nil, last...)
	}
}

// lastWords are what a close has to say. mu is held.
func (st *Stream) lastWords(whole bool, code uint32) (last []frame) {
	if st.gone {
		return nil
	}
	if whole && !st.fin {
		last = append(last, frame{kindFin, st.id, 0})
	}
	if st.rerr == io.EOF && (whole || st.fin) {
		return last
	}
	return append(last, frame{kindReset, st.id, code})
}

// stop ends writing, and wakes everybody. mu is held.
func (st *Stream) stop(why error) {
	select {
	case <-st.ended:
	default:
		close(st.ended)
	}
	st.werr = why
	st.readable.Broadcast()
	st.writable.Broadcast()
}

// receive reads the data of a frame.
func (st *Stream) receive(f frame, src io.Reader) error {
	if err := st.expect(f); err != nil {
		return err
	}
	for n := int(f.value); n > 0; {
		b := st.room(n)
		if b == nil {
			return discard(src, n)
		}
		if _, err := io.ReadFull(src, b); err != nil {
			return err
		}
		st.filled(len(b))
		n -= len(b)
	}
	return nil
}

func (st *Stream) expect(f frame) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.closed:
		return nil
	case st.rerr != nil:
		return broken("data after its end", f)
	case int(f.value) > st.window.allowed:
		return broken("more data than the window has", f)
	}
	st.window.allowed -= int(f.value)
	return nil
}

// room is where to put what comes, or nil if nobody reads it.
func (st *Stream) room(n int) []byte {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil
	}
	return st.in.room(n)
}

func (st *Stream) filled(n int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.closed {
		st.in.filled(n)
		st.readable.Signal()
	}
}

func discard(src io.Reader, n int) error {
	_, err := io.CopyN(io.Discard, src, int64(n))
	return err
}

// allow takes a window of the other end.
func (st *Stream) allow(f frame) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.credit += int(f.value); st.credit > mostWindow {
		return broken("a window too large", f)
	}
	st.writable.Signal()
	return nil
}

// finished notes that the other end has written all.
func (st *Stream) finished(f frame) error {
	st.mu.Lock()
	if st.rerr != nil {
		st.mu.Unlock()
		return broken("a second end", f)
	}
	gone := st.gone || st.fin
	st.rerr, st.gone = io.EOF, gone
	st.readable.Broadcast()
	st.mu.Unlock()
	if gone {
		st.s.forget(st)
	}
	return nil
}

// reset notes that the other end has broken it off. One that has written all before
// has merely read all that it wanted to.
func (st *Stream) reset(code uint32) {
	read, write := wiring.Coded(code), wiring.Coded(code)
	if code == wiring.Closed {
		write = syscall.EPIPE
	}
	st.fail(read, write)
	st.s.forget(st)
}

// fail ends it from outside.
func (st *Stream) fail(read, write error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return
	}
	st.gone = true
	if st.rerr == nil {
		st.rerr = read
	}
	if st.fin { // all that is written was
		write = st.werr
	}
	st.stop(write)
}
