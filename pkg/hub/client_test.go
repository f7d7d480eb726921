//go:build unix

package hub

import (
	"bufio"
	"context"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// A hub is lost before the host has answered: what was said is said again by way of another.
// When it is lost later, that is told.
func TestTalkGoesOn(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:7"`, "ci": `permitopen="db-01:7"`})
	server := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { server.Close() })
	_, port, _ := net.SplitHostPort(server.Addr().String())
	first := y.hub
	second := y.oneMore()
	var at atomic.Int64
	said := y.agent("one", "db-01", func(ctx context.Context) (net.Conn, error) {
		return Reach("127.0.0.1:" + y.ports[at.Add(1)%2])(ctx)
	}, "7="+port)
	y.await("it is at both", func() bool {
		return strings.Contains(said.String(), "offered as") && first.registry.missing("tcp", "db-01", "7") == nil && second.registry.missing("tcp", "db-01", "7") == nil
	})

	cfg := must(endIn(y.dir, "the balancer", "ci"))(t)
	cfg.Beat = y.beat
	var turn atomic.Int64
	cfg.Dial = func(ctx context.Context) (net.Conn, error) {
		return Reach("127.0.0.1:" + y.ports[turn.Add(1)%2])(ctx)
	}
	in, toIn := io.Pipe()
	fromOut, out := io.Pipe()
	over := make(chan error, 1)
	go func() { over <- Talk(context.Background(), cfg, "db-01:7", in, out) }()
	go io.WriteString(toIn, "question\n")
	hear := func() net.Conn {
		c := must(server.Accept())(t)
		if line, err := bufio.NewReader(c).ReadString('\n'); line != "question\n" {
			t.Fatalf("%q, %v", line, err)
		}
		return c
	}
	lose := func() {
		for _, h := range []*Hub{first, second} {
			h.endWho("ci")
		}
	}
	before := hear()
	defer before.Close()
	lose()
	after := hear()
	defer after.Close()
	_, _ = io.WriteString(after, "answer\n")
	if line, err := bufio.NewReader(fromOut).ReadString('\n'); line != "answer\n" {
		t.Fatalf("%q, %v", line, err)
	}
	lose()
	if err := <-over; err == nil {
		t.Error("it is not told that the rest was lost")
	}
	toIn.Close()
	out.Close()
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
