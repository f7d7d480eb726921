package netstack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	protoICMP   = uint8(header.ICMPv4ProtocolNumber)
	protoICMPv6 = uint8(header.ICMPv6ProtocolNumber)
	protoTCP    = uint8(header.TCPProtocolNumber)
	protoUDP    = uint8(header.UDPProtocolNumber)
	hopLimit    = 64
	maxPacket   = 65535
)

// A packet is what the headers of one say.
type packet struct {
	src, dst netip.Addr
	proto    uint8 // of the transport
	at       int   // where the transport begins
	fragment bool
}

// parse reads the headers at the beginning of a packet. It is false where they
// are not all there, or not as they should be.
func parse(b []byte) (packet, bool) {
	switch header.IPVersion(b) {
	case header.IPv4Version:
		return parse4(b)
	case header.IPv6Version:
		return parse6(b)
	}
	return packet{}, false
}

func parse4(b []byte) (p packet, ok bool) {
	if len(b) < header.IPv4MinimumSize {
		return p, false
	}
	h := header.IPv4(b)
	p = packet{
		src:      netip.AddrFrom4([4]byte(b[12:16])),
		dst:      netip.AddrFrom4([4]byte(b[16:20])),
		proto:    h.Protocol(),
		at:       int(h.HeaderLength()),
		fragment: h.More() || h.FragmentOffset() != 0,
	}
	return p, p.at >= header.IPv4MinimumSize && p.at <= len(b)
}

func parse6(b []byte) (p packet, ok bool) {
	if len(b) < header.IPv6MinimumSize {
		return p, false
	}
	p = packet{
		src:   netip.AddrFrom16([16]byte(b[8:24])),
		dst:   netip.AddrFrom16([16]byte(b[24:40])),
		proto: b[6],
		at:    header.IPv6MinimumSize,
	}
	for extension(p.proto) {
		if len(b) < p.at+8 {
			return p, false
		}
		next, size := b[p.at], 8
		if p.proto == uint8(header.IPv6FragmentHeader) {
			p.fragment = true
		} else {
			size += int(b[p.at+1]) * 8
		}
		p.proto, p.at = next, p.at+size
		if p.fragment {
			break // what follows may be the middle of anything
		}
	}
	return p, p.at <= len(b)
}

// extension tells whether next names a header that another one follows.
func extension(next uint8) bool {
	switch next {
	case uint8(header.IPv6HopByHopOptionsExtHdrIdentifier),
		uint8(header.IPv6RoutingExtHdrIdentifier),
		uint8(header.IPv6FragmentHeader),
		uint8(header.IPv6DestinationOptionsExtHdrIdentifier):
		return true
	}
	return false
}

func (p packet) transport() tcpip.TransportProtocolNumber {
	return tcpip.TransportProtocolNumber(p.proto)
}

// from and to are the ends of a packet with ports.
func (p packet) from(transport []byte) netip.AddrPort {
	return netip.AddrPortFrom(p.src, binary.BigEndian.Uint16(transport))
}

func (p packet) to(transport []byte) netip.AddrPort {
	return netip.AddrPortFrom(p.dst, binary.BigEndian.Uint16(transport[2:]))
}

// endpoint names the one here that a segment or datagram is for.
func (p packet) endpoint(transport []byte) stack.TransportEndpointID {
	return stack.TransportEndpointID{
		LocalAddress: address(p.dst), LocalPort: p.to(transport).Port(),
		RemoteAddress: address(p.src), RemotePort: p.from(transport).Port(),
	}
}

// isSYN tells whether b begins a flow of TCP.
func (p packet) isSYN(b []byte) bool {
	return !p.fragment && p.proto == protoTCP && len(b) >= p.at+header.TCPMinimumSize &&
		header.TCP(b[p.at:]).Flags()&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn
}

// isEcho tells whether b is an ICMP echo request, whole as far as its header.
func (p packet) isEcho(b []byte) bool {
	if p.fragment || len(b) < p.at+header.ICMPv4MinimumSize {
		return false
	}
	return p.proto == protoICMP && b[p.at] == byte(header.ICMPv4Echo) ||
		p.proto == protoICMPv6 && b[p.at] == byte(header.ICMPv6EchoRequest)
}

// generalize has an ICMP message say what gVisor listens to, where it says more exactly
// why something is unreachable: a port, of flows of UDP, and else of IPv6 a network.
func (p packet) generalize(b []byte) {
	const quoted = 8 // is where the quote begins
	six := p.proto == protoICMPv6
	if p.fragment || !six && p.proto != protoICMP || len(b) < p.at+quoted+header.IPv4MinimumSize {
		return
	}
	msg := b[p.at:]
	kind, transport, port, network := byte(header.ICMPv4DstUnreachable), msg[quoted+9], byte(header.ICMPv4PortUnreachable), msg[1]
	if six {
		kind, transport, port, network = byte(header.ICMPv6DstUnreachable), msg[quoted+6], byte(header.ICMPv6PortUnreachable), byte(header.ICMPv6NetworkUnreachable)
	}
	if tooBig := !six && msg[1] == byte(header.ICMPv4FragmentationNeeded); msg[0] != kind || msg[1] == port || tooBig {
		return
	}
	code := network
	if transport == protoUDP {
		code = port
	}
	sum := ^binary.BigEndian.Uint16(msg[2:]) // RFC 1624
	sum = checksum.Combine(checksum.Combine(sum, ^uint16(msg[1])), uint16(code))
	binary.BigEndian.PutUint16(msg[2:], ^sum)
	msg[1] = code
}

// A quote is as much of a packet as an ICMP error about it must repeat.
type quote struct {
	src, dst netip.Addr
	proto    uint8
	head     [8]byte // of the transport header
}

// unreachable returns the packet that says that q did not arrive, and why.
func (q quote) unreachable(v verdict) []byte {
	if q.dst.Is4() {
		return q.unreachable4(v.code4)
	}
	return q.unreachable6(v.code6)
}

func (q quote) unreachable4(code header.ICMPv4Code) []byte {
	msg := make([]byte, header.ICMPv4MinimumSize, 64)
	h := header.ICMPv4(msg)
	h.SetType(header.ICMPv4DstUnreachable)
	h.SetCode(code)
	msg = append(msg, ip4(q.src, q.dst, q.proto, len(q.head))...)
	msg = append(msg, q.head[:]...)
	return icmpPacket(q.dst, q.src, msg)
}

func (q quote) unreachable6(code header.ICMPv6Code) []byte {
	msg := make([]byte, header.ICMPv6DstUnreachableMinimumSize, 64)
	h := header.ICMPv6(msg)
	h.SetType(header.ICMPv6DstUnreachable)
	h.SetCode(code)
	msg = append(msg, ip6(q.src, q.dst, q.proto, len(q.head))...)
	msg = append(msg, q.head[:]...)
	return icmpPacket(q.dst, q.src, msg)
}

// icmpPacket puts msg, of the family's ICMP, into a packet and sums it.
func icmpPacket(src, dst netip.Addr, msg []byte) []byte {
	sum := msg[2:4]
	clear(sum)
	if dst.Is4() {
		binary.BigEndian.PutUint16(sum, ^checksum.Checksum(msg, 0))
		return append(ip4(src, dst, protoICMP, len(msg)), msg...)
	}
	pseudo := header.PseudoHeaderChecksum(header.ICMPv6ProtocolNumber, address(src), address(dst), uint16(len(msg)))
	binary.BigEndian.PutUint16(sum, ^checksum.Checksum(msg, pseudo))
	return append(ip6(src, dst, protoICMPv6, len(msg)), msg...)
}

// ip4 returns the header for a payload of that size.
func ip4(src, dst netip.Addr, proto uint8, size int) []byte {
	h := header.IPv4(make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+size))
	h.Encode(&header.IPv4Fields{
		TotalLength: uint16(header.IPv4MinimumSize + size),
		TTL:         hopLimit,
		Protocol:    proto,
		SrcAddr:     address(src),
		DstAddr:     address(dst),
	})
	h.SetChecksum(^h.CalculateChecksum())
	return h
}

// ip6 returns the header for a payload of that size.
func ip6(src, dst netip.Addr, proto uint8, size int) []byte {
	h := header.IPv6(make([]byte, header.IPv6MinimumSize, header.IPv6MinimumSize+size))
	h.Encode(&header.IPv6Fields{
		PayloadLength:     uint16(size),
		TransportProtocol: tcpip.TransportProtocolNumber(proto),
		HopLimit:          hopLimit,
		SrcAddr:           address(src),
		DstAddr:           address(dst),
	})
	return h
}

func address(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func fromAddress(a tcpip.Address) netip.Addr {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return ip
}
