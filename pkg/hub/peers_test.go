//go:build unix

package hub

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
)

// An agent is attached to two hubs, whichever a balancer chooses, and is reached while one
// is lost; then it finds another.
func TestTwoHubs(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-*:*"`})
	var turn atomic.Int64
	balance := func(ctx context.Context) (net.Conn, error) {
		y.mu.Lock()
		port := y.ports[int(turn.Add(1))%len(y.ports)]
		y.mu.Unlock()
		return (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+port)
	}
	hubs := []*Hub{y.hub}
	has := func(h *Hub) bool { return h.registry.missing("tcp", "db-01", "22") == nil }
	attached := func() (n int) {
		for _, h := range hubs {
			if has(h) {
				n++
			}
		}
		return n
	}
	y.agent("one", "db-01", balance, "22="+y.sshd)
	y.await("the first has it, which knows of no other yet", func() bool { return attached() == 1 })
	hubs = append(hubs, y.oneMore(), y.oneMore())
	y.await("hubs know each other", func() bool { return hubs[0].peers.count() == 3 && hubs[1].peers.count() == 3 })
	for range 2 {
		y.await("two hubs have it", func() bool { return attached() == 2 })
		for i, h := range hubs {
			if !has(h) {
				continue
			}
			other := (i + 1) % len(hubs)
			y.port = y.ports[other]
			y.ends[i]() // and its port refuses
			hubs[i] = y.oneMore()
			y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
			y.mu.Lock()
			y.ends[i], y.ports[i] = y.ends[len(y.ends)-1], y.ports[len(y.ports)-1]
			y.ends, y.ports = y.ends[:len(hubs)], y.ports[:len(hubs)]
			y.mu.Unlock()
			break
		}
	}
}

// A hub that lacks a host asks the others, for stock clients and agents alike.
func TestPeers(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-*:*"`})
	y.oneMore()
	last := y.oneMore()
	y.await("all know each other", func() bool { return last.peers.count() == 3 && y.hub.peers.count() == 3 })
	y.attach("one", "x", "db-01:22:127.0.0.1:"+y.sshd) // at the first
	for _, port := range y.ports {
		y.port = port
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
		y.fails(y.proxied("nc -X connect -x HUB %h %p", "db-02"), "404", "db-02 is not attached")
		y.fails(y.proxied("nc -X connect -x HUB %h 23", "db-01"), "404")
	}
	y.await("three connections are in the audit log", func() bool { return strings.Count(y.audit.String(), `"verdict":"opened"`) == 3 })
}

// Who shows the hubs' own key is a hub, and becomes no host.
func TestHopListensNowhere(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="*:*"`})
	y.fails(y.ssh("-N", "-i", y.path("hub"), "-R", "db-01:22:127.0.0.1:1", "x@hub"), "remote port forwarding failed")
}

// Hubs ask each other at an address that leads nobody else to another hub, however it is written.
func TestControlOfPeers(t *testing.T) {
	y := newYard(t, map[string]string{"ops": `permitopen="*:*",permitlisten="*:*"`, "anonymous": `from="127.0.0.1",permitopen="*:*"`})
	last := y.oneMore()
	y.await("hubs know each other", func() bool { return len(last.peers.up("")) == 1 })
	wire := y.client("ops")
	for _, name := range []string{controlHost, "HUB.culvert.dev", controlHost + ".", controlHost + "..", "a\x1bb", "a b"} {
		to := net.JoinHostPort(name, "80")
		if c, err := last.anonymous(&net.TCPConn{}, netip.MustParseAddr("127.0.0.1")).DialContext(t.Context(), "tcp", to); err == nil {
			t.Errorf("%q is reached by who shows no key", to)
			c.Close()
		}
		if c, err := wire.DialContext(t.Context(), "tcp", to); err == nil && to != controlAddress {
			t.Errorf("%q is reached", to)
			c.Close()
		}
		if l, err := wire.Listen(t.Context(), "tcp", to); err == nil {
			t.Errorf("%q is a host", to)
			l.Close()
		}
	}
	if _, _, err := split("tcp", "db-01:22\x1b[2J"); err == nil {
		t.Error("a port is what terminals take for something else")
	}
}
