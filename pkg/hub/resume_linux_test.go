package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// full is a listener that takes no connection until what waits there is accepted.
func full(t *testing.T) net.Listener {
	t.Helper()
	fd := must(syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0))(t)
	f := os.NewFile(uintptr(fd), "full")
	defer f.Close()
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	l := must(net.FileListener(f))(t)
	t.Cleanup(func() { l.Close() })
	c := must(net.Dial("tcp", l.Addr().String()))(t)
	t.Cleanup(func() { c.Close() })
	return l
}

// asking is how many connections wait to be taken at an address of this machine.
func asking(t *testing.T, at net.Addr) (n int) {
	t.Helper()
	to := fmt.Sprintf("0100007F:%04X", at.(*net.TCPAddr).Port)
	for line := range strings.Lines(string(must(os.ReadFile("/proc/net/tcp"))(t))) {
		if f := strings.Fields(line); len(f) > 3 && f[2] == to && f[3] == "02" { // SYN_SENT
			n++
		}
	}
	return n
}

// A target that takes its time is dialled once, though the hub asks for the host by another way
// meanwhile.
func TestSlowTarget(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:7"`, "ci": `permitopen="db-01:7"`})
	hubs := []*Hub{y.hub}
	hubs = append(hubs, y.oneMore())
	y.await("hubs know each other", func() bool { return len(hubs[0].peers.up("")) == 1 && len(hubs[1].peers.up("")) == 1 })
	var turn atomic.Int64
	balance := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+y.ports[int(turn.Add(1))%2])
	}
	target := full(t)
	_, port, _ := net.SplitHostPort(target.Addr().String())
	y.agent("one", "db-01", balance, "7="+port)
	y.await("both have it", func() bool {
		return hubs[0].registry.missing("tcp", "db-01", "7") == nil && hubs[1].registry.missing("tcp", "db-01", "7") == nil
	})
	ours := y.hostsFor("ci", "127.0.0.1:"+y.ports[0])
	type answer struct {
		net.Conn
		err error
	}
	dialled := make(chan answer, 1)
	go func() {
		c, err := ours.DialContext(t.Context(), "tcp", "db-01:7")
		dialled <- answer{c, err}
	}()
	y.await("it is dialled", func() bool {
		select {
		case a := <-dialled:
			t.Fatalf("%v", a.err)
		default:
		}
		return asking(t, target.Addr()) > 0
	})
	for end := time.Now().Add(3 * peerTurn); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if n := asking(t, target.Addr()); n != 1 {
			t.Fatalf("%d dials are under way", n)
		}
	}
	go func() {
		for {
			c, err := target.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	near := <-dialled
	if near.err != nil {
		t.Fatal(near.err)
	}
	defer near.Close()
	must(io.WriteString(near, "x"))(t)
	must(io.ReadFull(near, make([]byte, 1)))(t)
}

// What a hub ends, as too much waits there, does not come back: both ends are told, and why.
func TestEndedForMemory(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:7"`, "ci": `permitopen="db-01:7"`})
	target := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer target.Close()
	_, port, _ := net.SplitHostPort(target.Addr().String())
	y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "7="+port)
	y.await("it is a host", func() bool { return y.hub.registry.missing("tcp", "db-01", "7") == nil })
	near := must(y.hostsFor("ci", "127.0.0.1:"+y.port).DialContext(t.Context(), "tcp", "db-01:7"))(t)
	defer near.Close()
	far := must(target.Accept())(t)
	defer far.Close()
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} { // it is whole
		must(io.WriteString(way[0], "x"))(t)
		must(io.ReadFull(way[1], make([]byte, 1)))(t)
	}
	y.hub.waiting.mu.Lock()
	var one *counted
	for w := range y.hub.waiting.all {
		one = w.conn
	}
	y.hub.waiting.mu.Unlock()
	one.end(slowError{})
	for what, c := range map[string]net.Conn{"the client's": near, "the host's": far} {
		_ = c.SetReadDeadline(time.Now().Add(soon))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || c == near && !errors.Is(err, syscall.ENOBUFS) {
			t.Errorf("%s end: %v", what, err)
		}
	}
	y.await("it is in the audit log", func() bool { return strings.Contains(y.audit.String(), `"event":"open"`) })
	if n := strings.Count(y.audit.String(), `"event":"open"`); n != 1 {
		t.Errorf("%d connections are in the audit log", n)
	}
}
