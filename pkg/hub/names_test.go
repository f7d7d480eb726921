//go:build unix

package hub

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A wireBetween leads to an address until it is frozen: then nothing comes any more, and
// nobody is told.
type wireBetween struct {
	address string
	frozen  atomic.Bool
}

func between(t *testing.T, to string) *wireBetween {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	w := &wireBetween{address: l.Addr().String()}
	over := make(chan struct{})
	var all sync.WaitGroup
	carry := func(dst, src net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			if w.frozen.Load() {
				<-over
			}
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				dst.Close()
				src.Close()
				return
			}
		}
	}
	all.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			if w.frozen.Load() {
				defer a.Close()
				continue
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			all.Go(func() { carry(a, b) })
			all.Go(func() { carry(b, a) })
			defer a.Close()
			defer b.Close()
		}
	})
	t.Cleanup(func() { l.Close(); close(over); all.Wait() })
	return w
}

// findBy has hubs find others than all.
func (y *yard) findBy(finds func(all []string) ([]string, error)) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.finds = finds
}

// A name is one key's at all hubs, whichever it comes to.
func TestNameAtOtherHub(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "thief": `permitlisten="db-*:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	y.oneMore()
	last := y.oneMore()
	y.await("hubs know each other", func() bool { return len(last.peers.up("")) == 2 })
	y.attach("one", "db-01", "22:127.0.0.1:"+y.sshd)
	for _, port := range y.ports {
		y.fails(y.ssh("-p", port, "-N", "-i", y.path("thief"), "-R", "22:127.0.0.1:1", "db-01@hub"), "remote port forwarding failed")
	}
	if n := strings.Count(y.audit.String(), "db-01 is attached with another key"); n != 3 {
		t.Errorf("the thief is in the audit log %d times, want 3", n)
	}
	first := y.background(y.ssh("-p", y.ports[1], "-v", "-N", "-i", y.path("one"), "-R", "db-01:22:127.0.0.1:"+y.sshd, "x@hub"), "remote forward success")
	_ = first.Process.Kill()
	for _, port := range y.ports {
		y.port = port
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	}
}

// Of two keys that want a name at two hubs at one time, one gets it.
func TestNameAtOneTime(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`})
	a := y.hub
	b := y.oneMore()
	y.await("hubs know each other", func() bool { return len(a.peers.up("")) == 1 && len(b.peers.up("")) == 1 })
	for range 50 {
		var all sync.WaitGroup
		var got [2]net.Listener
		for i, h := range []*Hub{a, b} {
			all.Go(func() { got[i], _ = h.attach(t.Context(), []string{"key a", "key b"}[i], "tcp", "db-01", "22") })
		}
		all.Wait()
		if (got[0] == nil) == (got[1] == nil) {
			t.Fatalf("it is there %v", got)
		}
		for _, l := range got {
			if l != nil {
				l.Close()
			}
		}
	}
}

// Hubs that did not hear of each other compare their names when they do: who came first stays.
// One that does not answer keeps nobody out.
func TestNameAfterSplit(t *testing.T) {
	t.Parallel()
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "two": `permitlisten="db-0*:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	var together atomic.Bool
	y.findBy(func(all []string) ([]string, error) {
		if !together.Load() {
			return nil, nil
		}
		return all, nil
	})
	a, b := y.oneMore(), y.oneMore()
	ports := slices.Clone(y.ports[len(y.ports)-2:])
	attach := func(key, port string) {
		y.background(y.ssh("-p", port, "-v", "-N", "-i", y.path(key), "-R", "22:127.0.0.1:"+y.sshd, "db-01@hub"), "remote forward success")
	}
	attach("two", ports[1])
	time.Sleep(2 * sameTime * time.Second) // is what comes first
	attach("one", ports[0])
	together.Store(true)
	y.await("the later one is gone", func() bool { return a.registry.owner("db-01") == "" })
	if b.registry.owner("db-01") == "" {
		t.Error("the first one is gone, too")
	}
	for _, port := range ports {
		y.port = port
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	}
}

// While two hubs have a name with two keys neither stops comparing.
func TestNameComparedAgain(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`})
	hubs := []*Hub{y.hub}
	hubs = append(hubs, y.oneMore())
	y.await("hubs know each other", func() bool { return len(hubs[0].peers.up("")) == 1 && len(hubs[1].peers.up("")) == 1 })
	for i, key := range []string{"key a", "key b"} {
		defer must(hubs[i].registry.listen(t.Context(), key, "tcp", "db-01", "22"))(t).Close()
	}
	for i, h := range hubs {
		if err := h.compare(t.Context(), h.peers.up("")[0]); err == nil {
			t.Errorf("hub %d is content", i)
		}
	}
}

// A stock client whose wire is dead, which its hub has not noticed, comes back to another
// hub: it is reached by way of either at once.
func TestHalfOpenAtOtherHub(t *testing.T) {
	t.Parallel()
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "two": `permitlisten="db-02:22"`, "anonymous": `from="127.0.0.1",permitopen="db-*:*"`})
	y.beat = 0 // which is usual: 42 s
	a, b := y.oneMore(), y.oneMore()
	ports := slices.Clone(y.ports[len(y.ports)-2:])
	y.await("hubs know each other", func() bool { return len(a.peers.up("")) == 2 && len(b.peers.up("")) == 2 })
	attach := func(port string) {
		y.background(y.ssh("-p", port, "-o", "ServerAliveInterval=0", "-v", "-N", "-i", y.path("one"), "-R", "db-01:22:127.0.0.1:"+y.sshd, "x@hub"), "remote forward success")
	}
	for range 3 {
		wire := between(t, "127.0.0.1:"+ports[0])
		_, port, _ := net.SplitHostPort(wire.address)
		attach(port)
		wire.frozen.Store(true)
		attach(ports[1])
		for _, port := range ports {
			began := time.Now()
			c := must(net.Dial("tcp", "127.0.0.1:"+port))(t)
			_ = c.SetDeadline(began.Add(soon / 2))
			want := "HTTP/1.1 200 Connection established\r\n\r\nSSH-2.0-OpenSSH"
			got := make([]byte, len(want))
			fmt.Fprint(c, "CONNECT db-01:22 HTTP/1.0\r\n\r\n")
			if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
				t.Errorf("%q, %v", got, err)
			}
			c.Close()
			t.Logf("by way of hub %s after %v", port, time.Since(began).Round(time.Millisecond))
		}
		ports[0], ports[1] = ports[1], ports[0]
		a, b = b, a
	}
}

// A hub that hangs is no veto, and does not hold a host up for long.
func TestPeerHangs(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`})
	other := between(t, "127.0.0.1:"+y.ports[0])
	y.findBy(func([]string) ([]string, error) { return []string{other.address}, nil })
	h := y.oneMore()
	y.await("hubs know each other", func() bool { return len(h.peers.up("")) == 1 })
	other.frozen.Store(true)
	h.peers.claim = claimLimit
	began := time.Now()
	l, err := h.attach(context.Background(), "key", "tcp", "db-01", "22")
	if took := time.Since(began); err != nil || took > controlLimit/2 {
		t.Fatalf("%v after %v", err, took)
	}
	l.Close()
}
