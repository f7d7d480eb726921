//go:build unix

package hub

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// A hub that is told to end lets nobody in any more and sends its hosts to another, while
// what is open goes on.
func TestDrain(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "anonymous": `from="127.0.0.1",permitopen="db-*:*"`})
	echo := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { echo.Close() })
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	first := y.hub
	_, port, _ := net.SplitHostPort(echo.Addr().String())
	at := 0
	said := y.agent("one", "db-01", func(ctx context.Context) (net.Conn, error) {
		y.mu.Lock()
		address := "127.0.0.1:" + y.ports[at%len(y.ports)]
		at++
		y.mu.Unlock()
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}, "7="+port)
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01") })
	c := must(net.Dial("tcp", "127.0.0.1:"+y.ports[0]))(t)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(soon))
	speak := func(text, want string) {
		t.Helper()
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Fatalf("%q, %v, want %q", got, err, want)
		}
	}
	speak("CONNECT db-01:7 HTTP/1.0\r\n\r\n", "HTTP/1.1 200 Connection established\r\n\r\n")
	speak("before", "before")

	second := y.oneMore()
	has := func(h *Hub) func() bool {
		return func() bool { return h.registry.missing("tcp", "db-01", "7") == nil }
	}
	y.await("the host is at the other as well", has(second))
	third := y.oneMore()
	ended := make(chan struct{})
	go func() { y.ends[0](); close(ended) }()
	y.await("nobody is let in", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+y.ports[0])
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	speak("after", "after")
	y.await("the host is at another instead", has(third))
	speak("and then", "and then")
	c.Close()
	select {
	case <-ended:
	case <-time.After(soon):
		t.Error("the hub has not ended, though nothing is open")
	}
	if n := len(first.visits); n != 0 {
		t.Errorf("%d wires are left", n)
	}
}

// A deploy has a wire for each of its hosts, all with one key.
func TestManyWires(t *testing.T) {
	y := newYard(t, map[string]string{"ci": `permitopen="db-*:22"`})
	for range 100 {
		hosts := y.hostsFor("ci", "127.0.0.1:"+y.port)
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		if err := hosts.Ready(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
}

// Nobody uses more than he may, nor takes it from others.
func TestLimits(t *testing.T) {
	l := ledger{limits: Limits{Wires: 2, Streams: 3, Dials: 5}.withDefaults()}
	var gone func()
	for _, want := range []bool{true, true, false} {
		done, err := l.wire("a")
		if (err == nil) != want {
			t.Errorf("wire: %v", err)
		}
		if err == nil {
			gone = done
		}
	}
	if _, err := l.wire("b"); err != nil {
		t.Error("another's:", err)
	}
	gone()
	if _, err := l.wire("a"); err != nil {
		t.Error("not given back")
	}
	var ends []func()
	for range 3 {
		end, err := l.stream("a", "db-01")
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	if _, err := l.stream("a", "db-01"); err == nil {
		t.Error("one more stream")
	}
	ends[0]()
	ends[0]() // once is enough
	if _, err := l.stream("a", "db-01"); err != nil {
		t.Error(err)
	}
	var last error
	for range 20 {
		end, err := l.stream("c", "db-01")
		if err != nil {
			last = err
			break
		}
		end()
	}
	if last == nil {
		t.Error("twenty dials at once")
	}
}
