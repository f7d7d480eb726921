// Package mux has many streams share one wire. It knows the wires of this house and
// no others, and is so small because of that:
//
//   - The tap below queues what is written and never waits, so a stream's Write
//     frames its data, and has it encrypted, where it is called. It waits before
//     that, for its window and then for its turn on the wire: no goroutine, and no
//     other queue, is between a writer and the tap.
//   - One goroutine reads (Run). It reads data straight to where the stream's reader
//     takes it from, and never waits for anything but the wire.
//   - Each stream has a window of its own, which grows to what the path holds while
//     data is read as fast as it comes (window.go). A stream without data holds
//     no memory for it.
//   - Whoever opens a stream says its first words with it and is answered by words:
//     no frame accepts a stream. Words, unlike data, are in nobody's turn.
//   - Signs of life are frames like others, and measure the round trip.
//
// A FIN ends what is whole; a reset ends both directions, for a reason (reason.go).
// Streams are numbered in the order in which each end opens them, odd by the one
// and even by the other, and no number comes again.
//
// An end that breaks the rules ends the wire. What it can make this one hold is
// bounded: the streams that it opened and the windows they were given.
package mux

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

const (
	// mostStreams that the other end opened may be open at a time.
	mostStreams = 1 << 15

	// record is what TLS encrypts at once.
	record = 16 << 10
)

var errUsedUp = errors.New("no more streams can be numbered")

// Session is one end of a wire's mux.
type Session struct {
	life *wiring.Life
	tap  *wiring.Tap
	conn io.ReadWriter
	open func(*Stream) // takes what the other end opens

	in [headerSize]byte // was read last

	wmu sync.Mutex
	out []byte // is written next

	mu      sync.Mutex
	streams map[uint32]*Stream // of which something may still be heard
	held    [2]int             // from here, and from there, not closed on this side
	number  [2]uint32          // of the next
	over    bool

	budget budget
	born   time.Time
	asked  atomic.Int64 // when the sign that has no answer yet was asked for
	rtt    atomic.Int64 // the last round trip
	path   atomic.Int64 // the shortest of late, without what was queued
}

// New makes an end of a mux on conn, which is on the tap; the ends differ
// in who is first. Nothing goes on before Run. open is called on a goroutine
// for each stream that the other end opens.
func New(life *wiring.Life, tap *wiring.Tap, conn io.ReadWriter, first bool, open func(*Stream)) *Session {
	s := &Session{life: life, tap: tap, conn: conn, open: open, streams: make(map[uint32]*Stream), born: time.Now()}
	s.budget.give(mostGrown)
	s.number = [2]uint32{1, 2}
	if !first {
		s.number = [2]uint32{2, 1}
	}
	return s
}

// Open opens a stream with its first words.
func (s *Session) Open(words []byte) (*Stream, error) {
	st, err := s.begin(words)
	if err != nil && st != nil {
		st.Reset(err)
		st = nil
	}
	return st, err
}

func (s *Session) begin(words []byte) (*Stream, error) {
	s.wmu.Lock() // the other end hears of streams in their order
	defer s.wmu.Unlock()
	st, err := s.add()
	if err != nil {
		return nil, err
	}
	frames := []frame{{kindOpen, st.id, 0}}
	if more := st.settle(-len(words)); more > 0 {
		frames = append(frames, frame{kindWindow, st.id, more})
	}
	return st, s.put(words, append(frames, frame{kindData, st.id, uint32(len(words))})...)
}

// add has a stream of this end.
func (s *Session) add() (*Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil, s.life.Gone()
	}
	if s.number[0] > lastStream {
		s.tap.Fail(errUsedUp)
		s.life.HangUp()
		return nil, s.life.Gone()
	}
	return s.hold(0), nil
}

// hold has the next stream from an end. mu is held.
func (s *Session) hold(from int) *Stream {
	id := s.number[from]
	st := newStream(s, id, from, beginWith(s.held[0]+s.held[1]))
	s.number[from] += 2
	s.held[from]++
	s.streams[id] = st
	return st
}

// write writes frames, and after the last its data.
func (s *Session) write(data []byte, frames ...frame) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	return s.put(data, frames...)
}

// put does, where wmu is held. The headers are in one record with as much of the
// data as there is room for.
func (s *Session) put(data []byte, frames ...frame) error {
	s.out = s.out[:0]
	for _, f := range frames {
		s.out = f.append(s.out)
	}
	n := min(len(data), record-len(s.out))
	s.out = append(s.out, data[:n]...)
	_, err := s.conn.Write(s.out)
	if err == nil && n < len(data) {
		_, err = s.conn.Write(data[n:])
	}
	if err != nil {
		s.tap.Fail(err)
		return s.life.Gone()
	}
	return nil
}

// Run reads until the wire is gone, and says why.
func (s *Session) Run() error {
	err := s.read()
	for ; err == nil; err = s.read() {
	}
	s.tap.Fail(err)
	s.mu.Lock()
	s.over = true
	rest := s.streams
	s.streams = nil
	s.mu.Unlock()
	for _, st := range rest {
		st.fail(s.life.Gone(), s.life.Gone())
	}
	return err
}

// read reads a frame, and does what it says.
func (s *Session) read() error {
	f, err := s.header()
	switch {
	case err != nil:
		return err
	case f.stream == 0:
		return s.sign(f)
	case f.kind == kindOpen:
		return s.opened(f)
	}
	return s.heard(f)
}

func (s *Session) header() (frame, error) {
	if _, err := io.ReadFull(s.conn, s.in[:]); err == io.EOF {
		return frame{}, wiring.ErrHungUp
	} else if err != nil {
		return frame{}, err
	}
	return parse(&s.in)
}

// heard is what is said of a stream.
func (s *Session) heard(f frame) error {
	st, err := s.find(f)
	switch {
	case err != nil:
		return err
	case st == nil && f.kind == kindData:
		return discard(s.conn, int(f.value))
	case st == nil:
		return nil
	}
	switch f.kind {
	case kindData:
		return st.receive(f, s.conn)
	case kindWindow:
		return st.allow(f)
	case kindFin:
		return st.finished(f)
	}
	st.reset(f.value)
	return nil
}

// find is nil for a stream that was there, and of which the other end had not heard
// that it is no more.
func (s *Session) find(f frame) (*Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[f.stream]
	if st == nil && f.stream >= s.number[(f.stream^s.number[0])&1] {
		return nil, broken("a stream that nobody opened", f)
	}
	return st, nil
}

// opened takes a stream of the other end, if it is not one too many.
func (s *Session) opened(f frame) error {
	s.mu.Lock()
	if f.stream != s.number[1] {
		s.mu.Unlock()
		return broken("not the stream that is next", f)
	}
	if s.held[1] == mostStreams {
		s.number[1] += 2
		s.mu.Unlock()
		return s.write(nil, frame{kindReset, f.stream, wiring.Code(syscall.ECONNREFUSED)})
	}
	st := s.hold(1)
	s.mu.Unlock()
	s.life.Spawn(func() { s.open(st) })
	return nil
}

// forget takes away a stream of which nothing is heard any more. It counts until
// it is closed on this side, too, for it may hold what came before.
func (s *Session) forget(st *Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st.id)
}

// release is for one that is closed.
func (s *Session) release(st *Stream, grown int) {
	s.budget.give(grown)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st.id)
	s.held[st.from]--
}

// Greet is the first sign of the end that knows the other one. Greeted waits for
// it, before Run.
func (s *Session) Greet() error { return s.write(nil, frame{kind: kindTell}) }

// Greeted waits for the other end to Greet.
func (s *Session) Greeted() error {
	f, err := s.header()
	if err == nil && f.kind != kindTell {
		err = broken("no greeting", f)
	}
	return err
}

// Beat shows the other end that this one lives, until the wire is gone.
func (s *Session) Beat() {
	t := time.NewTicker(s.life.Beat)
	defer t.Stop()
	for {
		kind := kindTell
		if s.asked.CompareAndSwap(0, s.age()) {
			kind = kindAsk
		}
		s.write(nil, frame{kind: kind})
		select {
		case <-t.C:
		case <-s.life.Context().Done():
			return
		}
	}
}

// age is never zero.
func (s *Session) age() int64 { return int64(time.Since(s.born)) + 1 }

// sign takes a sign of life.
func (s *Session) sign(f frame) error {
	s.life.OnAlive()
	switch f.kind {
	case kindAsk:
		return s.write(nil, frame{kind: kindAnswer})
	case kindAnswer:
		s.answered()
	}
	return nil
}

// answered measures. A longer trip may have been behind data: it counts little.
func (s *Session) answered() {
	began := s.asked.Swap(0)
	if began == 0 {
		return
	}
	took := s.age() - began
	s.rtt.Store(took)
	if known := s.path.Load(); known > 0 {
		took = min(took, known+known/4)
	}
	s.path.Store(took)
}

// RTT is the round trip of the last sign of life; zero before the first.
func (s *Session) RTT() time.Duration { return time.Duration(s.rtt.Load()) }
