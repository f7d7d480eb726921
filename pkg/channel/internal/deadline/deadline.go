// Package deadline gives connections that are not sockets the deadlines of
// net.Conn: what waits on a channel can wait for Done beside it.
package deadline

import (
	"sync"
	"time"
)

// A Deadline may be set again and again, also while somebody waits for it. The
// zero value is ready and never passes.
type Deadline struct {
	// Func, if set before the first Set, is called on a goroutine of its own
	// whenever the deadline passes.
	Func func()

	mu    sync.Mutex
	timer *time.Timer
	done  chan struct{} // made when first needed, closed when passed
	gen   int           // tells a timer that was replaced while it fired
	armed bool
}

// Set moves the deadline: to the zero time, it never passes; to a past time, it
// has passed when Set returns. Who already waits for Done keeps waiting for the
// new one.
func (d *Deadline) Set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gen++
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.done == nil || d.passed() {
		d.done = make(chan struct{})
	}
	if d.armed = !t.IsZero(); d.armed {
		d.start(time.Until(t))
	}
}

func (d *Deadline) start(left time.Duration) {
	if left <= 0 {
		d.close()
		return
	}
	gen := d.gen
	d.timer = time.AfterFunc(left, func() { d.pass(gen) })
}

func (d *Deadline) pass(gen int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if gen == d.gen {
		d.close()
	}
}

func (d *Deadline) close() {
	close(d.done)
	if d.Func != nil {
		go d.Func()
	}
}

// Done is closed when the deadline passes.
func (d *Deadline) Done() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done == nil {
		d.done = make(chan struct{})
	}
	return d.done
}

// Passed tells whether the deadline lies behind.
func (d *Deadline) Passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.passed()
}

// Armed tells whether there is a deadline at all.
func (d *Deadline) Armed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.armed
}

func (d *Deadline) passed() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// A Pair is the two deadlines of a connection, which has their methods of net.Conn
// by embedding it.
type Pair struct{ ReadBy, WriteBy Deadline }

func (p *Pair) SetDeadline(t time.Time) error {
	p.ReadBy.Set(t)
	p.WriteBy.Set(t)
	return nil
}
func (p *Pair) SetReadDeadline(t time.Time) error  { p.ReadBy.Set(t); return nil }
func (p *Pair) SetWriteDeadline(t time.Time) error { p.WriteBy.Set(t); return nil }
