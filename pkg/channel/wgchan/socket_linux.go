package wgchan

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

// A socket sends and receives many packets with one call, and those that follow each
// other as one large one (UDP_SEGMENT, UDP_GRO).
type socket struct {
	conn  *net.UDPConn
	batch *ipv4.PacketConn // of either family
	gso   atomic.Bool
	pool  sync.Pool // of messages to send

	in             []ipv4.Message // what is read into
	many, next, at int            // messages read; the next one, and where in it
	from           conn.Endpoint  // of that
	size           int            // of the packets in that
}

const (
	readAtOnce = 8 // of up to 64 KiB

	// What the kernel takes as one.
	mostSegments = 64
	mostTogether = maxPacket - ip6Header - 8
)

// prepare makes a socket one of both families, whose packets arrive whole or not at
// all, whatever is known of the path.
func prepare(c syscall.RawConn) {
	c.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
	})
}

func newSocket(c *net.UDPConn) *socket {
	s := &socket{conn: c, batch: ipv4.NewPacketConn(c), in: make([]ipv4.Message, readAtOnce)}
	for i := range s.in {
		s.in[i].Buffers = [][]byte{make([]byte, maxPacket)}
		s.in[i].OOB = make([]byte, unix.CmsgSpace(4))
	}
	s.pool.New = func() any { return &outgoing{} }
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer)
			unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1)
			_, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT)
			s.gso.Store(err == nil)
		})
	}
	return s
}

// receive hands packets on, of one call after the other.
func (s *socket) receive(packets [][]byte, sizes []int, from []conn.Endpoint) (n int, err error) {
	if s.next == s.many {
		s.next = 0
		if s.many, err = s.batch.ReadBatch(s.in, 0); err != nil {
			s.many = 0
			return 0, err
		}
		s.begin()
	}
	for ; n < len(packets) && s.next < s.many; n++ {
		m := &s.in[s.next]
		sizes[n] = copy(packets[n], m.Buffers[0][s.at:min(s.at+s.size, m.N)])
		from[n] = s.from
		if s.at += s.size; s.at >= m.N {
			s.next++
			s.begin()
		}
	}
	return n, nil
}

// begin turns to the next message.
func (s *socket) begin() {
	if s.at = 0; s.next == s.many {
		return
	}
	m := &s.in[s.next]
	at := m.Addr.(*net.UDPAddr).AddrPort()
	s.from = endpoint{netip.AddrPortFrom(at.Addr().Unmap(), at.Port())}
	s.size = max(segmentSize(m.OOB[:m.NN], m.N), 1)
}

// segmentSize is how large the packets are that the kernel has put together.
func segmentSize(control []byte, whole int) int {
	if len(control) == 0 {
		return whole
	}
	h, data, _, err := unix.ParseOneSocketControlMessage(control)
	if err != nil || h.Level != unix.IPPROTO_UDP || h.Type != unix.UDP_GRO || len(data) < 2 {
		return whole
	}
	return int(binary.NativeEndian.Uint16(data))
}

// outgoing is a call's messages.
type outgoing struct {
	messages [batchSize]ipv4.Message
	control  [batchSize][]byte
	buffers  [batchSize][]byte
}

// send sends packets to one address. What the path does not take is lost there.
func (s *socket) send(packets [][]byte, to netip.AddrPort) error {
	o := s.pool.Get().(*outgoing)
	defer s.pool.Put(o)
	var first error
	for len(packets) > 0 {
		n := min(len(packets), batchSize)
		if err := s.sendBatch(o, packets[:n], to); err != nil && first == nil {
			first = err
		}
		packets = packets[n:]
	}
	return first
}

func (s *socket) sendBatch(o *outgoing, packets [][]byte, to netip.AddrPort) error {
	messages := o.fill(packets, net.UDPAddrFromAddrPort(to), s.gso.Load())
	var first error
	for len(messages) > 0 {
		n, err := s.batch.WriteBatch(messages, 0)
		if errors.Is(err, unix.EIO) && s.gso.Swap(false) { // the link cannot sum what it would cut
			return s.sendBatch(o, packets, to)
		}
		if err != nil {
			if first == nil {
				first = err
			}
			n = 1
		}
		messages = messages[n:]
	}
	return first
}

// fill makes messages of packets, and one of those that are of the same size but for
// the last.
func (o *outgoing) fill(packets [][]byte, to net.Addr, gso bool) []ipv4.Message {
	n := 0
	copy(o.buffers[:], packets)
	for at := 0; at < len(packets); n++ {
		end := at + 1
		if gso {
			end = at + together(packets[at:])
		}
		o.messages[n] = ipv4.Message{Buffers: o.buffers[at:end], Addr: to}
		if end-at > 1 {
			o.messages[n].OOB = segmented(&o.control[n], len(packets[at]))
		}
		at = end
	}
	return o.messages[:n]
}

// together is how many of the packets, from the first on, the kernel takes as one.
func together(packets [][]byte) int {
	size, total := len(packets[0]), len(packets[0])
	for i, p := range packets[1:] {
		if total += len(p); len(p) > size || total > mostTogether || i+1 == mostSegments {
			return i + 1
		}
		if len(p) < size {
			return i + 2
		}
	}
	return len(packets)
}

// segmented is the control message that tells the size of a packet.
func segmented(b *[]byte, size int) []byte {
	if *b == nil {
		*b = make([]byte, unix.CmsgSpace(2))
		h := (*unix.Cmsghdr)(unsafe.Pointer(&(*b)[0]))
		h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
		h.SetLen(unix.CmsgLen(2))
	}
	binary.NativeEndian.PutUint16((*b)[unix.CmsgLen(0):], uint16(size))
	return *b
}
