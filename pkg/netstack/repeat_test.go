package netstack

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// ackPacket is an acknowledgement with options, in a packet of IPv4.
func ackPacket(ack uint32, window uint16, options ...byte) []byte {
	tcp := header.TCP(make([]byte, header.TCPMinimumSize+len(options)))
	tcp.Encode(&header.TCPFields{SrcPort: 1, DstPort: 2, AckNum: ack, DataOffset: uint8(len(tcp)), Flags: header.TCPFlagAck, WindowSize: window})
	copy(tcp[header.TCPMinimumSize:], options)
	return append(ip4(netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), protoTCP, len(tcp)), tcp...)
}

var sack = []byte{header.TCPOptionNOP, header.TCPOptionNOP, header.TCPOptionSACK, 10, 0, 0, 0, 1, 0, 0, 0, 2}

func TestRepeats(t *testing.T) {
	r := repeats{}
	for i, step := range []struct {
		ack          uint32
		window, want uint16
		options      []byte
	}{
		{1, 100, 100, nil},
		{1, 120, 120, nil},  // says only that there is more room
		{2, 120, 120, sack}, // the first of a loss
		{2, 140, 120, sack},
		{2, 160, 120, sack},
		{2, 90, 90, sack}, // less is not to be hidden
		{2, 95, 90, sack},
		{3, 200, 200, sack}, // another loss
		{3, 210, 200, sack},
		{4, 220, 220, nil},
		{4, 0, 0, sack},
		{4, 230, 230, sack}, // nor that it's open again
	} {
		b := ackPacket(step.ack, step.window, step.options...)
		p, ok := parse(b)
		if !ok {
			t.Fatal("not parsed")
		}
		r.hold(p, b)
		if got := header.TCP(b[p.at:]).WindowSize(); got != step.want {
			t.Errorf("step %d: window %d, want %d", i, got, step.want)
		}
	}
	b := ackPacket(5, 1)
	p, _ := parse(b)
	r.hold(p, b)
	if len(r) != 0 {
		t.Errorf("%d flows are kept when nothing is lost any more", len(r))
	}
}

func FuzzRepeats(f *testing.F) {
	f.Add(ackPacket(1, 2, sack...))
	f.Add(ackPacket(1, 2, header.TCPOptionNOP, header.TCPOptionSACK, 1, 0))
	r := repeats{}
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, ok := parse(b); ok {
			r.hold(p, b[:min(len(b), headLen)])
		}
	})
}
