package mux

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// patience is for what must happen.
const patience = 20 * time.Second

// end is an end of a mux on a bare tap, and what the other one opens.
type end struct {
	*Session
	life   *wiring.Life
	opened chan *Stream
	alive  chan struct{}
}

func newEnd(conn net.Conn, first bool) *end {
	e := &end{opened: make(chan *Stream, 2*mostStreams), alive: make(chan struct{}, 1000)}
	tap := wiring.NewTap(conn)
	e.life = &wiring.Life{Line: tap, Beat: time.Hour, HangUp: func() { tap.Close() }, OnAlive: func() {
		select {
		case e.alive <- struct{}{}:
		default:
		}
	}}
	e.Session = New(e.life, tap, tap, first, func(st *Stream) { e.opened <- st })
	return e
}

func (e *end) begin() {
	e.life.Begin(func() error {
		err := e.Run()
		e.life.HangUp()
		<-e.tap.Done()
		return err
	})
}

// close ends the wire and all that runs for it.
func (e *end) close() error {
	e.life.Close()
	return e.life.Wait()
}

// ends are two that are joined by a connection without a buffer.
func ends(t testing.TB) (a, b *end) {
	t.Helper()
	now := goleak.IgnoreCurrent()
	x, y := net.Pipe()
	a, b = newEnd(x, true), newEnd(y, false)
	a.begin()
	b.begin()
	t.Cleanup(func() {
		a.close()
		b.close()
		goleak.VerifyNone(t, now)
	})
	return a, b
}

// meet opens a stream from a to b.
func meet(t testing.TB, a, b *end) (from, to *Stream) {
	t.Helper()
	from, err := a.Open([]byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	to = receive(t, b.opened)
	words := make([]byte, 5)
	if _, err := io.ReadFull(to, words); err != nil || string(words) != "hello" {
		t.Fatalf("first words %q, %v", words, err)
	}
	return from, to
}

func receive[T any](t testing.TB, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
	return v
}

func random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// peer is an end that says what a test has it say.
type peer struct {
	*end
	wire net.Conn
	said chan frame // by the end, without what its data was
}

func newPeer(t testing.TB) *peer {
	t.Helper()
	now := goleak.IgnoreCurrent()
	x, y := net.Pipe()
	p := &peer{newEnd(x, false), y, make(chan frame, 2*mostStreams)}
	p.begin()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.hear()
	}()
	t.Cleanup(func() {
		y.Close()
		p.close()
		<-done
		goleak.VerifyNone(t, now)
	})
	return p
}

func (p *peer) hear() {
	for {
		var b [headerSize]byte
		if _, err := io.ReadFull(p.wire, b[:]); err != nil {
			return
		}
		f, _ := parse(&b)
		if f.kind == kindData && discard(p.wire, int(f.value)) != nil {
			return
		}
		p.said <- f
	}
}

// say says frames, with as much data as they should have.
func (p *peer) say(frames ...frame) {
	var b []byte
	for _, f := range frames {
		b = f.append(b)
		if f.kind == kindData {
			b = append(b, make([]byte, min(f.value, mostData))...)
		}
	}
	p.wire.Write(b)
}

// count is of streams that something is still heard of, and of those that are held.
func (s *Session) count() (known, held int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams), s.held[0] + s.held[1]
}

// sum is what is accounted for of the window.
func (st *Stream) sum() (sum, size int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.window.allowed + st.in.size + st.window.owed, st.window.size
}

func TestHalfClose(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	data := random(3 << 20)
	go func() {
		from.Write(data)
		from.CloseWrite()
	}()
	if got, err := io.ReadAll(to); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if _, err := from.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	if err := from.CloseWrite(); err != nil {
		t.Errorf("a second CloseWrite: %v", err)
	}
	go func() {
		to.Write(data)
		to.CloseWrite()
	}()
	if got, err := io.ReadAll(from); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes back, %v", len(got), err)
	}
	for _, e := range []*end{a, b} {
		if known, _ := e.count(); known != 0 {
			t.Errorf("%d streams are known after both ends", known)
		}
	}
	from.Close()
	to.Close()
	if _, held := b.count(); held != 0 {
		t.Errorf("%d streams are held", held)
	}
}

// TestClose: what was written before arrives whole, and who writes to a closed end
// is told.
func TestClose(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	from.Write([]byte("all"))
	from.Close()
	from.Close()
	if got, err := io.ReadAll(to); err != nil || string(got) != "all" {
		t.Errorf("read %q, %v", got, err)
	}
	for {
		if _, err := to.Write([]byte("x")); err != nil {
			if !errors.Is(err, syscall.EPIPE) {
				t.Errorf("write: %v, want EPIPE", err)
			}
			break
		}
	}
	for op, err := range map[string]error{"read": err1(from.Read(nil)), "write": err1(from.Write([]byte("x"))), "close": from.CloseWrite()} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s of what is closed: %v", op, err)
		}
	}
	to.Close()
}

func err1(_ int, err error) error { return err }

// TestCloseAtOnce: who ends a stream from two sides at once has written all the same.
func TestCloseAtOnce(t *testing.T) {
	a, b := ends(t)
	for range 500 {
		from, to := meet(t, a, b)
		from.Write([]byte("all"))
		var both sync.WaitGroup
		both.Go(func() {
			if err := from.CloseWrite(); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		})
		both.Go(func() { from.Close() })
		if got, err := io.ReadAll(to); string(got) != "all" || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
		both.Wait()
		to.Close()
	}
}

// TestCloseWhileWriting: what a write had not yet said makes it less than whole.
func TestCloseWhileWriting(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	res := make(chan error, 1)
	go func() { res <- err1(from.Write(make([]byte, 2*firstWindow))) }()
	if _, err := io.ReadFull(to, make([]byte, leastWindow/2)); err != nil {
		t.Fatal(err)
	}
	from.Close()
	if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if _, err := io.ReadAll(to); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	to.Close()
}

// TestCloseBeforeAnswer: words are heard, though who said them is gone.
func TestCloseBeforeAnswer(t *testing.T) {
	a, b := ends(t)
	for _, how := range []func(*Stream){func(st *Stream) { st.Close() }, func(st *Stream) { st.Reset(syscall.ETIMEDOUT) }} {
		st, err := a.Open([]byte("anybody?"))
		if err != nil {
			t.Fatal(err)
		}
		how(st)
		to := receive(t, b.opened)
		got := make([]byte, 8)
		if _, err := io.ReadFull(to, got); err != nil || string(got) != "anybody?" {
			t.Errorf("read %q, %v", got, err)
		}
		to.Say([]byte("too late"))
		to.Close()
	}
	from, _ := meet(t, a, b) // which is after all that
	from.Close()
	if known, _ := a.count(); known != 0 {
		t.Errorf("%d streams are left", known)
	}
}

// TestReset: what came before a reset can be read, and then its reason, but a FIN
// is the end of what is whole.
func TestReset(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	from.Write([]byte("half"))
	from.Reset(syscall.EHOSTUNREACH)
	if got, err := io.ReadAll(to); string(got) != "half" || !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := to.Write([]byte("x")); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("write: %v", err)
	}
	if _, held := b.count(); held != 1 {
		t.Errorf("%d streams are held before it is closed", held)
	}
	to.Close()
	if known, held := b.count(); known != 0 || held != 0 {
		t.Errorf("%d streams are known, %d held", known, held)
	}

	from, to = meet(t, a, b)
	from.Write([]byte("whole"))
	from.CloseWrite()
	from.Reset(syscall.ECONNRESET)
	if got, err := io.ReadAll(to); string(got) != "whole" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestResetUnblocks: whoever waits is told.
func TestResetUnblocks(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	res := make(chan error, 2)
	go func() { res <- err1(from.Read(make([]byte, 1))) }()
	go func() { res <- err1(from.Write(make([]byte, 2*firstWindow))) }()
	for to.unread() < firstWindow {
		time.Sleep(time.Millisecond)
	}
	to.Reset(syscall.EACCES)
	for range 2 {
		if err := receive(t, res); !errors.Is(err, syscall.EACCES) {
			t.Errorf("%v, want EACCES", err)
		}
	}
}

func (st *Stream) unread() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.in.size
}

// TestManyStreams: each way at once, opened by either end.
func TestManyStreams(t *testing.T) {
	a, b := ends(t)
	var all sync.WaitGroup
	for _, e := range []*end{a, b} {
		all.Go(func() {
			for range 200 {
				st := receive(t, e.opened)
				all.Go(func() {
					defer st.Close()
					if _, rerr, werr := st.CopyTo(st); rerr != nil || werr != nil {
						t.Error(rerr, werr)
					}
				})
			}
		})
		for range 200 {
			all.Go(func() {
				st, err := e.Open([]byte("w"))
				if err != nil {
					t.Error(err)
					return
				}
				defer st.Close()
				data := random(100 + rand.IntN(400<<10))
				go func() {
					st.Write(data)
					st.CloseWrite()
				}()
				if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, append([]byte("w"), data...)) {
					t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
				}
			})
		}
	}
	all.Wait()
	for _, e := range []*end{a, b} {
		if known, held := e.count(); known != 0 || held != 0 {
			t.Errorf("%d streams are known, %d held", known, held)
		}
		if left := e.budget.left.Load(); left != mostGrown {
			t.Errorf("%d bytes of the budget are left", left)
		}
	}
}

// TestWindowFull: a writer waits for who reads, as long as its deadline allows, and
// nothing is lost by that. Others go on.
func TestWindowFull(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	data := random(3 * firstWindow)
	from.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	n, err := from.Write(data)
	if n != firstWindow || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	x, y := meet(t, a, b)
	go y.CopyTo(y)
	for range 100 {
		x.Write([]byte("ping"))
		if _, err := io.ReadFull(x, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}
	from.SetWriteDeadline(time.Time{})
	go func() {
		from.Write(data[n:])
		from.Close()
	}()
	if got, err := io.ReadAll(to); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	x.Close()
	y.Close()
}

// TestBothFull: both ends write all they can on a wire without a buffer, and tell
// of their windows meanwhile.
func TestBothFull(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	data := random(20 << 20)
	var all sync.WaitGroup
	for _, st := range []*Stream{from, to} {
		all.Go(func() {
			if _, err := st.Write(data); err != nil {
				t.Error(err)
			}
			st.CloseWrite()
		})
		all.Go(func() {
			if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
}

// TestWindowAddsUp: however little is read at a time, nothing of the window is lost,
// and nothing is held by a stream that was read.
func TestWindowAddsUp(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	go func() {
		for left := 4 << 20; left > 0; {
			n, _ := from.Write(make([]byte, min(left, 1+rand.IntN(100<<10))))
			left -= n
		}
		from.CloseWrite()
	}()
	buf := make([]byte, 20<<10)
	for {
		_, err := to.Read(buf[:1+rand.IntN(len(buf))])
		if sum, size := to.sum(); sum > size || sum < size-mostData { // a frame may be on its way in
			t.Fatalf("%d of a window of %d are accounted for", sum, size)
		}
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if sum, size := to.sum(); sum != size {
		t.Errorf("%d of a window of %d are accounted for", sum, size)
	}
	if to.in.head != nil || to.in.tail != nil {
		t.Error("memory is held for nothing")
	}
	from.Close()
	to.Close()
}

func TestDeadlines(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	from.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := from.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
	from.SetReadDeadline(time.Time{})
	res := make(chan error)
	go func() { res <- err1(from.Read(make([]byte, 1))) }()
	from.SetReadDeadline(time.Unix(1, 0))
	if err := receive(t, res); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("interrupted: %v", err)
	}
	from.SetWriteDeadline(time.Unix(1, 0))
	if _, err := from.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("late: %v", err)
	}
	from.SetDeadline(time.Time{})
	to.Write([]byte("y"))
	if _, err := from.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// TestSigns: they measure the round trip, and are heard also under load.
func TestSigns(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
	x, y := net.Pipe()
	a, b := newEnd(x, true), newEnd(y, false)
	for _, e := range []*end{a, b} {
		defer e.close()
		e.life.Beat = 10 * time.Millisecond
		e.begin()
		e.life.Spawn(e.Beat)
	}
	from, to := meet(t, a, b)
	go io.Copy(io.Discard, to)
	go io.Copy(from, zeros{})
	for range 20 {
		receive(t, a.alive)
		receive(t, b.alive)
	}
	for a.RTT() == 0 || b.RTT() == 0 {
		receive(t, a.alive)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestPath: a trip that was long once is hardly believed.
func TestPath(t *testing.T) {
	s := &Session{born: time.Now()}
	for _, step := range []struct{ took, path time.Duration }{
		{100 * time.Millisecond, 100 * time.Millisecond},
		{10 * time.Second, 125 * time.Millisecond},
		{80 * time.Millisecond, 80 * time.Millisecond},
	} {
		s.born = time.Now().Add(-step.took)
		s.asked.Store(1)
		s.answered()
		if path := time.Duration(s.path.Load()); path.Round(10*time.Millisecond) != step.path.Round(10*time.Millisecond) {
			t.Errorf("after %v: %v, want %v", step.took, path, step.path)
		}
	}
	s.answered() // nobody asked
}

// TestGreeting: the first to be heard.
func TestGreeting(t *testing.T) {
	for _, test := range []struct {
		say  []byte
		want error
	}{
		{frame{kind: kindTell}.append(nil), nil},
		{frame{kind: kindOpen, stream: 2}.append(nil), errRules},
		{nil, wiring.ErrHungUp},
	} {
		x, y := net.Pipe()
		e := newEnd(x, true)
		go func() {
			y.Write(test.say)
			y.Close()
		}()
		if err := e.Greeted(); !errors.Is(err, test.want) {
			t.Errorf("%x: %v, want %v", test.say, err, test.want)
		}
		e.tap.Close()
		<-e.tap.Done()
	}
}

// TestRules: who breaks them ends the wire, with an error that says which.
func TestRules(t *testing.T) {
	open := frame{kindOpen, 1, 0}
	for _, test := range []struct {
		say  []frame
		want string
	}{
		{[]frame{{0, 1, 0}}, "no such kind"},
		{[]frame{{kindTell + 1, 0, 0}}, "no such kind"},
		{[]frame{{kindAsk, 1, 0}}, "a stream where there is none"},
		{[]frame{{kindOpen, 0, 0}}, "none where there is one"},
		{[]frame{{kindOpen, 1, 1}}, "out of bounds"},
		{[]frame{open, {kindData, 1, mostData + 1}}, "out of bounds"},
		{[]frame{open, {kindData, 1, 0}}, "out of bounds"},
		{[]frame{open, {kindWindow, 1, 0}}, "out of bounds"},
		{[]frame{{kindOpen, lastStream + 2, 0}}, "out of bounds"},
		{[]frame{{kindOpen, 3, 0}}, "not the stream that is next"},
		{[]frame{{kindOpen, 2, 0}}, "not the stream that is next"},
		{[]frame{open, open}, "not the stream that is next"},
		{[]frame{{kindData, 1, 1}}, "nobody opened"},
		{[]frame{{kindWindow, 2, 1}}, "nobody opened"},
		{[]frame{{kindReset, 7, 0}}, "nobody opened"},
		{[]frame{open, {kindData, 1, leastWindow + 1}}, "more data than the window has"},
		{[]frame{open, {kindData, 1, leastWindow}, {kindData, 1, 1}}, "more data than the window has"},
		{[]frame{open, {kindWindow, 1, mostWindow}}, "a window too large"},
		{[]frame{open, {kindFin, 1, 0}, {kindData, 1, 1}}, "data after its end"},
		{[]frame{open, {kindFin, 1, 0}, {kindFin, 1, 0}}, "a second end"},
	} {
		p := newPeer(t)
		p.say(test.say...)
		if err := p.life.Wait(); !errors.Is(err, errRules) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v: %v, want %q", test.say, err, test.want)
		}
	}
}

// TestAfterwards: what was on its way when a stream was closed breaks no rule.
func TestAfterwards(t *testing.T) {
	p := newPeer(t)
	p.say(frame{kindOpen, 1, 0}, frame{kindData, 1, 5})
	receive(t, p.opened).Close()
	for _, want := range []byte{kindFin, kindReset} {
		if f := receive(t, p.said); f.kind != want {
			t.Errorf("said %+v, want %d", f, want)
		}
	}
	p.say(frame{kindData, 1, 1000}, frame{kindWindow, 1, 1000}, frame{kindFin, 1, 0}, frame{kindReset, 1, 0})
	p.say(frame{kindOpen, 3, 0}, frame{kindData, 3, 5}, frame{kind: kindAsk})
	st := receive(t, p.opened)
	if _, err := io.ReadFull(st, make([]byte, 5)); err != nil {
		t.Error(err)
	}
	if f := receive(t, p.said); f.kind != kindAnswer {
		t.Errorf("said %+v, want an answer", f)
	}
	st.Close()
}

// TestTooManyStreams: those are refused, and room is made by closing.
func TestTooManyStreams(t *testing.T) {
	p := newPeer(t)
	id := uint32(1)
	for range mostStreams {
		p.say(frame{kindOpen, id, 0})
		id += 2
	}
	p.say(frame{kindOpen, id, 0}, frame{kindData, id, 5})
	if f := receive(t, p.said); f != (frame{kindReset, id, wiring.Code(syscall.ECONNREFUSED)}) {
		t.Errorf("said %+v of one too many", f)
	}
	first := receive(t, p.opened)
	p.say(frame{kindReset, first.id, 1}) // which makes no room: what came may be unread
	p.say(frame{kindOpen, id + 2, 0})
	if f := receive(t, p.said); f.kind != kindReset || f.stream != id+2 {
		t.Errorf("said %+v of one too many", f)
	}
	first.Close()
	p.say(frame{kindOpen, id + 4, 0}, frame{kind: kindAsk})
	if f := receive(t, p.said); f.kind != kindAnswer {
		t.Errorf("said %+v of one for which there is room", f)
	}
}

// TestHeld: what came before a reset counts until it is closed here, so that however
// streams end there, the windows of those that are held have their bound.
func TestHeld(t *testing.T) {
	p := newPeer(t)
	all := 0
	for i := range 2 * firstStreams {
		id := uint32(2*i + 1)
		p.say(frame{kindOpen, id, 0}, frame{kindData, id, 1}, frame{kindReset, id, 1})
		all += receive(t, p.opened).window.size
	}
	if want := firstStreams * (firstWindow + leastWindow); all != want {
		t.Errorf("the windows are %d KiB, want %d", all>>10, want>>10)
	}
}

// TestUsedUp: no number comes again; a new wire has new ones.
func TestUsedUp(t *testing.T) {
	a, b := ends(t)
	for _, e := range []*end{a, b} {
		e.mu.Lock()
	}
	a.number[0], b.number[1] = lastStream, lastStream
	for _, e := range []*end{a, b} {
		e.mu.Unlock()
	}
	from, _ := meet(t, a, b)
	from.Close()
	if _, err := a.Open([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("open: %v", err)
	}
	if err := a.life.Wait(); !errors.Is(err, errUsedUp) {
		t.Errorf("%v, want %v", err, errUsedUp)
	}
}

// TestWireGone: what came can be read, and all else is told why.
func TestWireGone(t *testing.T) {
	a, b := ends(t)
	from, to := meet(t, a, b)
	to.Write([]byte("rest"))
	if _, err := io.ReadFull(from, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	res := make(chan error, 1)
	go func() { res <- err1(from.Write(make([]byte, 2*firstWindow))) }()
	b.tap.Conn.Close()
	if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if err := a.life.Wait(); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want the wire's own error", err)
	}
	if got, err := io.ReadAll(from); string(got) != "est" || !errors.Is(err, net.ErrClosed) {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := a.Open([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("open: %v", err)
	}
	for _, err := range []error{from.CloseWrite(), from.Say([]byte("x"))} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
	}
	from.Close()
}
