package hub

import (
	"net"
	"sync"
	"time"
)

// drained is a listener that accepts who finds room among those who are not known yet, and
// whose end is not that of what it has accepted: after it is closed its Accept fails only when
// that has gone.
type drained struct {
	net.Listener
	h *Hub
}

func (l *drained) Accept() (net.Conn, error) {
	l.h.porch.Room()
	c, err := l.Listener.Accept()
	if err == nil {
		l.h.porch.Enter(c)
	} else if l.h.leaving() {
		<-l.h.drain.gone
	}
	return c, err
}

// draining is a hub's leaving: nobody is let in any more, wires without connections end at
// once, so that hosts go elsewhere, and the others when their last one has ended.
type draining struct {
	begun chan struct{} // closed when it begins
	gone  chan struct{} // closed when nothing is left, or there is no more time
	once  sync.Once
	end   sync.Once
}

func newDraining() draining {
	return draining{begun: make(chan struct{}), gone: make(chan struct{})}
}

func (d *draining) begin() { d.once.Do(func() { close(d.begun) }) }

func (h *Hub) leaving() bool {
	select {
	case <-h.drain.begun:
		return true
	default:
		return false
	}
}

// drainFor is for when leaving has begun: it blocks until all has gone, limit has passed or somebody is in a hurry.
func (h *Hub) drainFor(limit time.Duration, hurry <-chan struct{}) {
	h.settle()
	h.tell()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-h.drain.gone:
	case <-t.C:
	case <-hurry:
	}
	h.drain.end.Do(func() { close(h.drain.gone) })
}

// settle ends what has nothing open while the hub leaves.
func (h *Hub) settle() {
	if !h.leaving() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	left := h.loose.open.Load() > 0
	for v := range h.visits {
		if v.streams.open.Load() == 0 {
			v.end()
		} else {
			left = true
		}
	}
	if !left {
		h.drain.end.Do(func() { close(h.drain.gone) })
	}
}

// tell has those hosts go elsewhere that have something open: their ports end, for this
// reason, and may be theirs again until they are there. Another SSH client could not be told.
func (h *Hub) tell() {
	for _, v := range h.visitors() {
		if v.told {
			v.release(func(*held) bool { return true })
		}
	}
}
