package hub

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

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
