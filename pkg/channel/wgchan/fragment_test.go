package wgchan

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// datagramPacket is one of UDP as a kernel hands it over: with the sum of the pseudo header only.
func datagramPacket(six bool, payload []byte) (vnet, packet []byte) {
	ip, size := ip4Header, header.UDPMinimumSize+len(payload)
	src, dst := tcpip.AddrFrom4([4]byte{10, 0, 0, 1}), tcpip.AddrFrom4([4]byte{10, 0, 0, 2})
	if six {
		ip, src, dst = ip6Header, tcpip.AddrFrom16([16]byte{0xfd, 15: 1}), tcpip.AddrFrom16([16]byte{0xfd, 15: 2})
	}
	packet = append(make([]byte, ip+header.UDPMinimumSize), payload...)
	if six {
		header.IPv6(packet).Encode(&header.IPv6Fields{PayloadLength: uint16(size), TransportProtocol: header.UDPProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst})
	} else {
		h := header.IPv4(packet)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(packet)), TTL: 64, Protocol: protoUDP, Flags: header.IPv4FlagDontFragment, SrcAddr: src, DstAddr: dst})
		h.SetChecksum(^h.CalculateChecksum())
	}
	udp := header.UDP(packet[ip:])
	udp.Encode(&header.UDPFields{SrcPort: 1000, DstPort: 53, Length: uint16(size)})
	udp.SetChecksum(header.PseudoHeaderChecksum(header.UDPProtocolNumber, src, dst, uint16(size)))
	vnet = make([]byte, vnetHeader)
	vnet[0] = 1
	binary.NativeEndian.PutUint16(vnet[6:], uint16(ip))
	binary.NativeEndian.PutUint16(vnet[8:], 6)
	return vnet, packet
}

// TestFragments: they are what the datagram was, summed, and none larger than the path carries.
func TestFragments(t *testing.T) {
	for _, six := range []bool{false, true} {
		for _, size := range []int{0, 1, 1171, 1172, 1173, 1399, 4000, 65487} {
			payload := make([]byte, size)
			rand.Read(payload)
			vnet, packet := datagramPacket(six, payload)
			at := min(len(packet), mostHeaders)
			c := newCut(vnet, [][]byte{packet[:at], packet[at:]}, leastMTU)
			want, whole := c.packets(), []byte(nil)
			var got int
			for more := true; more; got++ {
				b := make([]byte, maxPacket)
				var n int
				n, more = c.next(b)
				if n > leastMTU {
					t.Fatalf("a fragment of %d bytes", n)
				}
				head, offset := ip4Header, 0
				if six {
					head = ip6Header
					if b[6] == header.IPv6FragmentHeader {
						head += header.IPv6FragmentHeaderSize
						offset = int(binary.BigEndian.Uint16(b[ip6Header+2:]) &^ 7)
					}
				} else {
					offset = int(header.IPv4(b).FragmentOffset())
					if !header.IPv4(b[:n]).IsChecksumValid() {
						t.Error("IP is not summed")
					}
				}
				if offset != len(whole) {
					t.Errorf("a fragment from %d, want %d", offset, len(whole))
				}
				whole = append(whole, b[head:n]...)
			}
			src, dst := addresses(packet)
			sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, src, dst, uint16(len(whole)))
			if got != want || !bytes.Equal(whole[header.UDPMinimumSize:], payload) || checksum.Checksum(whole, sum) != 0xffff {
				t.Errorf("%d bytes, six %v: in %d of %d fragments, %d bytes", size, six, got, want, len(whole))
			}
		}
	}
}
