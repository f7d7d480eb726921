package wgchan

import (
	"bytes"
	"encoding/binary"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// segment is one of TCP as a netstack sends it, and what is left to do on it.
func segment(six bool, payload []byte, mss, options int, flags header.TCPFlags) (vnet, packet []byte) {
	ip := ip4Header
	if six {
		ip = ip6Header
	}
	n := header.TCPMinimumSize + options
	packet = append(make([]byte, ip+n), payload...)
	src, dst := tcpip.AddrFrom4([4]byte{10, 0, 0, 1}), tcpip.AddrFrom4([4]byte{10, 0, 0, 2})
	if six {
		src, dst = tcpip.AddrFrom16([16]byte{0xfd, 15: 1}), tcpip.AddrFrom16([16]byte{0xfd, 15: 2})
		header.IPv6(packet).Encode(&header.IPv6Fields{PayloadLength: uint16(n + len(payload)), TransportProtocol: header.TCPProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst})
	} else {
		h := header.IPv4(packet)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(packet)), TTL: 64, Protocol: protoTCP, ID: 7, SrcAddr: src, DstAddr: dst})
		h.SetChecksum(^h.CalculateChecksum())
	}
	tcp := header.TCP(packet[ip:])
	tcp.Encode(&header.TCPFields{SrcPort: 1000, DstPort: 80, SeqNum: 1<<32 - 5000, AckNum: 9, DataOffset: uint8(n), Flags: flags, WindowSize: 500})
	for i := range options {
		tcp[header.TCPMinimumSize+i] = header.TCPOptionNOP
	}
	tcp.SetChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(tcp))))
	vnet = make([]byte, vnetHeader)
	vnet[0], vnet[1] = 1, 1
	binary.NativeEndian.PutUint16(vnet[4:], uint16(mss))
	binary.NativeEndian.PutUint16(vnet[6:], uint16(ip))
	binary.NativeEndian.PutUint16(vnet[8:], header.TCPChecksumOffset)
	if len(payload) <= mss {
		vnet[1] = 0
	}
	return vnet, packet
}

func summed(p []byte) bool {
	ip := ipHeader(p)
	src, dst := addresses(p)
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(p)-ip))
	return checksum.Checksum(p[ip:], sum) == 0xffff && (ip == ip6Header || header.IPv4(p).IsChecksumValid())
}

// FuzzCut: a segment comes out as it went in, in packets of which each is right, and
// none larger than the path carries.
func FuzzCut(f *testing.F) {
	f.Add(uint16(60000), uint16(1380), uint16(1440), true, true, byte(12), uint16(100))
	f.Add(uint16(1381), uint16(1380), uint16(1200), false, false, byte(0), uint16(20))
	f.Add(uint16(0), uint16(1), uint16(1440), false, true, byte(40), uint16(0))
	f.Fuzz(func(t *testing.T, size, mss, mtu uint16, six, fin bool, options byte, split uint16) {
		size, mss, mtu, options = min(size, 65000), max(mss, 400), max(mtu, leastMTU), options%41&^3
		payload := make([]byte, size)
		for i := range payload {
			payload[i] = byte(i * 31)
		}
		flags := header.TCPFlagAck | header.TCPFlagPsh
		if fin {
			flags |= header.TCPFlagFin
		}
		vnet, packet := segment(six, payload, int(mss), int(options), flags)
		at := min(int(split), len(packet))
		c := newCut(vnet, [][]byte{packet[:at], packet[at:]}, int(mtu))
		var packets [][]byte
		for more := true; more; {
			b := make([]byte, maxPacket)
			var n int
			n, more = c.next(b)
			packets = append(packets, b[:n])
		}
		for i, p := range packets {
			if !summed(p) || len(p) > int(mtu) && len(packets) > 1 {
				t.Fatalf("packet %d of %d, %d bytes, is wrong", i, len(packets), len(p))
			}
		}
		if n := mergeable(packets); n != len(packets) {
			t.Fatalf("%d of %d packets are seen to be one", n, len(packets))
		}
		merge(packets)
		got := append([]byte(nil), packets[0]...)
		for _, p := range packets[1:] {
			got = append(got, p[headers(p):]...)
		}
		ip := ipHeader(packet)
		clear(got[ip+header.TCPChecksumOffset:][:2])
		clear(packet[ip+header.TCPChecksumOffset:][:2])
		if !bytes.Equal(got, packet) {
			t.Fatalf("%d bytes went in, %d came out", len(packet), len(got))
		}
	})
}

// FuzzMergeable: whatever comes, nothing is read that is not there.
func FuzzMergeable(f *testing.F) {
	_, p := segment(false, []byte("payload"), 1380, 0, header.TCPFlagAck)
	f.Add(p, p)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a) == 0 || len(b) == 0 {
			return
		}
		packets := [][]byte{a, b}
		merge(packets[:mergeable(packets)])
		source(a)
		l := newLeg(newSeam(), farAddress, farAddress)
		l.sign(a)
	})
}

// TestNotMergeable: what is not the same flow's next is left alone.
func TestNotMergeable(t *testing.T) {
	payload := make([]byte, 4000)
	cut := func() (packets [][]byte) {
		vnet, p := segment(false, payload, 1000, 12, header.TCPFlagAck)
		c := newCut(vnet, [][]byte{p}, 1440)
		for more := true; more; {
			b := make([]byte, maxPacket)
			var n int
			n, more = c.next(b)
			packets = append(packets, b[:n])
		}
		return packets
	}
	for name, change := range map[string]func(p []byte){
		"port":     func(p []byte) { p[ip4Header]++ },
		"address":  func(p []byte) { p[15]++ },
		"sequence": func(p []byte) { p[ip4Header+7]++ },
		"ack":      func(p []byte) { p[ip4Header+11]++ },
		"window":   func(p []byte) { p[ip4Header+15]++ },
		"option":   func(p []byte) { p[ip4Header+20]++ },
		"reset":    func(p []byte) { p[ip4Header+13] |= byte(header.TCPFlagRst) },
		"fragment": func(p []byte) { p[6] |= 0x20 },
		"udp":      func(p []byte) { p[9] = 17 },
		"ttl":      func(p []byte) { p[8]-- },
	} {
		packets := cut()
		if n := mergeable(packets); n != 4 {
			t.Fatalf("%d of 4 are one", n)
		}
		change(packets[2])
		if n := mergeable(packets); n != 2 {
			t.Errorf("another %s: %d are one, want 2", name, n)
		}
	}
}
