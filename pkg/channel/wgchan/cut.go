package wgchan

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	vnetHeader = 10
	ip4Header  = header.IPv4MinimumSize
	ip6Header  = header.IPv6MinimumSize
	maxPacket  = 65535

	protoTCP = uint8(header.TCPProtocolNumber)
	protoUDP = uint8(header.UDPProtocolNumber)
	onlyLast = header.TCPFlagFin | header.TCPFlagPsh

	// mostHeaders is more than IP's and TCP's can be together.
	mostHeaders = 128
)

// headers is how long those of a TCP packet are, and 0 of any other: of IP without
// options or fragments, whose segments can be cut and put together.
func headers(p []byte) int {
	ip := ipHeader(p)
	if ip == 0 || len(p) < ip+header.TCPMinimumSize {
		return 0
	}
	if n := ip + int(header.TCP(p[ip:]).DataOffset()); n >= ip+header.TCPMinimumSize && n <= len(p) && n <= mostHeaders {
		return n
	}
	return 0
}

// ipHeader is how long it is before TCP.
func ipHeader(p []byte) int {
	switch {
	case len(p) >= ip4Header && p[0] == 4<<4|ip4Header/4 && p[9] == protoTCP:
		if h := header.IPv4(p); !h.More() && h.FragmentOffset() == 0 {
			return ip4Header
		}
	case len(p) >= ip6Header && p[0]>>4 == 6 && p[6] == protoTCP:
		return ip6Header
	}
	return 0
}

// A cut is a packet that becomes as many as the path asks for. TCP's become segments
// of the size that the sender says, or of less where the path has become narrower than
// it knew; what else is too large becomes fragments.
type cut struct {
	total int    // bytes of the packet
	head  []byte // what is before the payload in each; none where it's not cut
	ip    int    // of it IP's
	rest  gather // the payload, or the whole packet
	left  int    // bytes of it
	size  int    // in each
	done  int    // bytes that were
	frag  bool
	sum   int // where a checksum is wanted of what is not segmented; 0: nowhere
	from  int // from where on
	seq   uint32
	id    uint16
	store [mostHeaders]byte
}

// newCut is for the packet in bufs; vnet is what is left to do on it.
func newCut(vnet []byte, bufs [][]byte, mtu int) *cut {
	c := &cut{rest: gather{bufs: bufs}}
	for _, b := range bufs {
		c.total += len(b)
	}
	c.left = c.total
	if vnet[0] != 0 {
		c.from = int(binary.NativeEndian.Uint16(vnet[6:]))
		c.sum = c.from + int(binary.NativeEndian.Uint16(vnet[8:]))
	}
	head := c.store[:c.rest.peek(c.store[:])]
	n := headers(head)
	size := mtu - n
	if vnet[1] != 0 {
		size = min(size, int(binary.NativeEndian.Uint16(vnet[4:])))
	}
	switch {
	case n != 0 && c.total-n > size:
		c.head, c.ip, c.size, c.left = head[:n], ipHeader(head), size, c.total-n
		c.rest.skip(n)
		c.seq, c.id = header.TCP(head[c.ip:]).SequenceNumber(), binary.BigEndian.Uint16(head[4:])
	case c.total > mtu:
		c.fragment(head, mtu)
	}
	return c
}

// packets is how many it becomes.
func (c *cut) packets() int {
	if c.head == nil {
		return 1
	}
	return (c.left + c.size - 1) / c.size
}

// next writes a packet to b, and tells whether there is another.
func (c *cut) next(b []byte) (size int, more bool) {
	if c.head == nil && c.total > len(b) {
		return 0, false // nobody's way carries that
	}
	if c.head == nil {
		return c.whole(b[:c.total]), false
	}
	n := min(c.size, c.left)
	if len(c.head)+n > len(b) {
		return 0, false
	}
	c.left -= n
	b = b[:len(c.head)+n]
	copy(b, c.head)
	c.rest.read(b[len(c.head):])
	if c.frag {
		c.setFragment(b)
	} else {
		c.setSegment(b)
	}
	c.done += n
	return len(b), c.left > 0
}

func (c *cut) setSegment(b []byte) {
	tcp := header.TCP(b[c.ip:])
	tcp.SetSequenceNumber(c.seq + uint32(c.done))
	if c.left > 0 {
		tcp.SetFlags(uint8(tcp.Flags() &^ onlyLast))
	}
	setLength(b, c.id)
	sumTCP(b, c.ip)
	c.id++
}

// whole writes a packet that is not cut.
func (c *cut) whole(b []byte) int {
	c.rest.read(b)
	if c.sum != 0 { // the sum of the pseudo header is there
		putSum(b[c.sum:], checksum.Checksum(b[c.from:], 0))
	}
	return len(b)
}

// putSum never puts zero, which to UDP is none.
func putSum(at []byte, sum uint16) {
	if sum != 0xffff {
		sum = ^sum
	}
	binary.BigEndian.PutUint16(at, sum)
}

// setLength makes IP's header that of a packet of this length.
func setLength(b []byte, id uint16) {
	if b[0]>>4 == 6 {
		header.IPv6(b).SetPayloadLength(uint16(len(b) - ip6Header))
		return
	}
	ip := header.IPv4(b)
	ip.SetTotalLength(uint16(len(b)))
	ip.SetID(id)
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
}

func sumTCP(b []byte, ip int) {
	src, dst := addresses(b)
	tcp := header.TCP(b[ip:])
	tcp.SetChecksum(0)
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(tcp)))
	tcp.SetChecksum(^checksum.Checksum(tcp, sum))
}

func addresses(b []byte) (src, dst tcpip.Address) {
	if b[0]>>4 == 6 {
		return header.IPv6(b).SourceAddress(), header.IPv6(b).DestinationAddress()
	}
	return header.IPv4(b).SourceAddress(), header.IPv4(b).DestinationAddress()
}

// mergeable is how many of the packets, from the first on, are one segment that was
// cut: at least 1.
func mergeable(packets [][]byte) int {
	first := packets[0]
	n := headers(first)
	if n == 0 || len(first) == n || !plain(first) {
		return 1
	}
	size, total := len(first)-n, len(first)
	for i, p := range packets[1:] {
		last := packets[i]
		more := len(p) - n
		if len(last)-n != size || flags(last)&onlyLast != 0 || more <= 0 || more > size ||
			total+more > maxPacket || !follows(first, p, n, uint32(size*(i+1))) {
			return i + 1
		}
		total += more
	}
	return len(packets)
}

func flags(p []byte) header.TCPFlags { return header.TCP(p[ipHeader(p):]).Flags() }

// plain tells whether a segment only carries data.
func plain(p []byte) bool { return flags(p)&^onlyLast == header.TCPFlagAck }

// follows tells whether p goes on, so many bytes later, with what first began: they
// differ in what cutting makes different.
func follows(first, p []byte, n int, bytes uint32) bool {
	ip := ipHeader(first)
	if headers(p) != n || ipHeader(p) != ip || !plain(p) || !sameIP(first, p, ip) {
		return false
	}
	a, b := header.TCP(first[ip:n]), header.TCP(p[ip:n])
	const ports, ack, window, options = 4, 8, 14, 20
	return b.SequenceNumber() == a.SequenceNumber()+bytes && string(a[:ports]) == string(b[:ports]) &&
		string(a[ack:ack+4]) == string(b[ack:ack+4]) && string(a[window:window+2]) == string(b[window:window+2]) &&
		string(a[options:]) == string(b[options:])
}

// sameIP compares all but lengths, IPv4's number and sum.
func sameIP(a, b []byte, ip int) bool {
	if ip == ip6Header {
		return string(a[:4]) == string(b[:4]) && string(a[6:ip6Header]) == string(b[6:ip6Header])
	}
	return string(a[:2]) == string(b[:2]) && string(a[6:10]) == string(b[6:10]) && string(a[12:ip4Header]) == string(b[12:ip4Header])
}

// merge makes the first packet's headers those of all of them in one. TCP's checksum
// is nobody's any more: what came through WireGuard needs none.
func merge(packets [][]byte) {
	if len(packets) == 1 {
		return
	}
	first, last := packets[0], packets[len(packets)-1]
	n, ip := headers(first), ipHeader(first)
	total := len(first)
	for _, p := range packets[1:] {
		total += len(p) - n
	}
	header.TCP(first[ip:]).SetFlags(uint8(flags(first) | flags(last)&onlyLast))
	if ip == ip6Header {
		header.IPv6(first).SetPayloadLength(uint16(total - ip6Header))
		return
	}
	h := header.IPv4(first)
	h.SetTotalLength(uint16(total))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
}

// gather is where bytes come from one after the other, over several buffers.
type gather struct {
	bufs [][]byte
	at   int // in the first of them
}

func (g *gather) read(to []byte) {
	for len(to) > 0 && len(g.bufs) > 0 {
		n := copy(to, g.bufs[0][g.at:])
		to = to[n:]
		g.pass(n)
	}
}

func (g *gather) skip(n int) {
	for n > 0 {
		m := min(n, len(g.bufs[0])-g.at)
		n -= m
		g.pass(m)
	}
}

func (g *gather) pass(n int) {
	if g.at += n; g.at == len(g.bufs[0]) {
		g.bufs, g.at = g.bufs[1:], 0
	}
}

// peek reads what is ahead and leaves it there.
func (g gather) peek(to []byte) (n int) {
	for _, b := range g.bufs {
		n += copy(to[n:], b)
	}
	return n
}
