package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/apimachinery/pkg/util/httpstream/spdy"
	"k8s.io/client-go/tools/portforward"
)

const readyPods = `{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[
{"metadata":{"name":"old","creationTimestamp":"2026-01-01T00:00:00Z","deletionTimestamp":"2026-01-01T00:01:00Z"},"status":{"conditions":[{"type":"Ready","status":"True"}]}},
{"metadata":{"name":"new","creationTimestamp":"2026-01-01T00:02:00Z"},"status":{"conditions":[{"type":"Ready","status":"True"}]}},
{"metadata":{"name":"newest","creationTimestamp":"2026-01-01T00:03:00Z"},"status":{"conditions":[{"type":"Ready","status":"False"}]}}]}`

// wayServer answers the list of pods itself and lets next answer what follows;
// it keeps a line of each request that was for a pod.
type wayServer struct {
	mu   sync.Mutex
	seen []string
	next http.HandlerFunc
}

func (s *wayServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasSuffix(r.URL.Path, "/pods") {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, readyPods)
		return
	}
	s.mu.Lock()
	s.seen = append(s.seen, r.Proto+" "+r.Method+" "+r.URL.Path+" "+r.Header.Get("Authorization"))
	s.mu.Unlock()
	s.next(w, r)
}

func (s *wayServer) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.seen...)
}

// echo is a shadow that sends back what comes.
func echo(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != upgradeTo {
		http.Error(w, "no upgrade", http.StatusUpgradeRequired)
		return
	}
	conn, buf, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\nhello", upgradeTo)
	_, _ = io.Copy(conn, buf)
}

func wayShadow(t *testing.T, next http.HandlerFunc, ways ...Way) (*Shadow, *wayServer) {
	t.Helper()
	server := &wayServer{next: next}
	c := apiServer(t, server.ServeHTTP)
	rights := allRights(ByDeployment)
	if len(ways) > 0 {
		rights.Ways = ways
	}
	return c.NewShadow(testConfig("x1"), rights), server
}

// The connection is the shadow's own bytes from the 101 on; the context of the
// dial does not end it; closing does.
func TestDialByProxy(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Run("", func(t *testing.T) {
		s, server := wayShadow(t, echo)
		ctx, cancel := context.WithCancel(t.Context())
		conn, way, err := s.Dial(ctx)
		if err != nil || way != PodsProxy || s.Way() != PodsProxy || s.Pod() != "new" {
			t.Fatalf("%q %q %v", way, s.Pod(), err)
		}
		defer conn.Close()
		cancel()
		want := "HTTP/1.1 GET /api/v1/namespaces/dev/pods/new:7465/proxy/ Bearer t"
		if got := server.requests(); len(got) != 1 || got[0] != want {
			t.Errorf("%q", got)
		}
		text := strings.Repeat("0123456789", 100_000)
		go func() { _, _ = io.WriteString(conn, text) }()
		got := make([]byte, len("hello")+len(text))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello"+text {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		conn.Close()
		if _, err := conn.Read(got); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read: %v", err)
		}
		if _, err := conn.Write(got); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write: %v", err)
		}
	})
	goleak.VerifyNone(t, ignore)
}

// That nobody listens at a port is told, although the end of what it would have said comes
// first, by a stream of its own.
func TestDialPortRefused(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Run("", func(t *testing.T) {
		c := apiServer(t, func(w http.ResponseWriter, r *http.Request) {
			if _, err := httpstream.Handshake(r, w, []string{portforward.PortForwardProtocolV1Name}); err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			streams := make(chan httpstream.Stream, 2)
			wire := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, _ <-chan struct{}) error { streams <- s; return nil })
			if wire == nil {
				return
			}
			defer wire.Close()
			troubles, data := <-streams, <-streams
			data.Close()
			time.Sleep(50 * time.Millisecond) // so that the end is there first
			fmt.Fprint(troubles, "dial tcp4 127.0.0.1:80: connection refused")
			troubles.Close()
			<-wire.CloseChan()
		})
		conn, err := c.DialPort(t.Context(), "web-1", 80)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "port-forward: dial tcp4 127.0.0.1:80: connection refused") {
			t.Errorf("read: %v", err)
		}
	})
	// spdystream keeps the error of a close for a second, should somebody want to know it.
	for end := time.Now().Add(10 * time.Second); goleak.Find(ignore) != nil && time.Now().Before(end); {
	}
	goleak.VerifyNone(t, ignore)
}

func TestDialDeadline(t *testing.T) {
	s, _ := wayShadow(t, echo)
	conn, _, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Hour)); err != nil {
		t.Error(err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		t.Error(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Error(err)
	}
	_, err = io.ReadAll(conn)
	var timeout net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%v", err)
	}
}

// What the server refuses is tried by the next way, in the order of rights; the
// errors of all are told; a forced way stays alone.
func TestDialFallsBack(t *testing.T) {
	refuse := func(w http.ResponseWriter, r *http.Request) { status(w, http.StatusForbidden, "Forbidden") }
	s, server := wayShadow(t, refuse)
	_, _, err := s.Dial(t.Context())
	if !errors.Is(err, ErrForbidden) {
		t.Errorf("%v", err)
	}
	for _, way := range []Way{PodsProxy, WebSocket, SPDY} {
		if !strings.Contains(err.Error(), string(way)) {
			t.Errorf("%s is not in: %v", way, err)
		}
	}
	seen := strings.Join(server.requests(), "\n")
	for _, part := range []string{"GET /api/v1/namespaces/dev/pods/new:7465/proxy/", "GET /api/v1/namespaces/dev/pods/new/portforward", "POST /api/v1/namespaces/dev/pods/new/portforward"} {
		if !strings.Contains(seen, part) {
			t.Errorf("%s is not in:\n%s", part, seen)
		}
	}
	cfg := testConfig("x1")
	cfg.Path.Way = SPDY
	forced := s.cluster.NewShadow(cfg, allRights(ByDeployment))
	if _, _, err := forced.Dial(t.Context()); err == nil || strings.Contains(err.Error(), string(WebSocket)) {
		t.Errorf("forced: %v", err)
	}
}

// The way that worked is tried first from then on, and not lost when it fails.
func TestWaysRemember(t *testing.T) {
	w := ways{order: []Way{PodsProxy, WebSocket, SPDY}}
	w.worked(SPDY)
	if got := fmt.Sprint(w.list()); got != "[port-forward spdy pods/proxy port-forward websocket]" {
		t.Error(got)
	}
	w.worked(SPDY)
	w.worked(PodsProxy)
	if got := fmt.Sprint(w.list()); got != "[pods/proxy port-forward spdy port-forward websocket]" {
		t.Error(got)
	}
}

// A server that does not answer ends with the dial's context, and leaves nothing.
func TestDialGivesUp(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Run("", func(t *testing.T) {
		release := make(chan struct{})
		s, _ := wayShadow(t, func(w http.ResponseWriter, r *http.Request) { <-release })
		defer close(release)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		begin := time.Now()
		if _, _, err := s.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("took %v", took)
		}
	})
	goleak.VerifyNone(t, ignore)
}

// Through a proxy with CONNECT, as proxy-url or HTTPS_PROXY name it.
func TestDialThroughHTTPProxy(t *testing.T) {
	var connects []string
	var mu sync.Mutex
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		connects = append(connects, r.Method+" "+r.Host)
		mu.Unlock()
		tunnel(w, r)
	}))
	defer proxy.Close()
	server := &wayServer{next: echo}
	target := httptest.NewTLSServer(server)
	defer target.Close()
	c := loadTLS(t, target, target.URL, "proxy-url: \""+proxy.URL+"\",")
	conn, _, err := c.NewShadow(testConfig("x1"), allRights(ByDeployment)).Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("%q %v", got, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(connects) != 2 || connects[1] != "CONNECT "+target.Listener.Addr().String() {
		t.Errorf("%q", connects)
	}
}

// tunnel is what a proxy does for a CONNECT.
func tunnel(w http.ResponseWriter, r *http.Request) {
	far, err := net.Dial("tcp", r.Host)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer far.Close()
	near, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer near.Close()
	fmt.Fprint(near, "HTTP/1.1 200 OK\r\n\r\n")
	go func() { _, _ = io.Copy(far, near); far.Close() }()
	_, _ = io.Copy(near, far)
}

// A pooled connection that leads nowhere any more is not tried twice; the one
// that carries a session is left alone.
func TestDialDropsADeadConnection(t *testing.T) {
	var stuck sync.Map // remote addresses of connections that are dead
	server := &wayServer{next: echo}
	target := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, dead := stuck.Load(r.RemoteAddr); dead {
			<-r.Context().Done()
			return
		}
		if r.ProtoMajor == 2 {
			defer stuck.Store(r.RemoteAddr, true)
		}
		server.ServeHTTP(w, r)
	}))
	target.EnableHTTP2 = true
	target.StartTLS()
	defer target.Close()
	c := loadTLS(t, target, target.URL, "")
	defer c.Close()
	s := c.NewShadow(testConfig("x1"), allRights(ByDeployment))
	conn, _, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, _, err := s.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("on a dead connection: %v", err)
	}
	again, _, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("%q %v", got, err)
	}
}
