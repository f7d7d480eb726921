package wgchan

import (
	"encoding/binary"
	"math/rand/v2"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// fragment has a packet become fragments, whatever it says of that: its sender is on
// this machine, and its kernel, which sees a link that takes all, sends datagrams as
// large as they are. What has options, or is a fragment, is left as it is.
func (c *cut) fragment(head []byte, mtu int) {
	var frag int // a header of its own
	switch {
	case len(head) >= ip4Header && head[0] == 4<<4|ip4Header/4:
		if h := header.IPv4(head); h.More() || h.FragmentOffset() != 0 {
			return
		}
		c.ip = ip4Header
	case len(head) >= ip6Header && head[0]>>4 == 6 && head[6] == protoUDP:
		c.ip, frag = ip6Header, header.IPv6FragmentHeaderSize
	default:
		return
	}
	c.sumAll()
	c.frag, c.seq, c.id = true, rand.Uint32(), uint16(rand.Uint32())
	c.size, c.left = (mtu-c.ip-frag)&^7, c.total-c.ip
	c.rest.skip(c.ip)
	c.head = c.store[:c.ip+frag]
	if frag != 0 {
		clear(c.head[c.ip:])
		c.head[c.ip] = c.head[6]
		c.head[6] = header.IPv6FragmentHeader
		binary.BigEndian.PutUint32(c.head[c.ip+4:], c.seq)
	}
}

// sumAll makes the sum that is wanted, in the packet's own memory.
func (c *cut) sumAll() {
	if c.sum == 0 || c.sum+2 > len(c.rest.bufs[0]) {
		return
	}
	var s checksum.Checksumer
	s.Add(c.rest.bufs[0][c.from:])
	for _, b := range c.rest.bufs[1:] {
		s.Add(b)
	}
	putSum(c.rest.bufs[0][c.sum:], s.Checksum())
}

// setFragment makes the headers in b those of the fragment that comes after what is done.
func (c *cut) setFragment(b []byte) {
	setLength(b, c.id)
	if c.ip == ip6Header {
		offset := uint16(c.done)
		if c.left > 0 {
			offset |= 1
		}
		binary.BigEndian.PutUint16(b[ip6Header+2:], offset)
		return
	}
	flags := uint8(0)
	if c.left > 0 {
		flags = header.IPv4FlagMoreFragments
	}
	h := header.IPv4(b)
	h.SetFlagsFragmentOffset(flags, uint16(c.done))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
}
