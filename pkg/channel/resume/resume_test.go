package resume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

const (
	patience = 30 * time.Second
	address  = "db-01:22"
)

// A way leads a client to a host, and cuts what goes by it.
type way struct {
	memory memchan.Network

	mu      sync.Mutex
	allow   func() int // how many bytes the next connection may carry each way; nil: all
	refusal error
	open    []net.Conn
	dials   int
	client  byte // which of several
}

func (w *way) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	plain, words := channel.CutWords(network)
	w.mu.Lock()
	refusal := w.refusal
	w.dials++
	w.mu.Unlock()
	if refusal != nil {
		return nil, refusal
	}
	from := channel.WithWords(w.from(), words)
	c, err := w.memory.DialContext(memchan.From(ctx, from), plain, address)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.open = append(w.open, c)
	if w.allow == nil {
		return c, nil
	}
	return &cut{Conn: c, in: w.allow(), out: w.allow()}, nil
}

// from is where the next dial comes from, whose port is another each time.
func (w *way) from() net.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1+w.client), Port: w.dials}
}

// count is how often it was dialled.
func (w *way) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dials
}

// lose breaks what is open, for a reason.
func (w *way) lose(reason error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.open {
		relay.Abort(c, reason)
	}
	w.open = nil
}

func (w *way) refuse(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refusal = err
}

// cut is a connection that ends after so many bytes: what was written until then arrives, and
// is followed by an end of file, or is lost on the way.
type cut struct {
	net.Conn
	mu      sync.Mutex
	in, out int
}

var errCut = errors.New("cut")

func (c *cut) Read(p []byte) (int, error) {
	c.mu.Lock()
	n := min(len(p), c.in)
	c.mu.Unlock()
	if n == 0 && len(p) > 0 {
		c.Conn.Close()
		return 0, errCut
	}
	n, err := c.Conn.Read(p[:n])
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in -= n
	return n, err
}

func (c *cut) Write(p []byte) (int, error) {
	c.mu.Lock()
	n := min(len(p), c.out)
	c.out -= n
	c.mu.Unlock()
	n, err := c.Conn.Write(p[:n])
	if err == nil && n < len(p) {
		c.Conn.Close()
		err = errCut
	}
	return n, err
}

func (c *cut) Abort(reason error) error {
	relay.Abort(c.Conn, reason)
	return nil
}

// world is both ends, and what is between them.
type world struct {
	t      *testing.T
	way    *way
	client *Client
	host   *Host
	ln     net.Listener
}

func newWorld(t *testing.T) *world {
	t.Helper()
	now := goleak.IgnoreCurrent()
	w := &world{t: t, way: &way{}, host: NewHost(0)}
	w.client = NewClient(w.way, 0)
	w.client.pause = time.Millisecond
	ln, err := w.way.memory.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	w.ln = w.host.Listener(ln, "22")
	t.Cleanup(func() {
		w.client.Close(time.Second)
		w.host.Close(time.Second)
		w.ln.Close()
		w.await("nothing is held", 0)
		for who, b := range map[string]*budget{"client": w.client.budget, "host": w.host.budget} {
			await(t, "all of the "+who+"'s budget is back", func() bool { return b.left.Load() == mostGrown })
		}
		goleak.VerifyNone(t, now)
	})
	return w
}

// pair is both ends of a new stream.
func (w *world) pair() (near *Stream, far net.Conn) {
	w.t.Helper()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := w.ln.Accept()
		if err == nil {
			err = c.(channel.Pending).Answer(nil)
		}
		if err != nil {
			w.t.Error(err)
		}
		accepted <- c
	}()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	near, err := w.client.Dial(ctx, address)
	if err != nil {
		w.t.Fatal(err)
	}
	go w.serve()
	return near, <-accepted
}

// serve has connections be taken that are no new streams. A world has one stream.
func (w *world) serve() {
	if c, err := w.ln.Accept(); err == nil {
		w.t.Errorf("a second stream from %v", c.RemoteAddr())
		c.Close()
	}
}

// await waits for something that is to be so soon.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

func ended(t *testing.T, what string, s *Stream) {
	t.Helper()
	select {
	case <-s.Ended():
	case <-time.After(patience):
		t.Fatalf("the %s's end has not ended", what)
	}
}

// classes are where a connection is cut: in or after a header, in the data, or later.
func classes(r *rand.Rand) int {
	switch r.IntN(8) {
	case 0:
		return 0
	case 1:
		return r.IntN(headerSize)
	case 2:
		return headerSize
	case 3:
		return headerSize + r.IntN(headerSize+1)
	case 4:
		return headerSize + mostData + r.IntN(2*headerSize) - headerSize
	case 5:
		return (2 + r.IntN(3)) * (headerSize + mostData)
	}
	return r.IntN(200 << 10)
}

// What is written arrives, once and in order, and so do both ends, in whatever order they are
// said, wherever connections are cut.
func TestCuts(t *testing.T) {
	seeds := uint64(60)
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 6))
			w := newWorld(t)
			cuts, where := r.IntN(40), rand.New(rand.NewPCG(seed, 5))
			w.way.allow = func() int {
				if cuts--; cuts < 0 {
					return 1 << 40
				}
				return classes(where)
			}
			near, far := w.pair()
			var all sync.WaitGroup
			up, down := randomData(r), randomData(r)
			order := r.IntN(3) // who says last that it has said all, after it has heard the other's end
			heard := [2]chan struct{}{make(chan struct{}), make(chan struct{})}
			half := func(i int, c net.Conn, says, hears []byte, waits bool, seed uint64) {
				r := rand.New(rand.NewPCG(seed, 7))
				all.Go(func() {
					write(t, c, says, r)
					if waits {
						<-heard[i]
					}
					if err := c.(channel.CloseWriter).CloseWrite(); err != nil {
						t.Error("CloseWrite:", err)
					}
				})
				all.Go(func() {
					defer close(heard[i])
					got, err := io.ReadAll(slow{c, rand.New(rand.NewPCG(seed, 8))})
					if err != nil || sha256.Sum256(got) != sha256.Sum256(hears) {
						t.Errorf("end %d: %d bytes, %v, want %d", i, len(got), err, len(hears))
					}
				})
			}
			half(0, near, up, down, order == 1, r.Uint64())
			half(1, far, down, up, order == 2, r.Uint64())
			all.Wait()
			near.Close()
			far.Close()
			ended(t, "client", near)
			if w.way.dials > 1 {
				t.Logf("%d dials", w.way.dials)
			}
		})
	}
}

func randomData(r *rand.Rand) []byte {
	b := make([]byte, []int{0, 1, r.IntN(1000), r.IntN(1 << 20)}[r.IntN(4)])
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func write(t *testing.T, c net.Conn, b []byte, r *rand.Rand) {
	for len(b) > 0 {
		n := min(len(b), 1+r.IntN(64<<10))
		if m, err := c.Write(b[:n]); m != n || err != nil {
			t.Errorf("%d of %d bytes: %v", m, n, err)
			return
		}
		b = b[n:]
	}
}

// slow reads little at times.
type slow struct {
	io.Reader
	r *rand.Rand
}

func (s slow) Read(p []byte) (int, error) {
	return s.Reader.Read(p[:1+s.r.IntN(len(p))])
}

// A reset is one at the other end, with its reason, also where it is told by another
// connection than the last that was there.
func TestReset(t *testing.T) {
	for name, lost := range map[string]bool{"": false, " while it is lost": true} {
		t.Run("by the host"+name, func(t *testing.T) {
			w := newWorld(t)
			near, far := w.pair()
			if _, err := io.WriteString(far, "x"); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(near, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if lost {
				w.way.refuse(syscall.EHOSTUNREACH)
				w.way.lose(syscall.ECONNRESET)
				await(t, "lost", func() bool { return !near.linked() })
			}
			relay.Abort(far, syscall.ETIMEDOUT)
			w.way.refuse(nil)
			if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("%v", err)
			}
			if _, err := near.Write([]byte("x")); !errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("%v", err)
			}
			ended(t, "client", near)
			w.await("forgotten", 0)
		})
	}
	t.Run("by the client", func(t *testing.T) {
		w := newWorld(t)
		near, far := w.pair()
		relay.Abort(near, syscall.ECONNREFUSED)
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v", err)
		}
		ended(t, "client", near)
		w.await("forgotten", 0)
	})
}

func (w *world) await(what string, streams int) {
	w.t.Helper()
	await(w.t, what, func() bool {
		w.host.mu.Lock()
		defer w.host.mu.Unlock()
		return len(w.host.streams) == streams && len(w.host.lost) <= streams
	})
}

// Who does not read any more has the other end's writes fail, and not wait.
func TestCloseEarly(t *testing.T) {
	w := newWorld(t)
	near, far := w.pair()
	near.Close()
	if got, err := io.ReadAll(far); len(got) > 0 || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	b := make([]byte, 64<<10)
	for {
		if _, err := far.Write(b); errors.Is(err, syscall.EPIPE) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	far.Close()
	ended(t, "client", near)
	w.await("forgotten", 0)
}

// A stream that the host does not hold is told so at once, as is what is not permitted any more.
func TestNoWayBack(t *testing.T) {
	for name, test := range map[string]struct {
		refusal error
		forget  bool
	}{"forgotten": {ErrForgotten, true}, "not permitted": {syscall.EACCES, false}, "closed": {net.ErrClosed, false}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			near, _ := w.pair()
			if test.forget {
				w.host.mu.Lock()
				for _, s := range w.host.streams {
					defer s.finish(net.ErrClosed)
				}
				clear(w.host.streams)
				w.host.mu.Unlock()
			} else {
				w.way.refuse(test.refusal)
			}
			w.way.lose(syscall.ECONNRESET)
			_, err := near.Read(make([]byte, 1))
			if !errors.Is(err, test.refusal) {
				t.Errorf("%v, want %v", err, test.refusal)
			}
			if w.way.dials != 2 {
				t.Errorf("%d dials", w.way.dials)
			}
		})
	}
}

// A stream is held for longer than it may take to notice.
func TestHoldFor(t *testing.T) {
	for notice, want := range map[time.Duration]time.Duration{0: time.Minute, 42 * time.Second: 84 * time.Second, time.Minute: 2 * time.Minute} {
		if h, c := NewHost(notice).hold, NewClient(nil, notice).hold; h != want || c != want {
			t.Errorf("%v: %v and %v, want %v", notice, h, c, want)
		}
	}
}

// The host ends what a hub says is not permitted, and what nobody comes back for.
func TestHostGivesUp(t *testing.T) {
	for name, test := range map[string]struct {
		reason, want error
		hold         time.Duration
	}{"not permitted": {syscall.EACCES, syscall.EACCES, time.Hour}, "too much waits": {syscall.ENOBUFS, syscall.ENOBUFS, time.Hour}, "nobody comes": {syscall.ECONNRESET, syscall.ECONNRESET, 10 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.host.hold = test.hold
			near, far := w.pair()
			w.way.refuse(syscall.EHOSTUNREACH)
			w.way.lose(test.reason)
			if _, err := far.Read(make([]byte, 1)); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			w.await("forgotten", 0)
			near.Close()
		})
	}
}

// A stream of which too much has waited is not dialled again, and fails with the reason.
func TestEndedByHub(t *testing.T) {
	w := newWorld(t)
	near, far := w.pair()
	n := w.way.count()
	near.mu.Lock()
	l := near.link
	near.mu.Unlock()
	near.broke(l, syscall.ENOBUFS) // as by a hub between, which tells both
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ENOBUFS) {
		t.Error(err)
	}
	ended(t, "client", near)
	if w.way.count() != n {
		t.Error("it is dialled again")
	}
	far.Close()
}

// A talker is a connection that ends with a reason while something is being written, which fails
// when it is closed here.
type talker struct {
	net.Conn
	writing, closed, lost chan struct{}
	aborted               atomic.Bool
}

func (c *talker) Read([]byte) (int, error) {
	<-c.writing
	return 0, syscall.EACCES
}

func (c *talker) Write([]byte) (int, error) {
	close(c.writing)
	<-c.closed
	return 0, net.ErrClosed
}

// Abort lets who writes have the first word, if he may.
func (c *talker) Abort(error) error {
	if c.aborted.Swap(true) {
		return nil
	}
	close(c.closed)
	select {
	case <-c.lost:
	case <-time.After(100 * time.Millisecond):
	}
	return nil
}

// Why a connection has ended is not lost by its being closed here.
func TestReasonIsTold(t *testing.T) {
	told := make(chan error, 1)
	c := &talker{writing: make(chan struct{}), closed: make(chan struct{}), lost: make(chan struct{})}
	s := newStream(false, nil, nil, newBudget(), func(_ *Stream, _ bool, err error) { close(c.lost); told <- err })
	s.attach(c)
	if err := <-told; !errors.Is(err, syscall.EACCES) {
		t.Errorf("%v", err)
	}
	s.finish(net.ErrClosed)
}

// What is asked for again by another name is not to be had, and a dial that is said twice is one.
func TestAskedAgain(t *testing.T) {
	w := newWorld(t)
	near, far := w.pair()
	var tok token
	w.host.mu.Lock()
	for tok = range w.host.streams {
	}
	w.host.mu.Unlock()
	other, err := w.way.memory.Listen(t.Context(), "tcp", "db-01:80")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := w.host.Listener(other, "80")
	defer elsewhere.Close()
	go elsewhere.Accept()
	for _, again := range []bool{true, false} {
		if c, err := w.way.DialContext(t.Context(), call{tok, again}.network(), "db-01:80"); !errors.Is(err, ErrForgotten) {
			t.Errorf("again %t: %v, %v", again, c, err)
		}
	}
	if _, err := w.way.DialContext(t.Context(), call{newToken(), true}.network(), address); !errors.Is(err, ErrForgotten) {
		t.Errorf("a token of nobody's: %v", err)
	}
	for _, words := range []string{"resume:new:", "resume:old:" + fmt.Sprintf("%x", tok), "x", "resume"} {
		if _, err := w.way.DialContext(t.Context(), "tcp+"+words, address); err == nil {
			t.Errorf("%q is taken", words)
		}
	}
	before := near.link
	for _, again := range []bool{false, true} { // nobody speaks by it, so it does not take over
		c, err := w.way.DialContext(t.Context(), call{tok, again}.network(), address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(far, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(near, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		near.mu.Lock()
		if near.link != before {
			t.Error("another has taken its place")
		}
		near.mu.Unlock()
	}
	c, err := w.way.DialContext(t.Context(), call{tok, false}.network(), address) // takes over, and is lost
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(frame{kindAck, 2, firstWindow}.append(nil)); err != nil {
		t.Fatal(err)
	}
	await(t, "taken over", func() bool { near.mu.Lock(); defer near.mu.Unlock(); return near.link != before })
	relay.Abort(c, syscall.ECONNRESET)
	go func() { io.WriteString(far, "still here"); far.Close() }()
	if got, err := io.ReadAll(near); string(got) != "still here" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	near.Close()
	ended(t, "client", near)
}

// Dials of one stream that wait to be answered are one for what it leads to, and have one answer;
// the client may speak by either.
func TestAskedTwice(t *testing.T) {
	const dials = 3
	type answer struct {
		net.Conn
		err error
	}
	for name, test := range map[string]struct {
		refusal error
		gone    bool // who asked first has not waited
		speaks  int  // by which the client does
	}{
		"the first is taken": {}, "another is taken": {speaks: 1}, "the first has not waited": {gone: true, speaks: 2},
		"all are refused": {refusal: syscall.ECONNREFUSED}, "all are refused, the first has not waited": {refusal: syscall.EHOSTUNREACH, gone: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			accepted := make(chan channel.Pending, 1)
			go func() {
				c, err := w.ln.Accept()
				if err != nil {
					t.Error(err)
				}
				accepted <- c.(channel.Pending)
				w.serve() // no other is to come
			}()
			network := call{token: newToken()}.network()
			var asked [dials]chan answer
			first, leave := context.WithCancel(t.Context())
			defer leave()
			var far channel.Pending
			for i := range asked {
				ctx := t.Context()
				if i == 0 {
					ctx = first
				}
				asked[i] = make(chan answer, 1)
				go func() {
					c, err := w.way.DialContext(ctx, network, address)
					asked[i] <- answer{c, err}
				}()
				if i == 0 {
					far = <-accepted
				}
				await(t, "it waits", func() bool {
					w.host.mu.Lock()
					defer w.host.mu.Unlock()
					for _, s := range w.host.streams {
						return len(s.others) == i
					}
					return false
				})
			}
			if test.gone {
				leave()
				if a := <-asked[0]; !errors.Is(a.err, context.Canceled) {
					t.Fatalf("%v", a.err)
				}
			}
			if err := far.Answer(test.refusal); err != nil {
				t.Fatal(err)
			}
			var conns [dials]net.Conn
			for i := range asked {
				if i == 0 && test.gone {
					continue
				}
				a := <-asked[i]
				if conns[i] = a.Conn; !errors.Is(a.err, test.refusal) {
					t.Errorf("dial %d: %v, want %v", i, a.err, test.refusal)
				}
			}
			if test.refusal != nil {
				w.await("forgotten", 0)
				return
			}
			for i, c := range conns { // as a hub drops the others
				if c != nil && i != test.speaks {
					defer c.Close()
				}
			}
			near := newStream(true, nil, nil, w.client.budget, func(s *Stream, _ bool, err error) { t.Errorf("lost: %v", err); s.finish(err) })
			near.attach(conns[test.speaks])
			go func() { _, _ = io.Copy(far, far); far.Close() }()
			_, _ = io.WriteString(near, "there and back")
			_ = near.CloseWrite()
			if got, err := io.ReadAll(near); string(got) != "there and back" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
			near.Close()
			ended(t, "client", near)
			w.await("forgotten", 0)
		})
	}
}

// A late wire is one whose answer is long in coming.
type late struct {
	net.Conn
	asked, over chan struct{} // over: it may answer
	err         error
}

func lateWire(err error) (*late, net.Conn) {
	near, far := net.Pipe()
	return &late{far, make(chan struct{}), make(chan struct{}), err}, near
}

func (l *late) Answer(error) error {
	close(l.asked)
	<-l.over
	return l.err
}

// A stream that goes by a further dial is left alone by the first one, however late that is answered.
func TestFirstIsLate(t *testing.T) {
	for name, late := range map[string]error{"and has not waited": net.ErrClosed, "and is taken": nil} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			asked := call{token: newToken()}
			first, dropped := lateWire(late)
			far := w.host.take(first, asked, "22")
			answered := make(chan error, 1)
			go func() { answered <- far.Answer(nil) }()
			<-first.asked

			second, conn := lateWire(nil)
			close(second.over)
			if w.host.take(second, asked, "22") != nil {
				t.Fatal("a second stream")
			}
			near := newStream(true, nil, nil, w.client.budget, func(s *Stream, _ bool, err error) { t.Errorf("lost: %v", err); s.finish(err) })
			near.attach(conn)
			await(t, "it goes by the second", far.linked)

			close(first.over)
			if err := <-answered; err != nil {
				t.Errorf("the answer: %v", err)
			}
			go func() { _, _ = io.Copy(far, far); far.Close() }()
			_, _ = io.WriteString(near, "there and back")
			_ = near.CloseWrite()
			if got, err := io.ReadAll(near); string(got) != "there and back" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
			dropped.Close()
			near.Close()
			ended(t, "client", near)
			w.await("forgotten", 0)
		})
	}
}

// A stream whose first dial has not waited goes by a further one, which is answered but not spoken by
// yet; when there is none that will be, it has ended.
func TestFirstHasGone(t *testing.T) {
	for name, second := range map[string]error{"another is answered": nil, "as has another": net.ErrClosed} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			asked := call{token: newToken()}
			first, dropped := lateWire(net.ErrClosed)
			defer dropped.Close()
			far := w.host.take(first, asked, "22")
			answered := make(chan error, 1)
			go func() { answered <- far.Answer(nil) }()
			<-first.asked

			further, conn := lateWire(second)
			defer conn.Close()
			if w.host.take(further, asked, "22") != nil {
				t.Fatal("a second stream")
			}
			<-further.asked
			close(first.over)
			if err := <-answered; err != nil {
				t.Errorf("the answer: %v", err)
			}
			close(further.over)
			if second != nil {
				ended(t, "host", far.Stream)
				w.await("forgotten", 0)
				return
			}
			near := newStream(true, nil, nil, w.client.budget, func(s *Stream, _ bool, err error) { t.Errorf("lost: %v", err); s.finish(err) })
			near.attach(conn)
			go func() { _, _ = io.Copy(far, far); far.Close() }()
			_, _ = io.WriteString(near, "there and back")
			_ = near.CloseWrite()
			if got, err := io.ReadAll(near); string(got) != "there and back" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
			near.Close()
			ended(t, "client", near)
			w.await("forgotten", 0)
		})
	}
}

// A stream is in the list of those that are lost when it is, however late the host hears of an
// earlier loss.
func TestListed(t *testing.T) {
	w := newWorld(t)
	wire, conn := lateWire(nil)
	close(wire.over)
	far := w.host.take(wire, call{token: newToken()}, "22")
	s := far.held
	listed := func() (int, bool) {
		w.host.mu.Lock()
		defer w.host.mu.Unlock()
		return len(w.host.lost), s.timer != nil
	}
	drain := func(c net.Conn) { _, _ = io.Copy(io.Discard, c); c.Close() }
	go drain(conn)
	if err := far.Answer(nil); err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		s.mu.Lock()
		l := s.link
		s.mu.Unlock()
		var both sync.WaitGroup
		both.Go(func() { w.host.holds(s, syscall.ECONNRESET) })
		both.Go(func() { s.broke(l, syscall.ECONNRESET) })
		both.Wait()
		if n, timed := listed(); n != 1 || !timed {
			t.Fatalf("it is lost: %d are listed, with a timer: %t", n, timed)
		}

		by, conn := net.Pipe()
		go drain(conn)
		go conn.Write(frame{kindAck, 0, firstWindow}.append(nil))
		both.Go(func() { w.host.holds(s, syscall.ECONNRESET) })
		both.Go(func() { w.host.found(s, by) })
		both.Wait()
		if n, timed := listed(); n != 0 || timed {
			t.Fatalf("it goes on: %d are listed, with a timer: %t", n, timed)
		}
	}
	s.finish(net.ErrClosed)
}

// A stream whose connections are lost as soon as they have spoken is dialled ever less often, and
// given up when that has gone on for long enough.
func TestLostAgainAndAgain(t *testing.T) {
	w := newWorld(t)
	w.client.hold = 100 * time.Millisecond
	connections := 0
	w.way.allow = func() int {
		if connections++; connections <= 2 { // each asks twice, both ways
			return 1 << 40
		}
		return headerSize
	}
	near, far := w.pair()
	w.way.lose(syscall.ECONNRESET)
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if n := w.way.count(); n > 40 {
		t.Errorf("%d dials", n)
	}
	far.Close()
	w.host.mu.Lock()
	for _, s := range w.host.streams {
		go s.finish(net.ErrClosed) // nobody comes back
	}
	w.host.mu.Unlock()
}

// What comes byte by byte costs about what it counts.
func TestLittle(t *testing.T) {
	in := incoming{window: firstWindow}
	var want, got []byte
	for n := range 10_000 {
		data := bytes.Repeat([]byte{byte(n)}, 1+n%3)
		if n%1000 == 999 {
			data = bytes.Repeat(data, 2000)
		}
		want = append(want, data...)
		f := frame{kindData, in.received, uint32(len(data))}
		if err := in.take(f, data); err != nil {
			t.Fatal(err)
		}
		if n%777 == 0 {
			b := make([]byte, 1+n%2000)
			got = append(got, b[:in.read(b)]...)
		}
	}
	held := 0
	for _, c := range in.queue {
		held += cap(c)
	}
	if int64(held) > 3*in.size || len(in.queue) > 100 {
		t.Errorf("%d bytes, and %d slices, for %d", held, len(in.queue), in.size)
	}
	b := make([]byte, in.size)
	if got = append(got, b[:in.read(b)]...); !bytes.Equal(got, want) || in.size != 0 || len(in.queue) > 0 {
		t.Errorf("%d bytes are not the %d that came", len(got), len(want))
	}
}

// Of streams that are lost the host holds so many, and lets go of those that were lost first of the
// client that has most.
func TestMostHeld(t *testing.T) {
	w := newWorld(t)
	w.host.most = 3
	var nears []*Stream
	var fars []net.Conn
	for i := range 5 {
		accepted := make(chan net.Conn, 1)
		go func() {
			c, _ := w.ln.Accept()
			_ = c.(channel.Pending).Answer(nil)
			accepted <- c
		}()
		w.way.mu.Lock()
		w.way.client = byte(min(i, 1)) // the first has one
		w.way.mu.Unlock()
		near, err := w.client.Dial(t.Context(), address)
		if err != nil {
			t.Fatal(err)
		}
		nears, fars = append(nears, near), append(fars, <-accepted)
	}
	w.way.refuse(syscall.EHOSTUNREACH)
	for i, near := range nears { // one after the other
		near.mu.Lock()
		l := near.link
		near.mu.Unlock()
		near.broke(l, syscall.ECONNRESET)
		await(t, "the host knows", func() bool {
			w.host.mu.Lock()
			defer w.host.mu.Unlock()
			return len(w.host.lost) == min(i+1, 3) && len(w.host.streams) == 5-max(0, i+1-3)
		})
	}
	for i, far := range fars {
		far.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := far.Read(make([]byte, 1))
		if has := i == 1 || i == 2; errors.Is(err, syscall.ECONNRESET) != has {
			t.Errorf("stream %d: %v", i, err)
		}
	}
	go w.serve()
	w.way.refuse(nil)
	for _, near := range nears {
		near.Abort(nil) // which those hear that are held
		ended(t, "client", near)
	}
}

// A lag is a connection of which all is heard later.
type lag struct {
	net.Conn
	late chan said
	rest []byte
	over chan struct{}
	once sync.Once
}

type said struct {
	b  []byte
	at time.Time
}

func lagging(c net.Conn, by time.Duration) *lag {
	l := &lag{Conn: c, late: make(chan said, 1<<14), over: make(chan struct{})}
	go func() {
		defer close(l.late)
		for {
			b := make([]byte, 32<<10)
			n, err := c.Read(b)
			if n > 0 {
				select {
				case l.late <- said{b[:n], time.Now().Add(by)}:
				case <-l.over:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	return l
}

func (l *lag) Read(p []byte) (int, error) {
	if len(l.rest) == 0 {
		next, ok := <-l.late
		if !ok {
			return 0, io.EOF
		}
		time.Sleep(time.Until(next.at))
		l.rest = next.b
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

func (l *lag) Close() error {
	l.once.Do(func() { close(l.over) })
	return l.Conn.Close()
}

// farAway is both ends of a stream with a round trip between them.
func farAway(rtt time.Duration) (a, b *Stream) {
	x, y := net.Pipe()
	lost := func(s *Stream, _ bool, err error) { s.finish(err) }
	a = newStream(true, x.LocalAddr(), x.RemoteAddr(), newBudget(), lost)
	b = newStream(false, y.LocalAddr(), y.RemoteAddr(), newBudget(), lost)
	a.attach(lagging(x, rtt/2))
	b.attach(lagging(y, rtt/2))
	return a, b
}

const aRoundTrip = 100 * time.Millisecond

// The window of who reads as fast as it comes grows to what a long path holds, either way.
func TestWindowGrows(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
	a, b := farAway(aRoundTrip)
	for _, way := range [][2]*Stream{{a, b}, {b, a}} {
		go func() { _, _ = io.Copy(way[0], io.LimitReader(endless{}, 64<<20)); _ = way[0].CloseWrite() }()
		n, err := io.Copy(io.Discard, way[1])
		if n != 64<<20 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		way[1].mu.Lock()
		if way[1].in.window < 4<<20 {
			t.Errorf("the window is %d", way[1].in.window)
		}
		way[1].mu.Unlock()
	}
	a.Close()
	b.Close()
	ended(t, "client", a)
	ended(t, "host", b)
}

// BenchmarkFarAway is what one stream carries over a path with a long round trip.
func BenchmarkFarAway(t *testing.B) {
	for _, rtt := range []time.Duration{0, aRoundTrip} {
		t.Run(rtt.String(), func(t *testing.B) {
			a, b := farAway(rtt)
			defer a.Close()
			defer b.Close()
			t.SetBytes(1 << 20)
			go func() { _, _ = io.Copy(a, endless{}) }()
			_, _ = io.CopyN(io.Discard, b, 64<<20) // until the window has grown
			t.ResetTimer()
			_, _ = io.CopyN(io.Discard, b, int64(t.N)<<20)
		})
	}
}

// Who does not read is not sent more than the window, nor is more kept than is bounded; and an
// end that only writes hears what is acknowledged all the same.
func TestBounds(t *testing.T) {
	w := newWorld(t)
	near, far := w.pair()
	for _, c := range []net.Conn{near, far} {
		c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := io.Copy(c, endless{})
		var late net.Error
		if !errors.As(err, &late) || !late.Timeout() {
			t.Errorf("%v", err)
		}
		if n < firstWindow || n > firstWindow+mostUnsent {
			t.Errorf("%d bytes were written", n)
		}
		c.SetWriteDeadline(time.Time{})
	}
	go io.Copy(io.Discard, far) // near hears of it, though nobody reads there
	if n, err := io.Copy(near, io.LimitReader(endless{}, 4<<20)); n != 4<<20 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	near.Abort(nil)
	ended(t, "client", near)
	far.Close()
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// A window grows for what has come, and what it has grown by is held until that was read, or is
// not any more.
func TestBudget(t *testing.T) {
	for name, end := range map[string]func(s *Stream){
		"read":   func(s *Stream) { _, _ = io.ReadAll(s) },
		"closed": func(s *Stream) { s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBudget()
			s := newStream(false, nil, nil, b, nil)
			l := &link{s: s, ready: true, heard: true, timer: time.AfterFunc(time.Hour, func() {})}
			defer l.settle()
			say := func(f frame, data []byte) {
				s.mu.Lock()
				defer s.mu.Unlock()
				if err := l.take(f, data); err != nil {
					t.Fatal(err)
				}
			}
			for _, at := range []int64{1, firstWindow, lastByte} {
				if say(frame{kindWant, at, 0}, nil); s.grown != 0 {
					t.Errorf("the window grows by %d, for what has not come", s.grown)
				}
			}
			say(frame{kindData, 0, 5}, []byte("12345"))
			if say(frame{kindWant, 5, 0}, nil); s.grown != firstWindow {
				t.Errorf("the window grows by %d", s.grown)
			}
			s.finish(io.ErrClosedPipe)
			if left := b.left.Load(); left != mostGrown-firstWindow {
				t.Errorf("%d are left while something is not read", left)
			}
			end(s)
			if left := b.left.Load(); left != mostGrown {
				t.Errorf("%d are left", left)
			}
		})
	}
	b := newBudget()
	if n := b.take(mostGrown); n != mostGrown/4 {
		t.Errorf("who comes first takes %d", n)
	}
	for b.take(mostGrown) > 0 {
	}
	if left := b.left.Load(); left < 3*leastGrown || left >= 4*leastGrown+4 {
		t.Errorf("%d are left", left)
	}
}

// What is kept beyond a little is of the budget, until the other end has it; where there is none
// left, that little goes on.
func TestKept(t *testing.T) {
	w := newWorld(t)
	near, far := w.pair()
	go func() { _, _ = io.Copy(far, far); far.Close() }()
	for _, all := range []bool{false, true} {
		taken := int64(0)
		if all {
			for n := int64(1); n > 0; taken += n {
				n = w.client.budget.take(mostGrown)
			}
		}
		said := make([]byte, 1<<20)
		go near.Write(said)
		if _, err := io.ReadFull(near, said); err != nil {
			t.Fatal(err)
		}
		await(t, "nothing is kept", func() bool {
			near.mu.Lock()
			defer near.mu.Unlock()
			return near.out.acked == near.out.written && near.out.most == firstKept && near.grown == near.in.window-firstWindow
		})
		near.mu.Lock()
		if left := w.client.budget.left.Load(); left != mostGrown-taken-near.grown {
			t.Errorf("%d are left", left)
		}
		near.mu.Unlock()
		w.client.budget.give(taken)
	}
	near.Close()
	ended(t, "client", near)
}

// Deadlines are those of any connection.
func TestDeadline(t *testing.T) {
	w := newWorld(t)
	near, far := w.pair()
	near.SetReadDeadline(time.Now().Add(time.Millisecond))
	var late net.Error
	if _, err := near.Read(make([]byte, 1)); !errors.As(err, &late) || !late.Timeout() {
		t.Errorf("%v", err)
	}
	near.SetReadDeadline(time.Time{})
	go io.WriteString(far, "x")
	if _, err := near.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	go far.Close()
	if got, err := io.ReadAll(near); len(got) > 0 || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	near.Close()
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	ended(t, "client", near)
}

// A refusal is that of the dial.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	go func() {
		if c, err := w.ln.Accept(); err == nil {
			_ = c.(channel.Pending).Answer(syscall.ECONNREFUSED)
		}
	}()
	if _, err := w.client.Dial(t.Context(), address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v", err)
	}
	w.await("forgotten", 0)
}

// FuzzFrame: whatever comes is a frame that would be said like that, or an error.
func FuzzFrame(f *testing.F) {
	f.Add(frame{kindAck, 0, firstWindow}.append(nil))
	f.Add(frame{kindData, 5, mostData}.append(nil))
	f.Add(frame{kindReset, 0, 1 << 31}.append(nil))
	f.Fuzz(func(t *testing.T, wire []byte) {
		var b [headerSize]byte
		copy(b[:], wire)
		got, err := parseFrame(&b)
		if err == nil && !bytes.Equal(got.append(nil), b[:]) {
			t.Fatalf("%x is %+v", b, got)
		}
		if err != nil && !errors.Is(err, errRules) {
			t.Fatal(err)
		}
	})
}

// FuzzLink: whatever the other end says, nothing panics or waits for ever, no more is held than
// the window is, and nothing is left.
func FuzzLink(f *testing.F) {
	f.Add([]byte{1, 0, 0, 2, 0, 5, 3, 5, 0, 7, 0, 0}, true)
	f.Add([]byte{1, 3, 200, 2, 0, 255, 4, 0, 0, 5, 0, 0, 6, 0, 3}, false)
	f.Add([]byte{1, 4, 0, 4, 255, 0, 2, 1, 1}, true)
	f.Fuzz(func(t *testing.T, script []byte, dials bool) {
		a, b := net.Pipe()
		s := newStream(dials, a.LocalAddr(), a.RemoteAddr(), newBudget(), func(s *Stream, _ bool, err error) { s.finish(err) })
		s.attach(a)
		var all sync.WaitGroup
		all.Go(func() { _, _ = io.Copy(io.Discard, b) })
		all.Go(func() { _, _ = io.WriteString(s, "ours"); _ = s.CloseWrite() })
		_ = b.SetWriteDeadline(time.Now().Add(patience))
		for len(script) >= 3 {
			fr := frame{script[0]%8 + 1, int64(int8(script[1])), uint32(script[2]) * 200}
			wire := fr.append(nil)
			if fr.kind == kindData {
				wire = append(wire, make([]byte, fr.value)...)
			}
			if _, err := b.Write(wire); err != nil {
				break
			}
			script = script[3:]
		}
		s.mu.Lock()
		if s.in.size > s.in.window {
			t.Errorf("%d bytes wait in a window of %d", s.in.size, s.in.window)
		}
		s.mu.Unlock()
		b.Close()
		all.Wait()
		<-s.Ended()
		s.Close()
		if left := s.budget.left.Load(); left != mostGrown {
			t.Errorf("%d bytes of the budget are left", left)
		}
	})
}
