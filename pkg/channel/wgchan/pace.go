package wgchan

import (
	"sync"
	"time"
)

// A pace bounds how many packets are inside WireGuard: those for one peer, or those
// from all of them. It keeps each in a buffer of 64 KiB, in queues that hold 100,000,
// and no setting bounds that.
type pace struct {
	most, least int

	mu    sync.Mutex
	moved sync.Cond
	n     int // that have entered and not left
}

const (
	// mostInside packets are 16 MiB of buffers, and make two Gbit/s if WireGuard takes no
	// longer than a millisecond for each. More have not made it faster.
	mostInside = 256

	// lostAfter is when those that have not left are taken to be dropped: there was
	// no key yet, or what came was only made to look like a peer's.
	lostAfter = 100 * time.Millisecond
)

// newPace makes one. Where they are counted late, as many as least of them may leave
// before they enter, which is a number below zero.
func newPace(least int) *pace {
	p := &pace{most: mostInside, least: least}
	p.moved.L = &p.mu
	return p
}

// wait waits until more packets may enter, and has so many of them enter.
func (p *pace) wait(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n >= p.most {
		t := time.AfterFunc(lostAfter, p.forget)
		defer t.Stop()
	}
	for p.n >= p.most {
		p.moved.Wait()
	}
	p.n += n
}

// forget forgets those that are inside: others that have left were not enough.
func (p *pace) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n = 0
	p.moved.Broadcast()
}

func (p *pace) enter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n += n
}

func (p *pace) leave(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n = max(p.n-n, p.least)
	p.moved.Broadcast()
}
