package router

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

const (
	maxHeader  = 1 << 20 // of a request or an answer: the two ends have limits of their own, and lower ones
	maxStreams = 1 << 16 // at a time, of one HTTP/2 connection: likewise
	bufferSize = 32 << 10
	headBuffer = 2 << 10 // of each direction, for as long as there is a connection: bodies pass it by
	flushTime  = time.Second
	hearing    = time.Second // for a word to reach a client, and for what it said before to reach us
)

// A web is one connection that speaks HTTP: its requests are routed one by one.
//
// It has connections of its own to each side that takes some of them, one for
// each in HTTP/1. So who was balanced over the original pods by connection still
// is, what a server binds to a connection stays bound, and a keep-alive that
// ends does not end somebody else's.
type web struct {
	run    context.Context // the router's
	ctx    context.Context // ends with the connection
	end    context.CancelFunc
	router *Router
	route  *Route
	client *client
	http2  bool
	host   string // stands in requests that came without one
	errors *log.Logger
	busy   sync.WaitGroup

	mu    sync.Mutex
	ways  map[*claim]*way // nil is the original
	ended bool            // the client has ended its half
	sent  net.Conn        // where the request that is being answered was sent
}

func newWeb(ctx context.Context, r *Router, route *Route, c *client, http2 bool) *web {
	run := ctx
	ctx, end := context.WithCancel(ctx)
	w := &web{
		run: run, ctx: ctx, end: end, router: r, route: route, client: c, http2: http2,
		host: route.Original, ways: map[*claim]*way{},
		errors: slog.NewLogLogger(r.config.Log.Handler(), slog.LevelDebug),
	}
	if w.host == "" {
		w.host = net.JoinHostPort("localhost", route.service()[1:])
	}
	return w
}

// serve returns when the connection is gone and its requests are answered.
func (w *web) serve() {
	defer w.end()
	server := &http.Server{
		Handler:                      w,
		Protocols:                    protocols(w.http2),
		HTTP2:                        &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     w.errors,
		BaseContext:                  func(net.Listener) context.Context { return w.ctx },
	}
	if w.http2 {
		w.client.frames = &frames{}
	} else {
		server.ConnState, w.client.half = w.rests, w.clientEnded
	}
	late := w.router.claims.parts()
	l := &single{conn: w.client, stop: func() bool { return false }, done: make(chan struct{})}
	l.taken = func() { l.stop = context.AfterFunc(w.router.claims.parting, func() { w.part(server, late) }) }
	server.Serve(l)
	<-w.client.closed
	l.stop()
	w.busy.Wait()
	for _, to := range w.ways {
		to.stop()
	}
}

// rests keeps account of when the client waits for nothing.
func (w *web) rests(_ net.Conn, s http.ConnState) {
	switch s {
	case http.StateIdle:
		w.client.rest()
	case http.StateActive:
		w.client.work()
	}
}

// part asks the client to connect anew. HTTP/2 has a word for it, which loses
// nothing if it is said twice: first that there will be an end, and when the
// client must have heard that, where it was (RFC 9113, 6.8). In HTTP/1 an answer
// has to say it (RFC 9112, 9.6).
func (w *web) part(server *http.Server, late bool) {
	if !w.http2 {
		w.client.part(w.ctx)
		return
	}
	if late {
		wait(w.ctx, rest) // who has just come may ask first
	}
	w.client.goAway()
	wait(w.ctx, hearing)
	now, cancel := context.WithCancel(context.Background())
	cancel()
	server.Shutdown(now)
}

func protocols(http2 bool) *http.Protocols {
	var p http.Protocols
	p.SetHTTP1(!http2)
	p.SetUnencryptedHTTP2(http2)
	return &p
}

// A way is how to get to a side. What is idle on the way to a claim ends with the
// claim: a laptop that leaves waits for its connections.
type way struct {
	*http.Transport
	busy int         // requests that are on it
	stop func() bool // undoes that
}

// enter finds the way to a side.
func (w *web) enter(c *claim) *way {
	w.mu.Lock()
	defer w.mu.Unlock()
	to := w.ways[c]
	if to == nil {
		t := newTransport(w.http2, func(ctx context.Context) (net.Conn, error) { return w.dial(ctx, c) })
		to = &way{Transport: t, stop: func() bool { return false }}
		if c != nil {
			to.stop = context.AfterFunc(c.gone, t.CloseIdleConnections)
		}
		w.ways[c] = to
	}
	to.busy++
	return to
}

// clientEnded passes on that the client has ended its half, when its request
// has been sent: the server knows what to make of it.
func (w *web) clientEnded() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.endSent()
}

// wasSent notes where a request was sent to; nil when it is answered.
func (w *web) wasSent(to net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = to
	w.endSent()
}

// endSent waits a little, because http.Transport tells of a request that was
// sent just before it flushes its buffer.
func (w *web) endSent() {
	to, ok := w.sent.(*tied)
	if !ok || !w.ended {
		return
	}
	time.AfterFunc(flushTime, func() {
		w.mu.Lock()
		still := w.sent == to
		w.mu.Unlock()
		if still {
			to.CloseWrite()
		}
	})
}

// leave ends a request's use of its way, and the way itself where its claim was
// gone before that.
func (w *web) leave(c *claim) {
	w.mu.Lock()
	defer w.mu.Unlock()
	to := w.ways[c]
	to.busy--
	if c == nil || c.gone.Err() == nil {
		return
	}
	to.CloseIdleConnections()
	if to.busy == 0 {
		delete(w.ways, c)
	}
}

// dial opens a connection that ends with the client's, if not before.
func (w *web) dial(ctx context.Context, c *claim) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(w.ctx, cancel)()
	far, err := w.open(memchan.From(ctx, w.client.RemoteAddr()), c)
	if err != nil {
		return nil, err
	}
	return &tied{Conn: far, untie: context.AfterFunc(w.ctx, func() { far.Close() })}, nil
}

func (w *web) open(ctx context.Context, c *claim) (net.Conn, error) {
	if c != nil {
		return laptop{w.router.claims, c}.DialContext(ctx, "tcp", w.route.service())
	}
	return w.router.original(ctx, w.route)
}

// A tied connection ends with another one.
type tied struct {
	net.Conn
	untie   func() bool
	writing sync.Mutex
}

func (t *tied) Write(p []byte) (int, error) {
	t.writing.Lock()
	defer t.writing.Unlock()
	return t.Conn.Write(p)
}

func (t *tied) Close() error {
	t.untie()
	return t.Conn.Close()
}

// CloseWrite is the connection's own; what has none is left open.
func (t *tied) CloseWrite() error {
	t.writing.Lock()
	defer t.writing.Unlock()
	if cw, ok := t.Conn.(channel.CloseWriter); ok {
		return cw.CloseWrite()
	}
	return nil
}

// newTransport speaks the client's own protocol, and adds nothing to it. What
// its dial says is a refusal.
func newTransport(http2 bool, dial func(context.Context) (net.Conn, error)) *http.Transport {
	return &http.Transport{
		Protocols:              protocols(http2),
		DisableCompression:     true,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxHeader,
		ReadBufferSize:         headBuffer,
		WriteBufferSize:        headBuffer,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := dial(ctx)
			if err != nil {
				return nil, &refusal{err}
			}
			return c, nil
		},
	}
}

// A request is one of them, on its way.
type request struct {
	*web
	to      choice
	changed <-chan struct{} // since then
	proxy   httputil.ReverseProxy
	copies  []*spool
	last    *claim // who was asked last
	reused  bool   // over a connection that had served before
	whole   bool   // the answer was
	count   func(took bool)
	left    func() // the way to who was asked
}

func (w *web) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	w.busy.Add(1)
	defer w.busy.Done()
	q := &request{web: w, changed: w.router.claims.changes()}
	q.to = w.router.choose(w.route, req)
	q.proxy = httputil.ReverseProxy{
		Rewrite: q.keep, Transport: q, ModifyResponse: q.answered, ErrorHandler: q.failed,
		FlushInterval: -1, BufferPool: &w.router.buffers, ErrorLog: w.errors,
	}
	defer q.done()
	if !w.http2 {
		http.NewResponseController(rw).EnableFullDuplex()
	}
	if req.Trailer == nil && req.ContentLength < 0 {
		req.Trailer = http.Header{} // for trailers that were not announced
	}
	q.proxy.ServeHTTP(&answer{rw, w}, req)
	q.whole = true
}

func (r *Router) choose(route *Route, req *http.Request) choice {
	if r.config.SpareProbes && strings.HasPrefix(req.UserAgent(), "kube-probe/") {
		return choice{}
	}
	return r.claims.choose(route.name(), req)
}

// keep undoes what a proxy does to a request: this one is not to be seen.
func (q *request) keep(pr *httputil.ProxyRequest) {
	in, out := pr.In, pr.Out
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Proxy-Authorization"} {
		if v, ok := in.Header[name]; ok {
			out.Header[name] = v
		}
	}
	if settings := in.Header["Http2-Settings"]; settings != nil && strings.EqualFold(out.Header.Get("Upgrade"), "h2c") {
		out.Header["Http2-Settings"] = settings
		out.Header.Set("Connection", "Upgrade, HTTP2-Settings")
	}
	out.URL.Scheme, out.URL.Host, out.URL.RawQuery = "http", q.host, in.URL.RawQuery
	if path, _, _ := strings.Cut(in.RequestURI, "?"); strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "//") {
		out.URL.Opaque = path // as it was written
	}
	out.Trailer = in.Trailer // filled when the body has been read
}

// RoundTrip asks who is to take the request, and the original where that one
// does not.
func (q *request) RoundTrip(req *http.Request) (*http.Response, error) {
	q.copies = q.router.copies.requests(q, req)
	if req.Body != nil {
		req.Body = &body{Reader: req.Body, copies: q.copies}
	}
	if q.to.claim != nil {
		if res, err := q.ask(q.to.claim, req); err == nil || !again(req, err) {
			return res, err
		}
	}
	left := q.router.claims.left(q.to)
	res, err := q.ask(nil, req)
	if err == nil || !left || !refused(err) || req.Context().Err() != nil {
		return res, err
	}
	wait, cancel := context.WithTimeout(req.Context(), hold)
	defer cancel()
	for refused(err) {
		to, back := q.router.claims.await(wait, &q.changed, q.route.name(), req)
		if !back {
			break
		}
		res, err = q.ask(to.claim, req)
	}
	return res, err
}

func (q *request) ask(c *claim, req *http.Request) (*http.Response, error) {
	q.last = c
	if c != nil {
		q.count = q.router.claims.begin(c, &c.requests)
	}
	q.watch(httptrace.ContextClientTrace(req.Context()))
	to := q.enter(c)
	q.left = func() { q.leave(c) }
	asked, answered := q.patient(c, req)
	res, err := to.RoundTrip(asked)
	if !answered() && err == nil { // it was taken back at that moment
		res.Body.Close()
		res, err = nil, context.Canceled
	}
	if err != nil {
		q.over(!refused(err))
	}
	return res, err
}

// patient is a request that is taken back from a laptop that goes silent before
// it has answered, where the original may be asked instead.
func (q *request) patient(c *claim, req *http.Request) (_ *http.Request, answered func() bool) {
	if c == nil || q.route.Original == "" || !repeatable(req) {
		return req, func() bool { return true }
	}
	ctx, cancel := context.WithCancel(req.Context()) // ends with the request's
	return req.WithContext(ctx), context.AfterFunc(q.router.claims.quiet(c), cancel)
}

// watch adds to what ReverseProxy traces already.
func (q *request) watch(t *httptrace.ClientTrace) {
	var to net.Conn
	t.GotConn = func(got httptrace.GotConnInfo) { to, q.reused = got.Conn, got.Reused }
	if !q.http2 {
		t.WroteRequest = func(wrote httptrace.WroteRequestInfo) {
			if wrote.Err == nil {
				q.wasSent(to)
			}
		}
	}
}

// again tells whether the original may be asked instead of a laptop that
// failed: nothing was sent, or it does not matter (RFC 9110, 9.2.1).
func again(req *http.Request, err error) bool {
	if req.Context().Err() != nil {
		return false
	}
	return refused(err) || repeatable(req)
}

func repeatable(req *http.Request) bool {
	return req.Body == nil && (req.Method == "GET" || req.Method == "HEAD" || req.Method == "OPTIONS")
}

// over ends the account with who was asked.
func (q *request) over(took bool) {
	if q.left != nil {
		q.left()
		q.left = nil
	}
	if q.count != nil {
		q.count(took)
		q.count = nil
	}
}

func (q *request) done() {
	q.over(true)
	if !q.http2 {
		q.wasSent(nil)
	}
	for _, s := range q.copies {
		if q.whole && q.http2 {
			s.end() // a gRPC server answers a message, and not the end after it
		} else {
			s.cut()
		}
	}
}

// answered: an answer without a body is not flushed before its end, because
// HTTP/2 tells by that end that there are no trailers either, as gRPC wants it.
func (q *request) answered(res *http.Response) error {
	if res.ContentLength == 0 {
		q.proxy.FlushInterval = 0
	}
	return nil
}

// failed shows the client what it would have seen without us, a connection that
// ended; it is told more where that helps: nobody was reached, or the program on
// the laptop died.
func (q *request) failed(rw http.ResponseWriter, req *http.Request, err error) {
	lost := !refused(err) && (q.last == nil || q.reused)
	if lost || req.Context().Err() != nil {
		panic(http.ErrAbortHandler)
	}
	rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
	rw.WriteHeader(http.StatusBadGateway)
	if q.last == nil {
		fmt.Fprintf(rw, "culvert: the original cannot be reached: %v\n", err)
		return
	}
	fmt.Fprintf(rw, "culvert: the connection to %s ended before an answer: %v\n", q.last.Holder, err)
}

// An answer is written as it came.
type answer struct {
	http.ResponseWriter
	web *web
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) WriteHeader(code int) {
	if h := a.Header(); code >= 200 {
		for _, name := range []string{"Date", "Content-Type"} {
			if _, ok := h[name]; !ok {
				h[name] = nil // none is made up
			}
		}
		if !a.web.http2 && a.web.router.claims.parts() {
			h.Set("Connection", "close")
		}
	}
	a.ResponseWriter.WriteHeader(code)
}

// Hijack gives the connection back as it was, with what has been read of it.
func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err == nil && rw.Reader.Buffered() > 0 {
		early, _ := rw.Reader.Peek(rw.Reader.Buffered())
		a.web.client.first = bytes.Clone(early)
	}
	return c, rw, err
}

// single is a listener that has one connection.
type single struct {
	conn  *client
	taken func() // called when the connection is being served
	given bool
	stop  func() bool // undoes what taken began
	once  sync.Once
	done  chan struct{}
}

func (l *single) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return l.conn, nil
	}
	l.taken()
	select {
	case <-l.conn.closed:
	case <-l.done:
	}
	return nil, net.ErrClosed
}

func (l *single) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *single) Addr() net.Addr { return l.conn.LocalAddr() }

// buffers are what answers are copied with.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if buf, ok := b.pool.Get().(*[bufferSize]byte); ok {
		return buf[:]
	}
	return make([]byte, bufferSize)
}

func (b *buffers) Put(buf []byte) { b.pool.Put((*[bufferSize]byte)(buf)) }
