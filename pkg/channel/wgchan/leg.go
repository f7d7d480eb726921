package wgchan

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// A leg leads from the seam to one peer's netstack, whose device it is.
type leg struct {
	s           *seam
	stamp       uint32
	sent        *pace
	self, other netip.Addr // where signs go from, and to
	mtu         atomic.Int64
	heard       atomic.Uint64 // packets
	deaf        atomic.Bool   // the other end is: what it says is no sign that the way there leads on
	keyed       []netip.Addr  // that the peer has by its key
	outer       []netip.Addr  // of this machine's kernel, beside the netstack
	out         atomic.Pointer[func(bufs [][]byte)]
	asked       func(sign) // by the other end; nil: that is not answered
	answered    func(sign) // by the other end; may be nil

	mu     sync.Mutex
	wanted sync.Cond // in is set
	filled sync.Cond // in is not any more
	in     [][]byte  // what the netstack reads into, while it does
	got    int
	over   bool
}

func newLeg(s *seam, self, other netip.Addr) *leg {
	l := &leg{s: s, self: self, other: other}
	l.mtu.Store(stockMTU)
	l.wanted.L, l.filled.L = &l.mu, &l.mu
	s.leads(l)
	return l
}

// HeaderLen is that of the virtio-net header.
func (*leg) HeaderLen() int { return vnetHeader }

// Readv gives the netstack a packet.
func (l *leg) Readv(bufs [][]byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.in = bufs
	l.wanted.Signal()
	for l.in != nil && !l.over {
		l.filled.Wait()
	}
	if l.over {
		return 0, net.ErrClosed
	}
	return l.got, nil
}

// Writev takes one from it, which may be as large as 64 KiB.
func (l *leg) Writev(bufs [][]byte) (int, error) {
	c := newCut(bufs[0], bufs[1:], int(l.mtu.Load()))
	if err := l.s.put(l, c); err != nil {
		return 0, err
	}
	return vnetHeader + c.total, nil
}

// take takes packets from WireGuard, in the order in which they came.
func (l *leg) take(packets [][]byte) {
	if !l.deaf.Load() {
		l.heard.Add(uint64(len(packets)))
	}
	for len(packets) > 0 {
		if l.sign(packets[0]) {
			packets = packets[1:]
			continue
		}
		n := mergeable(packets)
		merge(packets[:n])
		if l.toOuter(packets[0]) {
			l.handOut(packets[:n])
		} else if !l.give(packets[:n]) {
			return
		}
		packets = packets[n:]
	}
}

// give gives the netstack a packet: the first, with the payload of the others.
func (l *leg) give(packets [][]byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.in == nil && !l.over {
		l.wanted.Wait()
	}
	if l.over {
		return false
	}
	to := scatter{bufs: l.in}
	to.write(make([]byte, vnetHeader))
	to.write(packets[0])
	for _, p := range packets[1:] {
		to.write(p[headers(p):])
	}
	l.in, l.got = nil, to.n
	l.filled.Signal()
	return true
}

// Close ends Readv, and all that waits for it.
func (l *leg) Close() error {
	l.s.forget(l.stamp)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	l.wanted.Broadcast()
	l.filled.Broadcast()
	return nil
}

// scatter is where bytes go one after the other, over several buffers.
type scatter struct {
	bufs [][]byte
	at   int // in the first of them
	n    int // written
}

func (s *scatter) write(b []byte) {
	for len(b) > 0 && len(s.bufs) > 0 {
		n := copy(s.bufs[0][s.at:], b)
		b = b[n:]
		s.at += n
		s.n += n
		if s.at == len(s.bufs[0]) {
			s.bufs, s.at = s.bufs[1:], 0
		}
	}
}
