package resume

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// A link is one connection that a stream goes by. Another may take its place before it is
// known to be lost: from then on nothing that it brings is heard.
type link struct {
	s    *Stream
	conn net.Conn
	from time.Time

	// All this is guarded by the stream's lock.
	ready  bool  // it is known from where on to send
	heard  bool  // anything
	begun  bool  // an ack was said
	told   int64 // that so much was received
	limit  int64 // that so much may come
	late   bool  // an ack has waited for long enough
	timer  *time.Timer
	wanted int64 // the limit of which was said that it holds up
	end    bool  // was said, as were the others
	stop   bool
	last   bool
}

const (
	ackEvery = 64 << 10               // bytes received
	ackAfter = 100 * time.Millisecond // of fewer
)

// attach has the stream go by conn, which it takes over, from now on. What was said by it
// already is heard first.
func (s *Stream) attach(conn net.Conn, said ...byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attached(conn, said)
}

// attachFirst does, unless the stream has gone by another one before. It tells whether it did.
func (s *Stream) attachFirst(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.links > 0 {
		return false
	}
	s.attached(conn, nil)
	return true
}

// attached does, where mu is held.
func (s *Stream) attached(conn net.Conn, said []byte) {
	if s.over {
		go conn.Close()
		return
	}
	if before := s.link; before != nil {
		before.settle()
		go relay.Abort(before.conn, net.ErrClosed)
	}
	s.link = &link{s: s, conn: conn, from: time.Now(), ready: s.links == 0}
	s.links++
	s.talk.Broadcast() // the one before, that it is none any more
	go s.link.read(said)
	go s.link.write()
}

// settle is for when it is not the present one any more. mu is held.
func (l *link) settle() {
	if l.timer != nil {
		l.timer.Stop()
	}
}

// broke has the stream know that a link is lost. The connection is let go of when that is
// known: else who writes would be the first to tell, of one that was closed here, and not why.
func (s *Stream) broke(l *link, err error) {
	present, lasted := s.unlink(l, err)
	relay.Abort(l.conn, net.ErrClosed)
	if present {
		s.lost(s, lasted, err)
	}
}

// unlink has the stream without a link. It tells whether it was the present one, of a stream that
// has not ended by that, and has lasted.
func (s *Stream) unlink(l *link, err error) (present, lasted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.settle()
	if s.link != l {
		return false, false
	}
	s.link = nil
	heard := l.last && errors.Is(err, io.ErrUnexpectedEOF) // the host has closed it, for it has the last word
	if errors.Is(err, errRules) || heard || s.dials && s.complete() && !s.reset {
		s.finished(err)
	}
	s.talk.Broadcast() // to who writes there
	return !s.over, l.lasted()
}

// lasting is what a link must have been there for, that the next loss is a new one: else one
// that is lost again and again would be dialled as often as it can be, for ever.
const lasting = time.Second

// lasted tells whether it was. mu is held.
func (l *link) lasted() bool { return l.heard && time.Since(l.from) > lasting }

// frames are buffers, which a link has only while it says something.
var frames = sync.Pool{New: func() any { return new([mostFrames]byte) }}

// write says what there is to be said, until the link is not the present one.
func (l *link) write() {
	for {
		l.s.mu.Lock()
		for l.s.link == l && !l.talks() {
			l.s.talk.Wait()
		}
		if l.s.link != l {
			l.s.mu.Unlock()
			return
		}
		buf := frames.Get().(*[mostFrames]byte)
		words := l.words(buf[:0])
		l.s.writable.Broadcast() // there may be room
		last := l.last
		l.s.mu.Unlock()
		_, err := l.conn.Write(words)
		frames.Put(buf)
		if err != nil {
			l.s.broke(l, err)
			return
		}
		if last { // the host hangs up when it has heard that; who did so before might take it back
			return
		}
	}
}

// due tells whether an ack is. mu is held.
func (l *link) due() bool {
	in := &l.s.in
	return !l.begun || l.late && l.stale() || in.counted()-l.told >= ackEvery || in.end != nil && in.counted() > l.told || in.limit()-l.limit >= in.window/4
}

func (l *link) stale() bool { return l.s.in.counted() > l.told || l.s.in.limit() > l.limit }

// talks tells whether there is something to be said. mu is held.
func (l *link) talks() bool {
	s := l.s
	return l.due() || l.sends() || l.ends() || l.wants() || s.closed && !l.stop || s.dials && s.complete() && !l.last
}

func (l *link) sends() bool {
	o := &l.s.out
	return l.ready && !o.deaf && o.sent < min(o.written, o.limit)
}

func (l *link) ends() bool {
	o := &l.s.out
	return l.ready && !o.deaf && o.ended && o.sent == o.written && !l.end
}

func (l *link) wants() bool {
	o := &l.s.out
	return l.ready && !o.deaf && o.sent == o.limit && o.sent < o.written && l.wanted < o.limit
}

// words are what is to be said now. mu is held.
func (l *link) words(b []byte) []byte {
	s := l.s
	if l.due() || l.stale() {
		l.begun, l.late, l.told, l.limit = true, false, s.in.counted(), s.in.limit()
		b = frame{kindAck, l.told, uint32(l.limit - s.in.received)}.append(b)
		l.settle()
		l.timer = nil
	}
	if l.sends() {
		b = s.out.next(b)
	}
	if l.ends() {
		l.end = true
		b = frame{kindEnd, s.out.written, 0}.append(b)
	}
	if l.wants() {
		l.wanted = s.out.limit
		b = frame{kindWant, s.out.limit, 0}.append(b)
	}
	if s.closed && !l.stop {
		l.stop = true
		if s.reset {
			b = frame{kindReset, 0, s.why}.append(b)
		} else {
			b = frame{kindStop, 0, 0}.append(b)
		}
	}
	if s.dials && s.complete() && !l.last {
		l.last = true
		b = frame{kindBye, 0, 0}.append(b)
	}
	return b
}

// read takes in what is said, until the link is lost.
func (l *link) read(said []byte) {
	r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(said), l.conn), 4<<10)
	for {
		if err := l.hear(r); err != nil {
			l.s.broke(l, err)
			return
		}
	}
}

func (l *link) hear(r io.Reader) error {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return lostBy(err)
	}
	f, err := parseFrame(&header)
	if err != nil {
		return err
	}
	var data []byte
	if f.kind == kindData {
		data = make([]byte, f.value)
		if _, err := io.ReadFull(r, data); err != nil {
			return lostBy(err)
		}
	}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.s.link != l {
		return errReplaced
	}
	return l.take(f, data)
}

var errReplaced = errors.New("another connection has taken over")

// lostBy is err: a connection that ends, ends too early.
func lostBy(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// take does what a frame says. mu is held.
func (l *link) take(f frame, data []byte) error {
	s := l.s
	begins := !l.heard
	l.heard = true
	if begins && f.kind != kindAck {
		return broken("it does not begin with an ack", f)
	}
	switch f.kind {
	case kindAck:
		first := begins && !l.ready
		l.ready = true
		err := s.out.ack(f, first)
		s.give(s.out.shrink())
		s.writable.Broadcast()
		s.talk.Broadcast()
		return err
	case kindData:
		err := s.in.take(f, data)
		s.readable.Broadcast() // one of who wait may only be awake for its deadline
		l.acksSoon()
		return err
	case kindEnd:
		err := s.in.finish(f, io.EOF)
		s.readable.Broadcast()
		s.talk.Broadcast()
		return err
	case kindWant:
		s.grown += s.in.wanted(f, s.budget)
	case kindStop:
		s.out.drop()
		s.writable.Broadcast()
	case kindReset:
		s.broken(wiring.Coded(f.value))
	case kindBye:
		s.finished(syscall.EPIPE)
		return nil
	}
	s.talk.Broadcast()
	return nil
}

// acksSoon sees to it that what has come is acknowledged. mu is held.
func (l *link) acksSoon() {
	switch {
	case l.due():
		l.s.talk.Broadcast()
	case l.timer == nil:
		l.timer = time.AfterFunc(ackAfter, func() {
			l.s.mu.Lock()
			defer l.s.mu.Unlock()
			l.late = true
			l.s.talk.Broadcast()
		})
	}
}

// broken is what the other end has done. mu is held.
func (s *Stream) broken(why error) {
	if s.gone == nil {
		s.gone = why
	}
	s.out.drop()
	s.in.deaf = s.in.deaf || s.in.end == nil
	s.readable.Broadcast()
	s.writable.Broadcast()
}
