//go:build unix

package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// A connection that nobody reads, at either end, does not slow another of the same host.
func TestStalled(t *testing.T) {
	for wire, attach := range map[string]func(y *yard, source, sink string){
		"agent": func(y *yard, source, sink string) {
			y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "7="+source, "8="+sink)
		},
		"ssh -R": func(y *yard, source, sink string) {
			y.attach("one", "db-01", "7:127.0.0.1:"+source)
			y.attach("one", "db-01", "8:127.0.0.1:"+sink)
		},
	} {
		t.Run(wire, func(t *testing.T) {
			y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
			source, sink := newEnd(y, func(c *measured) { io.Copy(c, zeros{}) }), newEnd(y, func(c *measured) {
				if first := make([]byte, 1); must(io.ReadFull(c, first))(t) == 1 && first[0] == 's' {
					<-c.over
				}
				io.Copy(io.Discard, c)
			})
			attach(y, source.port, sink.port)
			for _, port := range []string{"7", "8"} {
				y.await("it is a host", func() bool { return y.hub.registry.missing("tcp", "db-01", port) == nil })
			}
			t.Run("down", func(t *testing.T) {
				y.beside(t, source, "7", func(c net.Conn, stall bool) {
					for buf := make([]byte, 64<<10); !stall; {
						if _, err := c.Read(buf); err != nil {
							return
						}
					}
				})
			})
			t.Run("up", func(t *testing.T) {
				y.beside(t, sink, "8", func(c net.Conn, stall bool) {
					fmt.Fprint(c, map[bool]string{true: "s", false: "r"}[stall])
					io.Copy(c, zeros{})
				})
			})
		})
	}
}

// An end is a server behind a host, which counts what it has sent and received.
type end struct {
	port  string
	conns chan *measured
}

type measured struct {
	net.Conn
	moved atomic.Int64
	over  chan struct{}
}

func (m *measured) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	m.moved.Add(int64(n))
	return n, err
}

func (m *measured) Write(p []byte) (int, error) {
	n, err := m.Conn.Write(p)
	m.moved.Add(int64(n))
	return n, err
}

// narrow has a kernel hold little, so that what is stuck is so soon.
func narrow(t *testing.T, c net.Conn) net.Conn {
	t.Helper()
	const little = 64 << 10
	if err := errors.Join(c.(*net.TCPConn).SetReadBuffer(little), c.(*net.TCPConn).SetWriteBuffer(little)); err != nil {
		t.Error(err)
	}
	return c
}

func newEnd(y *yard, serve func(*measured)) *end {
	l := must(net.Listen("tcp", "127.0.0.1:0"))(y.t)
	over := make(chan struct{})
	y.t.Cleanup(func() { close(over); l.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	e := &end{port, make(chan *measured, 100)}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m := &measured{Conn: narrow(y.t, c), over: over}
			e.conns <- m
			go func() { serve(m); c.Close() }()
		}
	}()
	return e
}

// use opens a connection and has it used, until the test ends.
func (y *yard) use(t *testing.T, e *end, port string, stall bool, how func(net.Conn, bool)) (near, far *measured) {
	t.Helper()
	c := must((&net.Dialer{}).DialContext(context.Background(), "tcp", "127.0.0.1:"+y.port))(t)
	t.Cleanup(func() { c.Close() })
	fmt.Fprintf(c, "CONNECT db-01:%s HTTP/1.0\r\n\r\n", port)
	const yes = "HTTP/1.1 200 Connection established\r\n\r\n"
	got := make([]byte, len(yes))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != yes {
		t.Fatalf("%q, %v", got, err)
	}
	near = &measured{Conn: narrow(t, c)}
	go how(near, stall)
	return near, <-e.conns
}

// moves is how much a connection carries in a while.
func (m *measured) moves(d time.Duration) int64 {
	before := m.moved.Load()
	time.Sleep(d)
	return m.moved.Load() - before
}

// beside compares what a connection carries alone with what it does beside stalled ones. The
// machine does other things, too: one turn in which that is half of it is enough, for what
// stalls with the others does so each time.
func (y *yard) beside(t *testing.T, e *end, port string, how func(net.Conn, bool)) {
	const while, stalls, turns = 200 * time.Millisecond, 4, 5
	_, active := y.use(t, e, port, false, how)
	for range turns {
		alone := active.moves(while)
		var stuck []*measured
		for range stalls {
			near, far := y.use(t, e, port, true, how)
			stuck = append(stuck, near, far)
		}
		y.await("they are stuck", func() bool {
			before := moved(stuck)
			time.Sleep(while)
			return moved(stuck) == before
		})
		beside := active.moves(while)
		for _, c := range stuck {
			c.Close()
		}
		t.Logf("%d MB/s alone, %d beside %d that are stalled", alone*5/1e6, beside*5/1e6, stalls)
		if alone > 0 && beside >= alone/2 {
			return
		}
	}
	t.Error("that is less than half, each time")
}

func moved(all []*measured) (n int64) {
	for _, m := range all {
		n += m.moved.Load()
	}
	return n
}
