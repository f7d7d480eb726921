// Package strangers bounds those who have come to a server and have not yet shown who they
// are. There is no telling them apart but by their addresses, so that when there are too many
// one must leave of the address that has most of them there, the longest: who belongs there
// needs a few round trips, and who wants to keep him out must be faster than that, again and
// again, and from many addresses. Behind a balancer that hides them all are of one.
//
// All who belong there may come at once, when a server was away: who takes them in waits
// for room then, and nobody has to leave who has only just come.
package strangers

import (
	"bufio"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// A Porch is where they are. The zero value is one for nobody.
type Porch struct {
	Most int // that may be there

	mu      sync.Mutex
	changed sync.Cond
	all     []stranger // the longest there first
}

type stranger struct {
	net.Conn
	from  netip.Prefix
	since time.Time
}

// grace is how long nobody has to leave: a rush of those who belong there is over sooner, and
// what one may wait for outside bounds what somebody can do who only wants to be in the way.
const grace = time.Second

// origin is what one who wants many connections has one of: an address, or a network of IPv6.
func origin(c net.Conn) netip.Prefix {
	at, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	bits, a := 64, at.Addr().Unmap()
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits)
	return p
}

// Enter takes one in. It is called once for each, and Leave once it is known who it is, or
// it has gone.
func (p *Porch) Enter(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, stranger{c, origin(c), time.Now()})
	if len(p.all) > p.Most {
		i := p.one()
		p.all[i].Close()
		p.all = slices.Delete(p.all, i, i+1)
	}
}

// Room waits until there is room for one more, or somebody there has had his time.
func (p *Porch) Room() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.changed.L = &p.mu
	for len(p.all) >= p.Most && p.Most > 0 {
		left := grace - time.Since(p.all[p.one()].since)
		if left <= 0 {
			return
		}
		t := time.AfterFunc(left, p.over)
		p.changed.Wait()
		t.Stop()
	}
}

// over tells who waits that somebody has had his time: not before he waits.
func (p *Porch) over() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.changed.Broadcast()
}

// one is who must leave.
func (p *Porch) one() (i int) {
	of, most := map[netip.Prefix]int{}, 0
	for _, s := range p.all {
		of[s.from]++
		most = max(most, of[s.from])
	}
	return slices.IndexFunc(p.all, func(s stranger) bool { return of[s.from] == most })
}

// Turn has one be known as another connection from here on, which may be from elsewhere.
func (p *Porch) Turn(c, into net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.index(c); i >= 0 {
		p.all[i].Conn, p.all[i].from = into, origin(into)
	}
}

func (p *Porch) index(c net.Conn) int {
	return slices.IndexFunc(p.all, func(s stranger) bool { return s.Conn == c })
}

// Leave takes one out. It may be called more than once.
func (p *Porch) Leave(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := p.index(c); i >= 0 {
		p.all = slices.Delete(p.all, i, i+1)
		p.changed.Broadcast()
	}
}

// Early is the connection of one of whom something has been read already: First has it.
type Early struct {
	net.Conn
	First *bufio.Reader
}

func (e *Early) Read(p []byte) (int, error) {
	if e.First != nil && e.First.Buffered() > 0 {
		return e.First.Read(p)
	}
	e.First = nil
	return e.Conn.Read(p)
}

// Count is how many are there.
func (p *Porch) Count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}
