//go:build unix

package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// What made the peers' tunnels fail, as their own tests and reports have it, done to a hub.

// A link is a way to a hub that can lose everything without a word.
type link struct {
	t       *testing.T
	to      string
	address string

	mu     sync.Mutex
	frozen chan struct{} // closed: nothing passes of what has been connected since the last freeze
	all    []net.Conn
}

func newLink(t *testing.T, to string) *link {
	t.Helper()
	ln := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	l := &link{t: t, to: to, address: ln.Addr().String(), frozen: make(chan struct{})}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() { l.carry(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		l.mu.Lock()
		for _, c := range l.all {
			c.Close()
		}
		l.mu.Unlock()
		running.Wait()
	})
	return l
}

func (l *link) carry(c net.Conn) {
	far, err := net.Dial("tcp", l.to)
	if err != nil {
		c.Close()
		return
	}
	l.mu.Lock()
	frozen := l.frozen
	l.all = append(l.all, c, far)
	l.mu.Unlock()
	half := func(dst, src net.Conn) {
		b := make([]byte, 32<<10)
		for {
			n, err := src.Read(b)
			select {
			case <-frozen: // neither data nor its end
				return
			default:
			}
			if n > 0 {
				_, _ = dst.Write(b[:n])
			}
			if err != nil {
				dst.Close()
				return
			}
		}
	}
	var both sync.WaitGroup
	both.Go(func() { half(c, far) })
	half(far, c)
	both.Wait()
}

// freeze loses all of what is connected now; what connects later is carried.
func (l *link) freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.frozen)
	l.frozen = make(chan struct{})
}

// frp's case: the way of a host's session loses everything, and neither end hears of it. A
// new session of the same key takes the name over at once, three times, though the keepalive
// has much longer.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	y := bareYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:22"`})
	y.beat = 0
	y.serveSSH()
	y.serveHub()
	for name, attach := range map[string]func(*link){
		"ssh -R": func(l *link) {
			_, port, _ := net.SplitHostPort(l.address)
			y.background(y.ssh("-v", "-N", "-p", port, "-o", "ServerAliveInterval=0", "-i", y.path("one"), "-R", "22:127.0.0.1:"+y.sshd, "db-01@hub"), "remote forward success")
		},
		"agent": func(l *link) {
			said := y.agent("one", "db-01", Reach(l.address), "22="+y.sshd)
			y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01") })
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, "127.0.0.1:"+y.port)
			attach(l)
			for range 3 {
				l.freeze()
				began := time.Now()
				attach(l)
				y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
				took := time.Since(began).Round(time.Millisecond)
				if t.Logf("reached after %v", took); took > soon/2 {
					t.Errorf("reached after %v", took)
				}
			}
		})
	}
}

// hostsFor are they for who has a key, over a wire of our own.
func (y *yard) hostsFor(key, hub string) *Client {
	y.t.Helper()
	cfg := must(endIn(y.dir, hub, key))(y.t)
	cfg.Beat = y.beat
	hosts := NewClient(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { defer close(over); _ = hosts.Run(ctx) }()
	y.t.Cleanup(func() { cancel(); <-over })
	return hosts
}

// chisel's case: what a wire may is asked for each of its connections, and anew each time;
// a host's wire may neither dial nor be another host.
func TestRightsOfOneWire(t *testing.T) {
	const host, nobody = `permitlisten="db-*:22"`, `from="127.0.0.2",permitopen="x:1"`
	y := newYard(t, map[string]string{"one": host, "ci": `permitopen="db-01:22"`, "anonymous": nobody})
	y.attach("one", "x", "db-01:22:127.0.0.1:"+y.sshd)
	y.attach("one", "x", "db-02:22:127.0.0.1:"+y.sshd)
	socks := freePort(t)
	y.background(y.ssh("-v", "-N", "-D", socks, "-i", y.path("ci"), "hub"), "Entering interactive session")
	ours := y.hostsFor("ci", "127.0.0.1:"+y.port)
	check := func(may, mayNot string) {
		t.Helper()
		y.says(y.proxied("nc -X 5 -x 127.0.0.1:"+socks+" %h %p", may), "in")
		y.fails(y.proxied("nc -X 5 -x 127.0.0.1:"+socks+" %h %p", mayNot))
		c, err := ours.DialContext(t.Context(), "tcp", may+":22")
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		if _, err := ours.DialContext(t.Context(), "tcp", mayNot+":22"); !errors.Is(err, syscall.EACCES) {
			t.Errorf("%s: %v", mayNot, err)
		}
	}
	check("db-01", "db-02")
	open := must(ours.DialContext(t.Context(), "tcp", "db-01:22"))(t)
	y.permit(map[string]string{"one": host, "ci": `permitopen="db-02:22"`, "anonymous": nobody})
	y.hub.Recheck()
	check("db-02", "db-01")
	ends(t, open)

	theirs := y.hostsFor("one", "127.0.0.1:"+y.port)
	if _, err := theirs.DialContext(t.Context(), "tcp", "db-02:22"); !errors.Is(err, syscall.EACCES) {
		t.Errorf("a host dials: %v", err)
	}
	for _, address := range []string{"web-01:22", "db-01:23"} {
		if _, err := theirs.Listen(t.Context(), "tcp", address); !errors.Is(err, syscall.EACCES) {
			t.Errorf("a host is %s: %v", address, err)
		}
	}
	if _, err := ours.Listen(t.Context(), "tcp", "db-02:22"); !errors.Is(err, syscall.EACCES) {
		t.Errorf("a client is a host: %v", err)
	}
}

// What an anonymous line has let somebody open ends with it.
func TestAnonymousEnds(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:22"`})
	y.attach("one", "x", "db-01:22:127.0.0.1:"+y.sshd)
	c := must(net.Dial("tcp", "127.0.0.1:"+y.port))(t)
	fmt.Fprint(c, "CONNECT db-01:22 HTTP/1.0\r\n\r\n")
	if got := make([]byte, 12); must(io.ReadFull(c, got))(t) == 12 && string(got) != "HTTP/1.1 200" {
		t.Fatalf("%q", got)
	}
	y.permit(map[string]string{"one": `permitlisten="db-01:22"`})
	y.hub.Recheck()
	ends(t, c)
}

// ends sees to it that a connection does.
func ends(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(soon))
	var late net.Error
	if _, err := io.Copy(io.Discard, c); errors.As(err, &late) && late.Timeout() {
		t.Error("it is open still")
	}
}

// echoes answers what is sent, at a port of tcp and the same of udp.
func echoes(t *testing.T) (port string) {
	t.Helper()
	port = freePort(t)
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	for _, network := range []string{"tcp", "udp"} {
		l := must((&channel.Host{}).Listen(ctx, network, "127.0.0.1:"+port))(t)
		all.Go(func() {
			_ = relay.Serve(ctx, l, func(ctx context.Context, c net.Conn) {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				_, _ = io.Copy(c, c)
			})
		})
	}
	t.Cleanup(func() { cancel(); all.Wait() })
	return port
}

// talk is ping-pong with an echo: it tells whether each word has come back.
func talk(hosts channel.Network, network, address string, words int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := hosts.DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	for i := range words {
		word := fmt.Sprintf("word %d", i)
		if _, err := io.WriteString(c, word); err != nil {
			return err
		}
		got := make([]byte, len(word))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != word {
			return fmt.Errorf("%q came back as %q: %w", word, got, err)
		}
	}
	return nil
}

// rathole's case: the agent is there before the hub; the hub crashes; the agent crashes;
// five times, and then many speak at once, over tcp and udp.
func TestOrderOfStarts(t *testing.T) {
	y := bareYard(t, map[string]string{"one": `permitlisten="db-01:7"`, "ci": `permitopen="db-01:7"`})
	hubAt, port := "127.0.0.1:"+freePort(t), echoes(t)
	startAgent := func(wait string) *exec.Cmd {
		return y.background(y.program("agent", hubAt, "one", "db-01", "7="+port, "7/udp="+port), wait)
	}
	startHub := func() *exec.Cmd { return y.background(y.program("hub", hubAt), "listening") }
	crash := func(cmd *exec.Cmd) {
		_ = cmd.Process.Kill()
		_, _ = cmd.Process.Wait()
	}
	hosts := y.hostsFor("ci", hubAt)
	reached := func(after string) {
		t.Helper()
		began := time.Now()
		for _, network := range []string{"tcp", "udp"} {
			y.await(network+" is reached", func() bool { return talk(hosts, network, "db-01:7", 1) == nil })
		}
		t.Logf("reached %v after %s", time.Since(began).Round(time.Millisecond), after)
	}
	agent := startAgent("not connected to the hub")
	hub := startHub()
	for range 5 {
		reached("the hub was there")
		crash(hub)
		hub = startHub()
		reached("the hub had crashed")
		crash(agent)
		agent = startAgent("offered as")
		reached("the agent had crashed")
		crash(agent)
		crash(hub)
		agent = startAgent("not connected to the hub")
		hub = startHub()
	}
	reached("all had crashed")
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			network := []string{"tcp", "udp"}[i%2]
			if err := talk(hosts, network, "db-01:7", 100); err != nil {
				t.Errorf("%s: %v", network, err)
			}
		})
	}
	all.Wait()
}
