package wgchan

import (
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// A seam joins WireGuard, whose TUN device it is, and the netstacks of its peers, each
// of which has a leg. Nothing waits in it: what a netstack sends is cut straight into
// the buffers in which WireGuard encrypts it, and what comes is put together straight
// into those of the netstack. Who comes first waits for the other.
type seam struct {
	events   chan tun.Event
	received *pace

	mu   sync.Mutex
	room sync.Cond // out is set, or has become empty
	some sync.Cond // out is not empty any more
	out  *batch    // what WireGuard reads into, while it does
	over bool
	legs map[netip.Addr]*leg // by the peer's addresses
	sole *leg                // of what is from others
	last uint32              // stamp
	sent map[uint32]*pace    // by stamp
}

var _ tun.Device = (*seam)(nil)

// batchSize is how many packets WireGuard takes at once: two segments of 64 KiB.
const batchSize = 128

func newSeam() *seam {
	s := &seam{
		events: make(chan tun.Event), received: newPace(-mostInside),
		legs: make(map[netip.Addr]*leg), sent: make(map[uint32]*pace),
	}
	s.room.L, s.some.L = &s.mu, &s.mu
	return s
}

// batch is what one read gives.
type batch struct {
	bufs   [][]byte
	sizes  []int
	offset int
	n      int
}

func (b *batch) full() bool { return b.n == len(b.bufs) }

// Read implements tun.Device. It returns with the first packet, and with all that
// came while it was about to.
func (s *seam) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := &batch{bufs: bufs, sizes: sizes, offset: offset}
	s.out = b
	s.room.Broadcast()
	for b.n == 0 && !s.over {
		s.some.Wait()
	}
	s.out = nil
	if s.over {
		return 0, os.ErrClosed
	}
	return b.n, nil
}

// put gives WireGuard a leg's packet, in as many as it is cut into.
func (s *seam) put(l *leg, c *cut) error {
	l.sent.wait(c.packets())
	s.mu.Lock()
	defer s.mu.Unlock()
	for more := true; more; {
		for !s.over && (s.out == nil || s.out.full()) {
			s.room.Wait()
		}
		if s.over {
			return net.ErrClosed
		}
		for b := s.out; more && !b.full(); b.n++ {
			b.sizes[b.n], more = c.next(b.bufs[b.n][b.offset:])
			stamp(b.bufs[b.n], l.stamp)
		}
		s.some.Signal()
	}
	return nil
}

// stamped is where the stamp of a packet's leg is while WireGuard has it: at the end of
// its buffer, where no packet reaches that a path carries.
func stamped(buf []byte) []byte {
	const size = 4
	return buf[device.MaxMessageSize-size : device.MaxMessageSize]
}

func stamp(buf []byte, with uint32) { binary.NativeEndian.PutUint32(stamped(buf), with) }

// left notes that packets have left, which are all for one peer.
func (s *seam) left(packets [][]byte) {
	var whose uint32
	n := 0
	for _, p := range packets {
		if cap(p) != device.MaxMessageSize { // a handshake's
			continue
		}
		mark := stamped(p[:cap(p)])
		if m := binary.NativeEndian.Uint32(mark); m != 0 {
			whose, n = m, n+1
		}
		clear(mark)
	}
	s.mu.Lock()
	p := s.sent[whose]
	s.mu.Unlock()
	if p != nil {
		p.leave(n)
	}
}

// Write implements tun.Device: all packets are of one peer, at its own addresses.
func (s *seam) Write(bufs [][]byte, offset int) (int, error) {
	defer s.received.leave(len(bufs))
	packets := make([][]byte, len(bufs))
	for i, b := range bufs {
		packets[i] = b[offset:]
	}
	if l := s.leg(packets[0]); l != nil {
		l.take(packets)
	}
	return len(bufs), nil
}

// leg is that of who sent a packet.
func (s *seam) leg(packet []byte) *leg {
	from, ok := source(packet)
	if !ok {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.legs[from]; l != nil {
		return l
	}
	return s.sole
}

// source is the address that a packet comes from.
func source(packet []byte) (netip.Addr, bool) {
	if len(packet) >= ip4Header && packet[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(packet[12:16])), true
	}
	if len(packet) >= ip6Header && packet[0]>>4 == 6 {
		return netip.AddrFrom16([16]byte(packet[8:24])), true
	}
	return netip.Addr{}, false
}

func (s *seam) forget(stamp uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sent, stamp)
}

// leads lets a leg send until it is forgotten.
func (s *seam) leads(l *leg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	l.stamp, l.sent = s.last, newPace(0)
	s.sent[l.stamp] = l.sent
}

// add gives a peer its leg, unless another has one of its addresses.
func (s *seam) add(l *leg, addresses []netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range addresses {
		if s.legs[a] != nil {
			return false
		}
	}
	for _, a := range addresses {
		s.legs[a] = l
	}
	l.keyed = addresses
	return true
}

// lead gives a peer addresses that another may have had before it, unless by its key,
// and returns those.
func (s *seam) lead(l *leg, addresses []netip.Addr) (given []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range addresses {
		if before := s.legs[a]; before == nil || !slices.Contains(before.keyed, a) {
			s.legs[a] = l
			given = append(given, a)
		}
	}
	return given
}

func (s *seam) remove(l *leg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.legs, func(_ netip.Addr, of *leg) bool { return of == l })
}

// Close implements tun.Device.
func (s *seam) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil
	}
	s.over = true
	close(s.events)
	s.room.Broadcast()
	s.some.Broadcast()
	return nil
}

// MTU implements tun.Device. It is for the padding only: without one, packets are
// padded to 16 bytes and never cut.
func (*seam) MTU() (int, error) { return 0, nil }

func (*seam) File() *os.File             { return nil }
func (*seam) Name() (string, error)      { return "culvert", nil }
func (s *seam) Events() <-chan tun.Event { return s.events }
func (*seam) BatchSize() int             { return batchSize }
