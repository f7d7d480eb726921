package hub

import (
	"context"
	"log/slog"
	"maps"
	"math"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// waiting bounds what a hub holds of what was sent to who does not read it as fast. A wire
// has a window for each connection over it, which is full then, and must be read, for there
// are other connections on it. So nobody is held back who is slow, however many he is, while
// there is room; when there is none, connections end of the key that has most that wait,
// those first that have moved least.
type waiting struct {
	most int64 // bytes; zero means half of what the program may use (GOMEMLIMIT)
	mu   sync.Mutex
	all  map[*wait]bool
}

// What may wait of one connection: the window of its wire, and what is between two of them.
const (
	waitsSSH   = 2 << 20 // which stock clients are given, and never takes back
	waitsTLS   = 256 << 10
	waitsPlain = 64 << 10
)

var windows = map[string]int64{kindSSH: waitsSSH, kindTLS: waitsTLS}

const (
	waitEvery = time.Second
	waitsLong = 2       // looks in a row at which something is being written: it is slow
	mostWaits = 1 << 30 // bytes, where the program may use as much memory as it likes
)

// A slowError says why a connection has ended that nothing is wrong with.
type slowError struct{}

func (slowError) Error() string        { return "too much waits to be read" }
func (slowError) Is(target error) bool { return target == syscall.ENOBUFS }

func (w *waiting) limit() int64 {
	limit := debug.SetMemoryLimit(-1)
	switch {
	case w.most > 0:
		return w.most
	case limit < math.MaxInt64:
		return limit / 2
	}
	return mostWaits
}

// wait is what it knows of one connection.
type wait struct {
	on      *waiting
	account string
	window  int64       // that what is written comes by
	still   func() bool // it is permitted; nil: that is who dialled it to be asked
	writing atomic.Bool
	conn    *counted

	looks         int   // in a row at which it was writing
	moved, before int64 // bytes, since the last look and until then
}

func (w *wait) begin(c *counted) {
	w.conn = c
	w.on.mu.Lock()
	defer w.on.mu.Unlock()
	if w.on.all == nil {
		w.on.all = map[*wait]bool{}
	}
	w.on.all[w] = true
}

func (w *wait) end() {
	w.on.mu.Lock()
	defer w.on.mu.Unlock()
	delete(w.on.all, w)
}

// look tells whether it is slow.
func (w *wait) look() bool {
	out := w.conn.out.Load()
	w.moved, w.before = out-w.before, out
	if w.looks++; !w.writing.Load() {
		w.looks = 0
	}
	return w.looks >= waitsLong
}

// watch looks after it until ctx ends.
func (w *waiting) watch(ctx context.Context, log *slog.Logger) {
	t := time.NewTicker(waitEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, c := range w.tooMany() {
			log.Warn("a connection has ended, for "+slowError{}.Error(), "account", c.account)
			c.conn.end(slowError{})
		}
	}
}

// recheck ends those that are not permitted any more.
func (w *waiting) recheck() {
	w.mu.Lock()
	all := slices.Collect(maps.Keys(w.all))
	w.mu.Unlock()
	for _, c := range all {
		if c.still != nil && !c.still() {
			c.conn.end(&forbiddenError{"this connection"})
		}
	}
}

// tooMany are those that must end.
func (w *waiting) tooMany() (all []*wait) {
	w.mu.Lock()
	defer w.mu.Unlock()
	slow, sum, total := map[string][]*wait{}, map[string]int64{}, int64(0)
	limit := w.limit()
	for c := range w.all {
		if c.look() {
			slow[c.account] = append(slow[c.account], c)
			sum[c.account] += c.window
			total += c.window
		}
	}
	for total > limit {
		most := ""
		for account := range sum {
			if sum[account] > sum[most] {
				most = account
			}
		}
		i := least(slow[most])
		c := slow[most][i]
		slow[most] = append(slow[most][:i], slow[most][i+1:]...)
		all = append(all, c)
		sum[most] -= c.window
		total -= c.window
	}
	return all
}

func least(all []*wait) (i int) {
	for j, c := range all {
		if c.moved < all[i].moved {
			i = j
		}
	}
	return i
}
