//go:build unix

package hub

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// blackHole is an address that answers nothing: its queue is full.
func blackHole(t *testing.T) string {
	t.Helper()
	fd := must(syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0))(t)
	t.Cleanup(func() { syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	at := must(syscall.Getsockname(fd))(t).(*syscall.SockaddrInet4)
	address := (&net.TCPAddr{IP: at.Addr[:], Port: at.Port}).String()
	for range 8 {
		c, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Skip("a full queue answers here")
	return ""
}

// used is what this process uses: of hub, agent and clients together.
type used struct {
	goroutines, descriptors int
	heap                    uint64
}

func use(t *testing.T) (u used) {
	t.Helper()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return used{runtime.NumGoroutine(), len(must(os.ReadDir("/dev/fd"))(t)), m.HeapAlloc}
}

// within tells whether no more is used than before, but for a little.
func (u used) within(before used) bool {
	return u.goroutines <= before.goroutines+5 && u.descriptors <= before.descriptors+5 && u.heap <= before.heap+4<<20
}

// ask sends the head of a CONNECT, and returns the status line that is answered.
func ask(c net.Conn, to string) (string, error) {
	if _, err := io.WriteString(c, "CONNECT "+to+" HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	head := make([]byte, 0, 256)
	for b := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); head = append(head, b[0]) {
		if _, err := c.Read(b); err != nil {
			return string(head), err
		}
	}
	line, _, _ := strings.Cut(string(head), "\r\n")
	return line, nil
}

const cycles = 1000

// A thousand connections that end in every way, some while they are being dialled, leave
// nothing in a hub nor in an agent: goroutines, descriptors and memory are as before.
func TestCyclesLeaveNothing(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "ci": `permitopen="db-01:*"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "7="+echoes(t), "9="+blackHole(t), "11="+freePort(t))
	hosts := y.hostsFor("ci", "127.0.0.1:"+y.port)
	y.await("all is offered", func() bool { return strings.Count(said.String(), "offered as db-01: ") == 3 })
	leaves := map[string]func() error{ // the agent dials for some seconds more
		"while it is dialled": func() error { return y.cycle("db-01:9", "", nil) },
		"while it is dialled over a wire of ours": func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
			defer cancel()
			if c, err := hosts.DialContext(ctx, "tcp", "db-01:9"); err == nil {
				c.Close()
				return errors.New("a black hole answers")
			}
			return nil
		},
	}
	ways := map[string]func() error{
		"close": func() error { return y.cycle("db-01:7", "200", func(c net.Conn) { c.Close() }) },
		"reset": func() error {
			return y.cycle("db-01:7", "200", func(c net.Conn) { relay.Abort(c, syscall.ECONNRESET) })
		},
		"half-close": func() error {
			return y.cycle("db-01:7", "200", func(c net.Conn) {
				_, _ = io.WriteString(c, "word")
				_ = c.(*net.TCPConn).CloseWrite()
				if back, err := io.ReadAll(c); err != nil || string(back) != "word" {
					t.Errorf("%q, %v", back, err)
				}
			})
		},
		"refused":        func() error { return y.cycle("db-01:11", "502", nil) },
		"not offered":    func() error { return y.cycle("db-01:12", "404", nil) },
		"forbidden":      func() error { return y.cycle("db-02:22", "403", nil) },
		"a wire of ours": func() error { return talk(hosts, "tcp", "db-01:7", 1) },
	}
	pace := rate.NewLimiter(150, 10) // a hub lets one address dial so often
	churn := func(n int) {
		var all sync.WaitGroup
		for range n / len(ways) {
			for name, way := range ways {
				_ = pace.Wait(t.Context())
				all.Go(func() {
					if err := way(); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				})
			}
		}
		all.Wait()
	}
	churn(cycles / 5)
	maps.Copy(ways, leaves)
	settled := func() bool { return y.hub.loose.open.Load() == 0 && y.pending() == 0 }
	y.await("the first have ended", settled)
	before := use(t)
	churn(cycles)
	began := time.Now()
	var after used
	y.await("all have ended", settled)
	defer func() {
		t.Logf("%+v before, %+v %v after the last", before, after, time.Since(began).Round(time.Millisecond))
	}()
	y.await("and nothing is left", func() bool { after = use(t); return after.within(before) })
}

// pending is how many connections are open over wires.
func (y *yard) pending() (n int64) {
	y.hub.mu.Lock()
	defer y.hub.mu.Unlock()
	for v := range y.hub.visits {
		n += v.streams.open.Load()
	}
	return n
}

// cycle is one connection by CONNECT, which gets a status, or is not waited for.
func (y *yard) cycle(to, status string, do func(net.Conn)) error {
	c, err := net.Dial("tcp", "127.0.0.1:"+y.port)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(soon))
	if status == "" {
		_, err := io.WriteString(c, "CONNECT "+to+" HTTP/1.0\r\n\r\n")
		return err
	}
	line, err := ask(c, to)
	if err != nil || !strings.HasPrefix(line, "HTTP/1.1 "+status) {
		return errors.Join(errors.New(line), err)
	}
	if do != nil {
		do(c)
	}
	return nil
}

// konnectivity's case: many at once get a large answer, whole, by every way in.
func TestManyLargeAnswers(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:80"`, "ci": `permitopen="db-01:80"`, "anonymous": `from="127.0.0.1",permitopen="db-01:80"`})
	const size = 1 << 20
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	t.Cleanup(server.Close)
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "80="+server.Listener.Addr().String())
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as") })
	hosts := y.hostsFor("ci", "127.0.0.1:"+y.port)
	ways := []func(context.Context, string, string) (net.Conn, error){
		hosts.DialContext,
		func(ctx context.Context, _, to string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+y.port)
			if err != nil {
				return nil, err
			}
			if line, err := ask(c, to); err != nil || !strings.HasPrefix(line, "HTTP/1.1 200") {
				c.Close()
				return nil, errors.Join(errors.New(line), err)
			}
			return c, nil
		},
	}
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			transport := &http.Transport{DialContext: ways[i%len(ways)], DisableKeepAlives: true}
			resp, err := (&http.Client{Transport: transport, Timeout: soon}).Get("http://db-01/")
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	all.Wait()
}

// A hub is well while it has neither hosts nor peers: what restarts it must not wait for them.
func TestHealthNeedsNobody(t *testing.T) {
	y := bareYard(t, map[string]string{"one": ""})
	at := "127.0.0.1:" + freePort(t)
	y.background(y.program("hub", at, at, "127.0.0.1:1", "192.0.2.1:1"), "listening")
	began := time.Now()
	resp, err := http.Get("http://" + at + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if took := time.Since(began); resp.StatusCode != http.StatusOK || took > 2*time.Second {
		t.Errorf("%s after %v", resp.Status, took)
	}
}
