package wgchan

import (
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/netstack"
)

const (
	// leastMTU fits into the least that IPv6 asks of a path, WireGuard and all.
	leastMTU = 1200

	// stockMTU is what stock ends have, which tell of none.
	stockMTU = 1420

	// stackMTU is the least that netstacks know. TCP's segments are cut to less.
	stackMTU = 1280

	missedMost  = 3  // answers to full signs, until the path is searched again
	searchBeats = 15 // between searches for more
)

// sizes are tried: what is left of paths that are met, in multiples of what WireGuard
// pads to. It takes 60 bytes over IPv4 and 80 over IPv6.
var sizes = []int{leastMTU, 1280, 1344, 1360, 1376, 1392, 1408, 1424, 1440}

// A path is the way to the other end as the near end finds it: how long it takes, and
// how large a packet may be. Nothing is taken for true that was not answered.
type path struct {
	leg   *leg
	stack *netstack.Stack
	born  time.Time
	first chan struct{} // closed with the first answer

	mu     sync.Mutex
	size   int  // of the largest sign that was answered
	missed int  // full signs that were not, while others were
	alive  bool // something was answered since the last beat
	beats  int
	rtt    time.Duration
}

func newPath(l *leg, s *netstack.Stack) *path {
	p := &path{leg: l, stack: s, born: time.Now(), first: make(chan struct{}), size: leastMTU}
	l.mtu.Store(leastMTU)
	l.answered = p.answered
	return p
}

// search asks with every size that is more than what is known.
func (p *path) search(size int) {
	for _, s := range sizes {
		if s > size {
			p.ask(s)
		}
	}
}

func (p *path) ask(size int) {
	p.mu.Lock()
	mtu := p.size
	p.mu.Unlock()
	p.leg.send(sign{kind: signAsk, mtu: mtu, time: int64(time.Since(p.born))}, size)
}

// beat asks with a small sign and with a full one. Where only the small ones are
// answered, the path has become narrower.
func (p *path) beat() {
	p.mu.Lock()
	if p.alive { // who is away misses what is small as well
		p.missed++
	}
	p.leg.deaf.Store(!p.alive)
	p.alive = false
	p.beats++
	size, narrow, wider := p.size, p.missed > missedMost, p.beats%searchBeats == 0
	if narrow {
		p.missed, p.size = 0, leastMTU
	}
	p.mu.Unlock()
	if narrow {
		p.set(leastMTU)
		size = leastMTU
	}
	p.ask(leastSign)
	p.ask(size)
	if narrow || wider {
		p.search(size)
	}
}

// answered takes the answer to a sign.
func (p *path) answered(s sign) {
	p.mu.Lock()
	if p.rtt == 0 {
		close(p.first)
	}
	p.rtt = max(1, time.Since(p.born)-time.Duration(s.time))
	p.alive = true
	p.leg.deaf.Store(false)
	p.leg.heard.Add(1)
	if s.size == p.size {
		p.missed = 0
	}
	more := s.size > p.size && slices.Contains(sizes, s.size)
	if more {
		p.size, p.missed = s.size, 0
	}
	p.mu.Unlock()
	if more {
		p.set(s.size)
		p.ask(leastSign) // which tells the other end
	}
}

func (p *path) set(mtu int) { p.leg.adopt(p.stack, mtu) }

// adopt has a leg and its netstack go by an MTU.
func (l *leg) adopt(s *netstack.Stack, mtu int) {
	mtu = min(max(mtu, leastMTU), sizes[len(sizes)-1])
	l.mtu.Store(int64(mtu))
	s.SetMTU(max(mtu, stackMTU))
}
