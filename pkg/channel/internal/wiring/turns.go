package wiring

import (
	"errors"
	"slices"
	"time"
)

// Data waits here before it is given to the mux, flow after flow, a piece each, so
// that what the mux itself has to say is never behind more than what is queued.

const (
	// What may be queued is what goes out in queueTime: on a slow wire, small
	// pieces of other flows do not wait long behind it.
	queueTime   = 100 * time.Millisecond
	mostQueued  = 128 << 10
	leastQueued = 8 << 10

	// Pieces is how many of them may be queued: four, each of the size of a full
	// packet of SSH where the wire is fast.
	Pieces = 4

	// turnTime is how long a piece that was let in counts: one that its flow's
	// window holds back must not keep the others waiting.
	turnTime = 10 * time.Millisecond
)

// ErrShutOut is why nothing was written, or nothing more: the wire is gone, or
// it was stopped or late before its turn came.
var ErrShutOut = errors.New("not let in")

// InTurns has write write p, piece after piece, as there is room on the wire.
// stop ends the waiting for a turn, and so does late before the first: what is
// sent in part, a frame perhaps, must be sent in whole.
func (t *Tap) InTurns(p []byte, write func([]byte) (int, error), stop, late <-chan struct{}) (n int, err error) {
	for {
		size, ok := t.Enter(len(p)-n, stop, late)
		if !ok {
			return n, ErrShutOut
		}
		m, err := t.writePiece(p[n:n+size], write)
		n += m
		if err != nil || n == len(p) {
			return n, err
		}
		late = nil
	}
}

// writePiece writes one. That may have to wait for the flow's window, when the piece
// no longer counts.
func (t *Tap) writePiece(p []byte, write func([]byte) (int, error)) (int, error) {
	over := time.AfterFunc(turnTime, func() { t.Leave(len(p)) })
	n, err := write(p)
	if over.Stop() {
		t.Leave(len(p))
	}
	return n, err
}

// turn is a piece of data that waits to be let in.
type turn struct {
	size int           // wanted, and then granted
	done chan struct{} // closed when the waiting is over
	in   bool
}

// Enter waits until data of up to size bytes may be written, and tells how much
// of it. It is not when the wire is gone, or when stop or late comes first.
// What was let in must leave.
func (t *Tap) Enter(size int, stop, late <-chan struct{}) (int, bool) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return 0, false
	}
	if n := min(size, t.piece()); len(t.waiting) == 0 && t.fits(n) {
		t.entered += n
		t.mu.Unlock()
		return n, true
	}
	e := &turn{size: size, done: make(chan struct{})}
	t.waiting = append(t.waiting, e)
	t.mu.Unlock()
	select {
	case <-e.done:
	case <-stop:
	case <-late:
	}
	return t.entry(e)
}

// entry tells what became of a turn, and gives up one that did not come.
func (t *Tap) entry(e *turn) (int, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := slices.Index(t.waiting, e); i >= 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
		t.admit() // it may have been what the others waited behind
	}
	return e.size, e.in
}

// Leave is called when a piece is queued, or was let in for too long.
func (t *Tap) Leave(size int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entered -= size
	t.admit()
}

// admit lets in who waited longest, as long as there is room. mu is held.
func (t *Tap) admit() {
	for len(t.waiting) > 0 {
		e := t.waiting[0]
		if t.err == nil {
			n := min(e.size, t.piece())
			if !t.fits(n) {
				return
			}
			e.size, e.in = n, true
			t.entered += n
		}
		t.waiting = slices.Delete(t.waiting, 0, 1)
		close(e.done)
	}
}

func (t *Tap) piece() int { return t.most / Pieces }

// fits tells whether a piece may be let in: the only one always may.
func (t *Tap) fits(size int) bool {
	have := len(t.queue) + t.entered
	return have == 0 || have+size <= t.most
}

// paced learns from a write how much may be queued: less at once, more step by
// step, and only from writes that are large enough to tell. mu is held.
func (t *Tap) paced(size int, took time.Duration) {
	perTime := int(min(float64(size)*float64(queueTime)/float64(max(took, 1)), mostQueued))
	if perTime < t.most {
		t.most = max(perTime, leastQueued)
	} else if size >= t.piece() {
		t.most = min(perTime, 2*t.most)
	}
}
