package router

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

const (
	behind    = 1 << 20          // a copy that is so far behind is given up
	allBehind = 32 << 20         // or what all of them hold
	maxCopies = 256              // at a time
	chunkCost = 64               // of memory, besides what is in it
	aftermath = 30 * time.Second // a copy may go on after its original has ended
	rested    = 5 * time.Second  // its connection is kept for the next one
)

// errBehind is what a copy reads that was given up.
var errBehind = errors.New("the copy fell behind")

// copies are those under way. The zero value is ready.
type copies struct {
	all sync.WaitGroup

	mu    sync.Mutex
	bytes int
	n     int
}

// copiers is how a mirror's laptop is sent requests.
type copiers struct {
	to           laptop
	http1, http2 *http.Transport
}

func newCopiers(to laptop) *copiers {
	over := func(http2 bool) *http.Transport {
		t := newTransport(http2, nil)
		t.MaxIdleConnsPerHost, t.IdleConnTimeout = 16, rested
		t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return to.DialContext(ctx, network, ":"+port)
		}
		return t
	}
	return &copiers{to, over(false), over(true)}
}

func (c *copiers) of(http2 bool) *http.Transport {
	if http2 {
		return c.http2
	}
	return c.http1
}

func (c *copiers) close() {
	c.http1.CloseIdleConnections()
	c.http2.CloseIdleConnections()
}

// start runs a copy of what will be written to the spool, unless there are too
// many already.
func (all *copies) start(ctx context.Context, datagrams bool, run func(context.Context, *spool)) *spool {
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.n >= maxCopies || ctx.Err() != nil {
		return nil
	}
	all.n++
	ctx, cancel := context.WithCancel(ctx)
	s := &spool{all: all, datagrams: datagrams, cancel: cancel}
	s.more.L = &s.mu
	all.all.Go(func() {
		defer all.leave()
		defer cancel()
		defer s.Close()
		run(ctx, s)
	})
	return s
}

func (all *copies) leave() {
	all.mu.Lock()
	defer all.mu.Unlock()
	all.n--
}

// take asks for memory, or gives it back.
func (all *copies) take(n int) bool {
	all.mu.Lock()
	defer all.mu.Unlock()
	if n > 0 && all.bytes+n > allBehind {
		return false
	}
	all.bytes += n
	return true
}

// requests starts the copies of a request; its body is to be written to them.
func (all *copies) requests(q *request, req *http.Request) (to []*spool) {
	for _, m := range q.to.mirrors {
		again := req.Clone(context.Background())
		again.Trailer, again.URL.Host = nil, "localhost"+q.route.service()
		again.Header.Del("Expect")
		s := all.start(q.run, false, func(ctx context.Context, s *spool) {
			defer q.router.claims.begin(m, &m.requests)(true)
			defer func() {
				if m.gone.Err() != nil {
					m.copies.close()
				}
			}()
			if again.Body != nil {
				again.Body = s
			}
			if res, err := m.copies.of(q.http2).RoundTrip(again.WithContext(ctx)); err == nil {
				if res.StatusCode != http.StatusSwitchingProtocols {
					io.CopyN(io.Discard, res.Body, behind)
				}
				res.Body.Close()
			}
		})
		if s == nil {
			continue
		}
		if req.Body == nil {
			s.end()
		}
		s.left = req.ContentLength
		to = append(to, s)
	}
	return to
}

// A body is read by who answers, and copied.
type body struct {
	io.Reader
	copies []*spool
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	spread(b.copies, p[:n], err)
	return n, err
}

// Close leaves the body open: it may have to be read by another side.
func (b *body) Close() error { return nil }

func spread(to []*spool, p []byte, err error) {
	for _, s := range to {
		if len(p) > 0 || err == nil {
			s.put(p)
		}
		if err == io.EOF {
			s.end()
		}
	}
}

// tee has what comes from a connection copied to mirrors, first what has come
// already. It is to be told when it is done.
func (all *copies) tee(ctx context.Context, c net.Conn, route *Route, mirrors []*claim, first []byte) (net.Conn, func()) {
	t := &tee{Conn: c}
	for _, m := range mirrors {
		s := all.start(ctx, route.Network == "udp", func(ctx context.Context, s *spool) { m.follow(ctx, s, route) })
		if s != nil {
			t.copies = append(t.copies, s)
		}
	}
	if len(t.copies) == 0 {
		return c, func() {}
	}
	if len(first) > 0 {
		spread(t.copies, first, nil)
	}
	return t, func() {
		for _, s := range t.copies {
			s.end()
		}
	}
}

// follow sends a copy to the laptop, and reads what it answers to nowhere.
func (c *claim) follow(ctx context.Context, s *spool, route *Route) {
	defer c.copies.to.t.begin(c, &c.connections)(true)
	far, err := c.copies.to.DialContext(ctx, route.Network, route.service())
	if err != nil {
		return
	}
	defer far.Close()
	defer context.AfterFunc(ctx, func() { relay.Abort(far, errBehind) })()
	var answers sync.WaitGroup
	answers.Go(func() { io.Copy(io.Discard, struct{ io.Reader }{far}) })
	defer answers.Wait()
	defer far.SetReadDeadline(time.Unix(1, 0))
	if s.datagrams {
		s.sendTo(far)
		return
	}
	if _, err := relay.Copy(far, s); err != nil {
		return
	}
	if cw, ok := far.(channel.CloseWriter); ok && cw.CloseWrite() == nil {
		answers.Wait()
	}
}

// sendTo sends datagrams, one for one.
func (s *spool) sendTo(far net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := s.Read(buf)
		if err != nil {
			return
		}
		if _, err := far.Write(buf[:n]); err != nil && !relay.Lost(err) {
			return
		}
	}
}

// A tee is a connection whose reads are copied.
type tee struct {
	net.Conn
	copies []*spool
}

func (t *tee) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	spread(t.copies, p[:n], err)
	return n, err
}

// CloseWrite and Abort are the connection's own.
func (t *tee) CloseWrite() error {
	if cw, ok := t.Conn.(channel.CloseWriter); ok {
		return cw.CloseWrite()
	}
	return nil
}

func (t *tee) Abort(reason error) error {
	relay.Abort(t.Conn, reason)
	return nil
}

// A spool holds what a copy has not read yet. Writing to it never waits: a
// stream that falls behind is given up, of datagrams some are lost.
type spool struct {
	all       *copies
	datagrams bool
	cancel    context.CancelFunc

	mu     sync.Mutex
	more   sync.Cond
	chunks [][]byte
	size   int
	left   int64       // to be written yet, if more than 0; otherwise not known
	err    error       // what is read when the chunks are
	timer  *time.Timer // runs when all was written
}

func (s *spool) put(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	cost := len(p) + chunkCost
	switch {
	case s.err != nil:
	case s.size+cost <= behind && s.all.take(cost):
		s.size += cost
		s.chunks = append(s.chunks, slices.Clone(p))
		s.more.Signal()
		if s.left > 0 {
			if s.left -= int64(len(p)); s.left <= 0 {
				s.ended() // who answers need not look for the end
			}
		}
	case !s.datagrams:
		s.stop(errBehind)
	}
}

func (s *spool) Read(p []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.chunks) == 0 && s.err == nil {
		s.more.Wait()
	}
	if len(s.chunks) == 0 {
		return 0, s.err
	}
	n = copy(p, s.chunks[0])
	left := s.chunks[0][n:]
	s.free(n)
	if s.chunks[0] = left; len(left) == 0 || s.datagrams {
		s.chunks = s.chunks[1:]
		s.free(len(left) + chunkCost)
	}
	return n, nil
}

func (s *spool) free(n int) {
	s.size -= n
	s.all.take(-n)
}

// end: the whole was written. Its copy may finish.
func (s *spool) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended()
}

// ended is end with the lock held.
func (s *spool) ended() {
	if s.err == nil {
		s.err = io.EOF
		s.more.Signal()
		s.timer = time.AfterFunc(aftermath, s.cancel)
	}
}

// cut: no more will be written. If that was not the whole, the copy is none.
func (s *spool) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.stop(io.ErrUnexpectedEOF)
	}
}

// Close is called by who reads.
func (s *spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop(net.ErrClosed)
	return nil
}

// stop gives a copy up, with the lock held.
func (s *spool) stop(err error) {
	s.err = err
	s.chunks = nil
	s.free(s.size)
	if s.timer != nil {
		s.timer.Stop()
	}
	s.cancel()
	s.more.Signal()
}
