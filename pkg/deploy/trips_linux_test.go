package deploy

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// A turning counts how often our end has begun to speak.
type turning struct {
	net.Conn
	mu       sync.Mutex
	speaking bool
	turns    int
}

func (c *turning) turn(speaking bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if speaking && !c.speaking {
		c.turns++
	}
	c.speaking = speaking
}

func (c *turning) Write(p []byte) (int, error) {
	c.turn(true)
	return c.Conn.Write(p)
}

func (c *turning) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.turn(false)
	return n, err
}

// How many round trips a deploy takes is how long it takes where hosts are far away.
func TestRoundTrips(t *testing.T) {
	for what, c := range map[string]struct {
		onFail string
		wait   time.Duration
		before string // what runs already
		turns  int
	}{
		"the first": {turns: 4}, // hello, lock and offer, ship, activate
		"another":   {turns: 4, before: "old"},
		"the same":  {turns: 2, before: "new"},
		"all back":  {turns: 5, onFail: RollbackAll}, // and finish
		"waiting":   {turns: 6, wait: time.Minute},   // lock, a look, offer
	} {
		t.Run(what, func(t *testing.T) {
			y := newYard(t, 3, func(s *Settings) { s.OnFail = c.onFail })
			now := time.Date(2026, 11, 22, 10, 15, 0, 0, time.UTC)
			y.now = func() time.Time { now = now.Add(time.Second); return now }
			if c.before != "" {
				y.must("good "+c.before, "")
			}
			var mu sync.Mutex
			var wires []*turning
			y.through = func(conn net.Conn) io.ReadWriteCloser {
				mu.Lock()
				defer mu.Unlock()
				wires = append(wires, &turning{Conn: conn})
				return wires[len(wires)-1]
			}
			y.wait = c.wait
			y.must("good new", "")
			y.is("pages", y.pages(), "good new good new good new")
			for _, w := range wires {
				if w.turns != c.turns {
					t.Errorf("%d round trips, want %d", w.turns, c.turns)
				}
			}
		})
	}
}
