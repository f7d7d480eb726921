//go:build unix

package hub

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
)

// sink takes connections, and reads them to their end or not at all.
func sink(t *testing.T, reads bool) (port string) {
	t.Helper()
	small := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10) })
	}}
	l := must(small.Listen(t.Context(), "tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			if reads {
				go func() { _, _ = io.Copy(io.Discard, c); c.Close() }()
			}
		}
	}()
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// client is one that shows the key of that name, over SSH.
func (y *yard) client(key string) channel.Channel {
	y.t.Helper()
	conn := must(net.Dial("tcp", "127.0.0.1:"+y.port))(y.t)
	own := must(ssh.NewSignerFromKey(must(ParseKey([]byte(y.read(key))))(y.t)))(y.t)
	peer := must(ssh.NewPublicKey(must(ParseKey([]byte(y.read("hub"))))(y.t).Public()))(y.t)
	ch := must(sshchan.Dial(y.t.Context(), conn, sshchan.Config{Identity: sshchan.Identity{Key: own, Peer: peer}}))(y.t)
	y.t.Cleanup(func() { ch.Close(); _ = ch.Wait() })
	return ch
}

// push writes to so many connections of a port until they end, and tells how many have.
func (y *yard) push(ch channel.Channel, many int) *atomic.Int64 {
	y.t.Helper()
	var ended atomic.Int64
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	for range many {
		c := must(ch.DialContext(y.t.Context(), "tcp", "db-01:7"))(y.t)
		context.AfterFunc(ctx, func() { c.Close() })
		all.Go(func() {
			if _, err := io.Copy(c, zeros{}); !errors.Is(err, net.ErrClosed) {
				ended.Add(1)
			}
		})
	}
	y.t.Cleanup(func() { cancel(); all.Wait() })
	return &ended
}

// What waits for hosts that do not read is bounded: connections end of the key that has most
// of it, and nobody else's.
func TestWaitingIsBounded(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "greedy": `permitopen="db-01:7"`, "modest": `permitopen="db-01:*"`, "anonymous": `from="127.0.0.1",permitopen="db-01:22"`})
	y.limits.Waiting = 8 * waitsSSH
	hub := y.oneMore()
	y.port = y.ports[1]
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "7="+sink(t, false), "22="+y.sshd)
	y.await("it is a host", func() bool { return strings.Count(said.String(), "offered as db-01") == 2 })
	modest := y.push(y.client("modest"), 3)
	greedy := y.push(y.client("greedy"), 40)
	y.await("most of them end", func() bool { return greedy.Load() == 40-5 })
	time.Sleep(3 * waitEvery) // and no more
	if greedy.Load() != 40-5 || modest.Load() != 0 {
		t.Errorf("%d of 40 have ended, and of the other key's %d of 3", greedy.Load(), modest.Load())
	}
	hub.waiting.mu.Lock()
	left := 0
	for w := range hub.waiting.all {
		if w.window == waitsSSH {
			left++
		}
	}
	hub.waiting.mu.Unlock()
	if left != 3+5 {
		t.Errorf("%d are left", left)
	}
	y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
}

// A host has only so many connections, of all keys and of each; what is more is told why.
func TestLimitsOfHost(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "two": `permitlisten="db-02:*"`, "ci": `permitopen="db-*:*"`, "ops": `permitopen="db-*:*"`})
	y.limits = Limits{Share: 3, Host: 5}
	hub := y.oneMore()
	y.port = y.ports[1]
	port := sink(t, true)
	for key, name := range map[string]string{"one": "db-01", "two": "db-02"} {
		said := y.agent(key, name, Reach("127.0.0.1:"+y.port), "7="+port)
		y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-0") })
	}
	ci, ops := y.client("ci"), y.client("ops")
	var open []net.Conn
	dial := func(ch channel.Channel, host, want string) {
		t.Helper()
		c, err := ch.DialContext(t.Context(), "tcp", host+":7")
		switch {
		case err == nil && want == "":
			open = append(open, c)
		case err == nil || want == "" || !strings.Contains(err.Error(), want):
			t.Errorf("%v, want %q", err, want)
		}
	}
	for range 3 {
		dial(ci, "db-01", "")
	}
	dial(ci, "db-01", "too many open connections of one key to one host (3)")
	dial(ci, "db-02", "")
	dial(ops, "db-01", "")
	dial(ops, "db-01", "")
	dial(ops, "db-01", "too many open connections to db-01 (5)")
	for _, c := range open {
		c.Close()
	}
	y.await("all has been given back", func() bool {
		hub.ledger.mu.Lock()
		defer hub.ledger.mu.Unlock()
		return len(hub.ledger.hosts) == 0
	})
	dial(ops, "db-01", "")
	for _, c := range open {
		c.Close()
	}
	if n := y.scraped(hub)[`events_total{event="open",verdict="limited"}`]; n != 2 {
		t.Errorf("Prometheus is told of %v", n)
	}
}

// A host has only so many ports, also of those that it is again and again.
func TestLimitsOfPorts(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-*:*"`})
	y.limits = Limits{Ports: 3}
	hub := y.oneMore()
	y.port = y.ports[1]
	wire := y.client("one")
	listen := func(address string) net.Listener {
		l, err := wire.Listen(t.Context(), "tcp", address)
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
		return l
	}
	first := listen("db-01:1")
	listen("db-01:2")
	listen("db-02:1")
	for _, address := range []string{"db-02:1", "db-03:1", "web-01:1"} {
		if _, err := wire.Listen(t.Context(), "tcp", address); err == nil {
			t.Errorf("%s is one more", address)
		}
	}
	first.Close()
	y.await("one has been given back", func() bool { return hub.registry.missing("tcp", "db-01", "1") != nil })
	listen("db-03:1")
	wire.Close()
	y.await("all have been given back", func() bool {
		hub.ledger.mu.Lock()
		defer hub.ledger.mu.Unlock()
		for _, u := range hub.ledger.all {
			if u.ports != 0 {
				return false
			}
		}
		return hub.registry.count() == 0
	})
}

// The hub itself is asked so often by one key, and no more.
func TestLimitsOfAsking(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-*:*"`})
	y.limits = Limits{Share: 3}
	y.oneMore()
	y.port = y.ports[1]
	wire := y.client("one")
	var open []net.Conn
	for range 3 {
		open = append(open, must(wire.DialContext(t.Context(), "tcp", controlAddress))(t))
	}
	if _, err := Ask(t.Context(), wire); err == nil {
		t.Error("it is asked once more")
	}
	for _, c := range open {
		c.Close()
	}
	y.await("it is asked again", func() bool { _, err := Ask(t.Context(), wire); return err == nil })
}
