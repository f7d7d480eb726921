package wgchan

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

// until waits for what has no event of its own.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// echoes has a flow to an echo, both ways full.
type echoes struct {
	t  *testing.T
	c  net.Conn
	wg sync.WaitGroup
}

func newEchoes(t *testing.T, ch channel.Channel) *echoes {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echoes{t: t}
	e.wg.Go(func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	})
	if e.c, err = ch.DialContext(t.Context(), "tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		e.c.Close()
		e.wg.Wait()
	})
	return e
}

// move sends so much and reads it back.
func (e *echoes) move(size int) {
	e.t.Helper()
	e.receive(e.send(size))
}

// send returns what is on its way.
func (e *echoes) send(size int) []byte {
	data := make([]byte, size)
	rand.Read(data)
	e.wg.Go(func() { e.c.Write(data) })
	return data
}

func (e *echoes) receive(data []byte) {
	e.t.Helper()
	got := make([]byte, len(data))
	e.c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := io.ReadFull(e.c, got); err != nil || !bytes.Equal(got, data) {
		e.t.Fatalf("%d bytes of %d came back, %v", n, len(data), err)
	}
}

// TestPathNarrows: what the path carries is found, again when it changes, and what
// is open goes on.
func TestPathNarrows(t *testing.T) {
	s := siteAt(t, wiretest.Beats{Every: 50 * time.Millisecond}, newLane(0, 0, 0), newLane(0, 0, 0), &channel.Host{})
	s.way.widest.Store(1400) // WireGuard takes 32 of them
	ch := s.connect()
	e := newEchoes(t, ch)
	for _, step := range []struct{ widest, mtu int }{{1400, 1360}, {1300, 1200}, {1472, 1440}, {1376, 1344}} {
		s.way.widest.Store(int64(step.widest))
		e.move(1 << 20)
		until(t, "the MTU is found", func() bool { return ch.MTU() == step.mtu })
		e.move(1 << 20)
	}
}

// TestRebind: the far end sees the wire come from elsewhere, again and again.
func TestRebind(t *testing.T) {
	s := siteAt(t, wiretest.Beats{Every: 50 * time.Millisecond}, newLane(0, 0, 0), newLane(0, 0, 0), &channel.Host{})
	ch := s.connect()
	e := newEchoes(t, ch)
	for range 5 {
		e.move(1 << 20)
		s.way.rebind(t)
	}
	e.move(1 << 20)
}

// TestLoss: a lost packet is nobody's end.
func TestLoss(t *testing.T) {
	s := siteAt(t, wiretest.Beats{}, newLane(0, 0, 5*time.Millisecond), newLane(0, 0, 5*time.Millisecond), &channel.Host{})
	s.way.lose.Store(100)
	ch := s.connect()
	var all sync.WaitGroup
	for range 4 {
		e := newEchoes(t, ch)
		all.Go(func() { e.move(1 << 20) })
	}
	all.Wait()
}
