package router

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for what must happen: nobody waits so long unless a test fails.
const patienceOfTests = 20 * time.Second

// listening is this machine, and tells where it listens.
type listening struct {
	channel.Host
	at chan string
}

func (l *listening) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	ln, err := l.Host.Listen(ctx, network, address)
	if err == nil {
		l.at <- ln.Addr().String()
	}
	return ln, err
}

// runs starts a Router; its addresses are those of its routes, in order.
func runs(t testing.TB, routes ...Route) (*Router, []string) {
	t.Helper()
	leak := goleak.IgnoreCurrent()
	t.Cleanup(func() { soon(t, "no goroutine left", func() bool { return goleak.Find(leak) == nil }) })
	n := &listening{at: make(chan string, len(routes))}
	for i := range routes {
		if routes[i].Listen == "" {
			routes[i].Listen = "127.0.0.1:0"
		}
	}
	r := New(Config{Routes: routes, Network: n, Grace: time.Minute, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	var at []string
	for range routes {
		select {
		case a := <-n.at:
			at = append(at, a)
		case err := <-done:
			t.Fatal(err)
		}
	}
	return r, at
}

// web80 is the route most tests are of.
func web80(original string) Route { return Route{Network: "tcp", Port: 80, Original: original} }

// to is a laptop whose process listens at one address; its connections can be cut.
type to struct {
	address string
	mu      sync.Mutex
	conns   []net.Conn
	dials   atomic.Int64
}

func (l *to) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	l.dials.Add(1)
	c, err := (&channel.Host{}).DialContext(ctx, network, l.address)
	if err == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.conns = append(l.conns, c)
	}
	return c, err
}

func (l *to) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		relay.Abort(c, errors.New("cut"))
	}
	l.conns = nil
}

// dead is a laptop that never answers.
type dead struct{ dials atomic.Int64 }

func (d *dead) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	d.dials.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

// refusing is a laptop on which nothing listens.
type refusing struct{}

func (refusing) DialContext(context.Context, string, string) (net.Conn, error) {
	return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
}

// claims80 claims tcp/80 for a laptop.
func claims80(t testing.TB, r *Router, id string, l relay.Dialer, m Match) {
	t.Helper()
	if err := r.Put(Claim{ID: id, Holder: id + "@laptop", Match: m, Routes: []string{"tcp/80"}}, l, false); err != nil {
		t.Fatal(err)
	}
}

// serves starts an HTTP server for both protocols, and tells its address.
func serves(t testing.TB, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: both()}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

func both() *http.Protocols {
	p := protocols(true)
	p.SetHTTP1(true)
	return p
}

// says is a handler that answers with its name.
func says(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		io.Copy(io.Discard, req.Body)
		io.WriteString(w, name)
	})
}

// asks returns a client of its own connections.
func asks(t testing.TB, http2 bool) *http.Client {
	tr := &http.Transport{Protocols: protocols(http2), DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patienceOfTests, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// get asks once, and tells what was answered.
func get(t testing.TB, c *http.Client, address string, headers ...string) string {
	t.Helper()
	req, err := http.NewRequest("GET", "http://"+address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// listens runs a TCP server of one function.
func listens(t testing.TB, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return l.Addr().String()
}

func dials(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patienceOfTests))
	return c.(*net.TCPConn)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// soon waits for what must become so.
func soon(t testing.TB, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(patienceOfTests); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %s", what, patienceOfTests)
		}
	}
}
