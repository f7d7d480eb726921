package wgchan

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// packets are those that go between this machine's kernel and the far end's netstack:
// by the leg of the near end's own netstack, but from and to other addresses.
type packets struct {
	*leg
	w *wire
}

var _ channel.Carrier = (*Channel)(nil)

// Packets are carried from the addresses that Config names.
func (c *Channel) Packets(netip.Addr) channel.Packets { return packets{c.t.sole, c.w} }

func (p packets) Send(bufs [][]byte) bool {
	from, ok := source(bufs[1])
	if !ok || !slices.Contains(p.outer, from) || p.w.Line.Cause() != nil {
		return false
	}
	p.Writev(bufs)
	return true
}

func (p packets) Count(more int)        { p.w.Count(more) }
func (p packets) Done() <-chan struct{} { return p.w.Context().Done() }

func (p packets) Receive(f func(bufs [][]byte)) { p.out.Store(&f) }

// toOuter tells whether a packet is for this machine's kernel.
func (l *leg) toOuter(packet []byte) bool {
	var to netip.Addr
	if len(l.outer) == 0 || len(packet) < ip4Header {
		return false
	}
	if packet[0]>>4 == 4 {
		to = netip.AddrFrom4([4]byte(packet[16:20]))
	} else if len(packet) >= ip6Header {
		to = netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return slices.Contains(l.outer, to)
}

// handOut gives the kernel a packet: the first, with the payload of the others.
func (l *leg) handOut(packets [][]byte) {
	f := l.out.Load()
	if f == nil {
		return
	}
	hdr := joined(packets)
	bufs := make([][]byte, 0, 1+len(packets))
	bufs = append(bufs, hdr[:], packets[0])
	for _, p := range packets[1:] {
		bufs = append(bufs, p[headers(p):])
	}
	(*f)(bufs)
}

// joined tells the kernel how large the segments were that are one now. It need not sum
// what came through WireGuard, if it has the sum of the pseudo header.
func joined(packets [][]byte) (hdr [vnetHeader]byte) {
	if len(packets) == 1 {
		return hdr
	}
	const needsCsum, tcp4, tcp6 = 1, 1, 4
	first := packets[0]
	n, ip := headers(first), ipHeader(first)
	total := len(first) - ip
	for _, p := range packets[1:] {
		total += len(p) - n
	}
	hdr[0], hdr[1] = needsCsum, tcp4
	if ip == ip6Header {
		hdr[1] = tcp6
	}
	binary.NativeEndian.PutUint16(hdr[2:], uint16(n))
	binary.NativeEndian.PutUint16(hdr[4:], uint16(len(first)-n))
	binary.NativeEndian.PutUint16(hdr[6:], uint16(ip))
	binary.NativeEndian.PutUint16(hdr[8:], header.TCPChecksumOffset)
	src, dst := addresses(first)
	header.TCP(first[ip:]).SetChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(total)))
	return hdr
}
