package mux

import (
	"sync/atomic"
	"time"
)

// A window is how much may be on its way to who reads a stream: what its other end
// may send, what is unread, and what was read and is not given back yet.
const (
	leastWindow = 16 << 10 // that each stream begins with, and is not told of
	firstWindow = 256 << 10
	mostWindow  = 16 << 20

	// So many streams at once begin with the first window; those after them grow to
	// it as they need it.
	firstStreams = 1 << 10

	// mostGrown is by how much all windows of a wire may grow, together: with the
	// windows that streams begin with, it is what this end may have to hold. A wire
	// may be one of several (channel.Spread), and an end has little memory in a pod.
	mostGrown = 32 << 20

	// mostOwed is not given back: after it, or a quarter of the window, the other
	// end is told, so that three quarters are always on their way.
	mostOwed = 256 << 10

	tuneTime = 5 * time.Millisecond
)

// beginWith is the window of a stream beside so many others.
func beginWith(streams int) int {
	if streams < firstStreams {
		return firstWindow
	}
	return leastWindow
}

// budget is what is left for windows to grow by.
type budget struct{ left atomic.Int64 }

// take takes up to so much.
func (b *budget) take(most int) int {
	for {
		left := b.left.Load()
		n := min(int64(most), left)
		if b.left.CompareAndSwap(left, left-n) {
			return int(n)
		}
	}
}

func (b *budget) give(n int) { b.left.Add(int64(n)) }

// window is the receiving end of one.
type window struct {
	size    int
	allowed int // may still come
	owed    int // was read, or is new, and may be given

	grown int       // of the budget
	began time.Time // when it was measured last
	moved int       // was read since then
}

func (w *window) read(n int) {
	w.owed += n
	w.moved += n
}

// tune lets it grow, at a path with this round trip, zero if nobody knows it. What
// is read in one is what the path holds, or all that the window lets it hold: less
// than twice as much may hold it up. That is measured for a round trip or half a
// window, and always for longer than goroutines wait for a processor.
func (w *window) tune(now time.Time, rtt time.Duration, b *budget) {
	took := now.Sub(w.began)
	if rtt <= 0 || took < rtt && w.moved < w.size/2 || took < tuneTime && rtt < tuneTime {
		return
	}
	if 2*float64(w.moved)*float64(rtt)/float64(took) > float64(w.size) {
		more := b.take(min(w.size, mostWindow-w.size))
		w.size += more
		w.owed += more
		w.grown += more
	}
	w.began, w.moved = now, 0
}

// due is how much is worth a frame of its own.
func (w *window) due() int { return min(w.size/4, mostOwed) }

// give gives what is owed.
func (w *window) give() uint32 {
	n := w.owed
	w.owed = 0
	w.allowed += n
	return uint32(n)
}
