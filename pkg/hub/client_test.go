//go:build unix

package hub

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A talk is one with a server behind a host that is attached to two hubs.
type talked struct {
	*yard
	server net.Listener
	hubs   [2]*Hub
	toIn   *io.PipeWriter
	out    *bufio.Reader
	end    context.CancelFunc
	over   chan error
}

const mayTalk = `permitopen="db-01:7"`

// talk begins one, when the host is there.
func newTalk(t *testing.T, attach func(y *yard, server string)) *talked {
	t.Helper()
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:7"`, "ci": mayTalk})
	c := &talked{yard: y, server: must(net.Listen("tcp", "127.0.0.1:0"))(t), over: make(chan error, 1)}
	t.Cleanup(func() { c.server.Close() })
	_, port, _ := net.SplitHostPort(c.server.Addr().String())
	c.hubs[0] = y.hub
	c.hubs[1] = y.oneMore()
	attach(y, port)
	for _, h := range c.hubs {
		y.await("it is at both", func() bool { return h.registry.missing("tcp", "db-01", "7") == nil })
	}
	cfg := must(endIn(y.dir, "the balancer", "ci"))(t)
	cfg.Beat = y.beat
	var turn atomic.Int64
	cfg.Dial = func(ctx context.Context) (net.Conn, error) {
		return Reach("127.0.0.1:" + y.ports[turn.Add(1)%2])(ctx)
	}
	in, toIn := io.Pipe()
	fromOut, out := io.Pipe()
	c.toIn, c.out = toIn, bufio.NewReader(fromOut)
	ctx, end := context.WithCancel(context.Background())
	c.end = end
	go func() { c.over <- Talk(ctx, cfg, "db-01:7", in, out) }()
	t.Cleanup(func() { toIn.Close(); out.Close(); end() })
	return c
}

func (c *talked) says(text string) {
	go func() { _, _ = io.WriteString(c.toIn, text) }()
}

// hears waits for a line.
func (c *talked) hears(from *bufio.Reader, want string) {
	c.t.Helper()
	if line, err := from.ReadString('\n'); line != want {
		c.t.Fatalf("%q, %v, want %q", line, err, want)
	}
}

// accepts is the server.
func (c *talked) accepts() (net.Conn, *bufio.Reader) {
	c.t.Helper()
	_ = c.server.(*net.TCPListener).SetDeadline(time.Now().Add(soon))
	conn := must(c.server.Accept())(c.t)
	_ = conn.SetDeadline(time.Now().Add(4 * soon))
	c.t.Cleanup(func() { conn.Close() })
	return conn, bufio.NewReader(conn)
}

// lose ends the client's wires, and returns when they have ended.
func (c *talked) lose() {
	c.t.Helper()
	for _, h := range c.hubs {
		for _, v := range h.visitors() {
			if g, err := v.who(); err != nil || g.Name != "ci" {
				continue
			}
			v.end()
			c.await("a wire has ended", func() bool { return !slices.Contains(h.visitors(), v) })
		}
	}
}

// ended is what has become of it.
func (c *talked) ended() error {
	c.t.Helper()
	select {
	case err := <-c.over:
		return err
	case <-time.After(2 * soon):
		c.t.Fatal("it has not ended")
	}
	return nil
}

// A hub is lost before a stock host has answered: what was said is said again by way of another.
// When it is lost later, that is told.
func TestTalkAgain(t *testing.T) {
	c := newTalk(t, func(y *yard, server string) {
		for _, port := range y.ports {
			y.background(y.ssh("-v", "-N", "-p", port, "-i", y.path("one"), "-R", "7:127.0.0.1:"+server, "db-01@hub"), "remote forward success")
		}
	})
	c.says("question\n")
	_, heard := c.accepts()
	c.hears(heard, "question\n")
	c.lose()
	after, heard := c.accepts()
	c.hears(heard, "question\n")
	_, _ = io.WriteString(after, "answer\n")
	c.hears(c.out, "answer\n")
	c.lose()
	if err := c.ended(); err == nil {
		t.Error("it is not told that the rest was lost")
	}
}

func attachAgent(y *yard, server string) {
	var at atomic.Int64
	y.agent("one", "db-01", func(ctx context.Context) (net.Conn, error) {
		return Reach("127.0.0.1:" + y.ports[at.Add(1)%2])(ctx)
	}, "7="+server)
}

// Hubs are lost while a talk with a host of ours goes on: it goes on, with the one server that it
// began with, until all is said, or who talks is not permitted to any more.
func TestTalkGoesOn(t *testing.T) {
	for name, last := range map[string]func(c *talked, server net.Conn, heard *bufio.Reader){
		"to its end": func(c *talked, server net.Conn, heard *bufio.Reader) {
			c.toIn.Close()
			if rest, err := io.ReadAll(heard); len(rest) > 0 || err != nil {
				t.Errorf("%q, %v", rest, err)
			}
			c.lose()
			_, _ = io.WriteString(server, "the end\n")
			server.Close()
			c.hears(c.out, "the end\n")
			if err := c.ended(); err != nil {
				t.Error(err)
			}
		},
		"until it may not": func(c *talked, server net.Conn, heard *bufio.Reader) {
			c.permit(map[string]string{"one": `permitlisten="db-01:7"`, "ci": `permitopen="db-02:7"`})
			for _, h := range c.hubs {
				h.Recheck()
			}
			if err := c.ended(); err == nil || !strings.Contains(err.Error(), "to reach db-01:7 is not permitted") {
				t.Errorf("%v", err)
			}
			var late net.Error
			if _, err := io.ReadAll(heard); err == nil || errors.As(err, &late) && late.Timeout() {
				t.Errorf("the server: %v", err)
			}
		},
		"until its key is taken away": func(c *talked, server net.Conn, heard *bufio.Reader) {
			c.permit(map[string]string{"one": `permitlisten="db-01:7"`})
			for _, h := range c.hubs {
				h.Recheck()
			}
			if err := c.ended(); !errors.Is(err, syscall.EACCES) {
				t.Errorf("%v", err)
			}
			var late net.Error
			if _, err := io.ReadAll(heard); err == nil || errors.As(err, &late) && late.Timeout() {
				t.Errorf("the server: %v", err)
			}
		},
		"until it is interrupted": func(c *talked, server net.Conn, heard *bufio.Reader) {
			c.end()
			if err := c.ended(); err == nil {
				t.Error("it is not told that it was not all")
			}
			var late net.Error
			if _, err := io.ReadAll(heard); err == nil || errors.As(err, &late) && late.Timeout() {
				t.Errorf("the server: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newTalk(t, attachAgent)
			c.says("question\n")
			server, heard := c.accepts()
			c.hears(heard, "question\n")
			for range 2 {
				c.lose()
				_, _ = io.WriteString(server, "answer\n")
				c.hears(c.out, "answer\n")
				c.lose()
				c.says("question\n")
				c.hears(heard, "question\n")
			}
			last(c, server, heard)
			if n := strings.Count(c.audit.String(), `"network":"tcp","to":"db-01:7","verdict":"opened"`); n < 2 {
				t.Errorf("%d connections are in the audit log:\n%s", n, c.audit.String())
			}
			if strings.Contains(c.audit.String(), "resume") {
				t.Errorf("tokens are in the audit log:\n%s", c.audit.String())
			}
		})
	}
}

// The UDP port of a host is reached by a port of UDP here: a resolver asks one that only the
// host reaches.
func TestNameServerOfHost(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:53"`, "ci": `permitopen="db-01:53"`})
	y.tool("dnsmasq")
	port, here := freePort(t), freePort(t)
	y.background(exec.Command("dnsmasq", "-k", "-p", port, "-a", "127.0.0.1", "-z", "-C", "/dev/null", "-x", y.path("pid"), "-u", "root", "-R", "-h", "--address=/db.example/192.0.2.7", "--log-facility=-"), "started")
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "53/udp="+port, "53="+port)
	y.await("it is a host", func() bool { return strings.Count(said.String(), "offered as") == 2 })
	for _, network := range []string{"udp", "tcp"} {
		y.background(y.program("forward", "127.0.0.1:"+y.port, "ci", network, "127.0.0.1:"+here, "db-01:53"), "forwarding")
		r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:"+here)
		}}
		addrs, err := r.LookupHost(t.Context(), "db.example.")
		if err != nil || len(addrs) != 1 || addrs[0] != "192.0.2.7" {
			t.Errorf("%s: %v, %v", network, addrs, err)
		}
	}
}
