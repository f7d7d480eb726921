package wgchan

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A sign is a packet that no netstack gets to see: it shows that an end lives, how long
// the way takes, and, by its own size, what the path carries. An answer is the same
// packet with the addresses exchanged, so that it has to be carried both ways.
//
// It is of IPv6, with the protocol number that is for experiments (RFC 4727): a kind
// (1 byte), a zero, the MTU that who asks goes by (2), and a time of its own (8).
type sign struct {
	kind byte
	mtu  int // what the other end should go by
	time int64
	size int // of the packet, as it came
}

const (
	protoSign = 253

	signAsk    = 1
	signAnswer = 2

	leastSign = ip6Header + 12
)

// send sends a sign of the given size.
func (l *leg) send(s sign, size int) error {
	p := make([]byte, max(size, leastSign))
	header.IPv6(p).Encode(&header.IPv6Fields{
		PayloadLength:     uint16(len(p) - ip6Header),
		TransportProtocol: protoSign,
		HopLimit:          64,
		SrcAddr:           ipAddress(l.self),
		DstAddr:           ipAddress(l.other),
	})
	p[40], p[41] = s.kind, 0
	binary.BigEndian.PutUint16(p[42:], uint16(s.mtu))
	binary.BigEndian.PutUint64(p[44:], uint64(s.time))
	return l.s.put(l, &cut{total: len(p), rest: gather{bufs: [][]byte{p}}})
}

func ipAddress(a netip.Addr) tcpip.Address { return tcpip.AddrFrom16(a.As16()) }

// sign takes p if it is one. Who is asked goes by the MTU of who asks.
func (l *leg) sign(p []byte) bool {
	if len(p) < leastSign || p[0]>>4 != 6 || p[6] != protoSign {
		return false
	}
	s := sign{p[40], int(binary.BigEndian.Uint16(p[42:])), int64(binary.BigEndian.Uint64(p[44:])), len(p)}
	switch {
	case s.kind == signAsk && l.asked != nil:
		l.asked(s)
		s.kind = signAnswer
		l.send(s, s.size)
	case s.kind == signAnswer && l.answered != nil:
		l.answered(s)
	}
	return true
}
