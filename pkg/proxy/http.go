package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// statuses are what a dial met. Whatever is wrong beyond the proxy is its gateway's.
var statuses = map[reason]int{forbidden: http.StatusForbidden, silent: http.StatusGatewayTimeout}

const (
	idleHost   = 90 * time.Second // a connection that a further request may take
	idlePerEnd = 32
)

// HTTP serves a proxy of HTTP to whoever ln accepts, and dials for them, until ctx ends or
// ln fails for good. It closes ln, and returns when all of it is gone.
func HTTP(ctx context.Context, ln net.Listener, to relay.Dialer) error {
	ctx, cancel := context.WithCancel(ctx)
	h := newHandler(ctx, to)
	server := &http.Server{
		Handler: h, ReadHeaderTimeout: helloLimit, IdleTimeout: idleHost, ConnState: h.state,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    log.New(io.Discard, "", 0),
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	err := server.Serve(ln)
	cancel()
	server.Close() // what was accepted last, too
	h.conns.Wait()
	h.onward.Transport.(*http.Transport).CloseIdleConnections()
	if errors.Is(err, http.ErrServerClosed) {
		return net.ErrClosed
	}
	return err
}

// A handler serves requests to a proxy.
type handler struct {
	proxy  context.Context // ends with the proxy
	to     relay.Dialer
	onward *httputil.ReverseProxy
	conns  sync.WaitGroup // of programs
}

func newHandler(ctx context.Context, to relay.Dialer) *handler {
	h := &handler{proxy: ctx, to: to}
	h.onward = &httputil.ReverseProxy{
		Rewrite: untouched,
		Transport: &http.Transport{
			DialContext:        h.dial,
			DisableCompression: true, // what was not asked for is not to be undone
			IdleConnTimeout:    idleHost, MaxIdleConnsPerHost: idlePerEnd,
			ExpectContinueTimeout: time.Second,
		},
		FlushInterval: -1,
		ErrorHandler:  fail,
		ErrorLog:      log.New(io.Discard, "", 0),
	}
	return h
}

// untouched takes back what a reverse proxy does for a server behind it: a request goes on
// as it came, but for what is between a program and its proxy.
func untouched(r *httputil.ProxyRequest) {
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if values := r.In.Header[name]; values != nil {
			r.Out.Header[name] = values
		}
	}
}

func (h *handler) dial(ctx context.Context, network, address string) (net.Conn, error) {
	return dial(ctx, h.proxy, h.to, network, address)
}

// state counts connections. One that a handler takes over is counted by ServeHTTP.
func (h *handler) state(_ net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		h.conns.Add(1)
	case http.StateClosed:
		h.conns.Done()
	}
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodConnect:
		h.connect(w, r)
	case r.URL.Host == "":
		http.Error(w, "culvert: this is a proxy, which takes requests for others: GET http://host/path", http.StatusBadRequest)
	case r.URL.Scheme != "http":
		http.Error(w, fmt.Sprintf("culvert: %q is not proxied: http is, and what CONNECT asks for", r.URL.Scheme), http.StatusBadRequest)
	default:
		h.onward.ServeHTTP(w, r)
	}
	if _, err := w.Write(nil); errors.Is(err, http.ErrHijacked) {
		h.conns.Done()
	}
}

// connect dials first, and then leaves the connection to the two ends.
func (h *handler) connect(w http.ResponseWriter, r *http.Request) {
	if _, port, err := net.SplitHostPort(r.Host); err != nil || port == "" {
		http.Error(w, "culvert: CONNECT takes host:port", http.StatusBadRequest)
		return
	}
	far, err := h.dial(r.Context(), "tcp", r.Host)
	if err != nil {
		fail(w, r, err)
		return
	}
	c, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		relay.Abort(far, err)
		return
	}
	early, _ := buffered.Reader.Peek(buffered.Reader.Buffered())
	_, err = io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n")
	if err == nil && len(early) > 0 {
		_, err = far.Write(early)
	}
	if err != nil {
		relay.Abort(far, err)
		relay.Abort(c, err)
		return
	}
	relay.Carry(h.proxy, "tcp", c, far)
}

// fail says why there is no answer.
func fail(w http.ResponseWriter, _ *http.Request, err error) {
	status, known := statuses[reasonOf(err)]
	if !known {
		status = http.StatusBadGateway
	}
	http.Error(w, "culvert: "+err.Error(), status)
}
