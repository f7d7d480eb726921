package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The test is the program, in its roles, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && roles[os.Args[1]] != nil {
		os.Args[0] = "bench"
		main()
		return
	}
	os.Exit(m.Run())
}

const vnet = 10 // bytes of the virtio-net header

// segmentable is an unsegmented packet as the kernel hands it over.
func segmentable(payload []byte, size int) []byte {
	p := make([]byte, vnet+header.IPv4MinimumSize+header.TCPMinimumSize, vnet+40+len(payload))
	p = append(p, payload...)
	p[gsoType] = unix.VIRTIO_NET_HDR_GSO_TCPV4
	binary.NativeEndian.PutUint16(p[gsoSize:], uint16(size))
	ip := header.IPv4(p[vnet:])
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(ip)), ID: 7, TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: tcpip.AddrFrom4([4]byte{10, 0, 0, 1}), DstAddr: tcpip.AddrFrom4([4]byte{10, 0, 0, 2})})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.TCP(ip.Payload()).Encode(&header.TCPFields{SrcPort: 1, DstPort: 2, SeqNum: 1000, DataOffset: header.TCPMinimumSize,
		Flags: header.TCPFlagAck | header.TCPFlagPsh | header.TCPFlagFin})
	return p
}

// What is left of a packet are its other segments, at their places.
func TestSurvivors(t *testing.T) {
	payload := make([]byte, 10*100-30) // the last is short
	for i := range payload {
		payload[i] = byte(i)
	}
	for _, lost := range []string{"", "0", "9", "4", "0 1 2", "3 5 9", "0 1 2 3 4 5 6 7 8 9"} {
		want := bytes.Clone(payload)
		n, missing := 0, 0
		for i := range 10 {
			if strings.Contains(lost, fmt.Sprint(i)) {
				at := want[i*100 : min((i+1)*100, len(want))]
				clear(at)
				missing += len(at)
			}
		}
		left := survivors(segmentable(payload, 100), vnet, func() bool {
			n++
			return strings.Contains(lost, fmt.Sprint(n-1))
		})
		got := make([]byte, len(payload))
		for _, p := range left {
			missing += putPiece(t, got, p)
		}
		if !bytes.Equal(got, want) || n != 10 || missing != len(payload) {
			t.Errorf("lost %q: %d pieces, %d dice, %d bytes of %d", lost, len(left), n, missing, len(payload))
		}
	}
}

// putPiece checks a piece, puts its payload to its place and tells how long it is.
func putPiece(t *testing.T, got, p []byte) int {
	t.Helper()
	ip := header.IPv4(p[vnet:])
	tcp := header.TCP(ip.Payload())
	if !ip.IsValid(len(ip)) || !ip.IsChecksumValid() {
		t.Errorf("no valid packet: %x", p[:vnet+40])
	}
	at := int(tcp.SequenceNumber() - 1000)
	data := tcp.Payload()
	last := at+len(data) == len(got)
	if (tcp.Flags()&header.TCPFlagFin != 0) != last {
		t.Errorf("FIN on the piece from %d to %d", at, at+len(data))
	}
	if one := len(data) <= 100; one != (p[gsoType] == unix.VIRTIO_NET_HDR_GSO_NONE) {
		t.Errorf("%d bytes are to be segmented: %v", len(data), !one)
	}
	if int(ip.ID()) != 7+at/100 {
		t.Errorf("ID %d at %d", ip.ID(), at)
	}
	copy(got[at:], data)
	return len(data)
}

// Whoever segments completes the checksum that cut leaves: it is the pseudo
// header's, and right for the new length.
func TestCutChecksum(t *testing.T) {
	u := unsegmented{segmentable(bytes.Repeat([]byte("culvert"), 100), 100), vnet}
	ip := header.IPv4(u.cut(2, 4)[vnet:])
	tcp := header.TCP(ip.Payload())
	tcp.SetChecksum(^checksum.Checksum(tcp, 0))
	if !tcp.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), checksum.Checksum(tcp.Payload(), 0), uint16(len(tcp.Payload()))) {
		t.Error("the checksum is wrong")
	}
}

func TestRate(t *testing.T) {
	now := time.Now()
	c := condition{Rate: 8} // a byte takes a microsecond
	if gone := c.gone(now.Add(-time.Second), now, 1000); gone != now.Add(time.Millisecond) {
		t.Error("an idle link:", gone.Sub(now))
	}
	if gone := c.gone(now.Add(time.Second), now, 1000); gone != now.Add(1001*time.Millisecond) {
		t.Error("a busy link:", gone.Sub(now))
	}
	if gone := (condition{}).gone(time.Time{}, now, 1000); gone != now {
		t.Error("a link without a rate:", gone.Sub(now))
	}
}

// On real hosts with a real relay between them.
func TestLink(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("must be root, for network namespaces")
	}
	if err := missing([]path{{needs: []string{"iperf3"}}}); err != nil {
		t.Skip(err)
	}
	defer goleak.VerifyNone(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	end, err := guarded(self)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := end(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(netnsDir + laptop); !os.IsNotExist(err) {
			t.Error("a host was left:", err)
		}
	}()
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(build(), writeKeys()); err != nil {
		t.Fatal(err)
	}
	server, err := start(host(service), "serve", self, "serve")
	if err != nil {
		t.Fatal(err)
	}
	defer server.stop()
	for _, s := range []string{"0", "40ms", "40ms/2%", "40ms/5~/100M"} {
		t.Run(s, func(t *testing.T) { testLink(t, self, s) })
	}
}

func testLink(t *testing.T, self, s string) {
	c, err := parseCondition(s)
	if err != nil {
		t.Fatal(err)
	}
	l, err := openLink(t.Context(), self, c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.close(); err != nil {
			t.Error(err)
		}
	}()
	b := &bench{self: self, seconds: 1, service: host(service)}
	for _, p := range []path{{name: "TCP", open: openDirect("")}, {name: "UDP", open: openCulvert("wireguard", "")}} {
		o := outcome{Figures: map[string][]float64{}}
		if err := b.visit(t.Context(), p, []probe{small[0], settled[0]}, &o); err != nil {
			t.Fatalf("%s: %v", p.name, err)
		}
		p50, up := median(o.Figures["p50"])/1e6, median(o.Figures["up1"])*1000
		rtt := c.RTT.Seconds()
		if p50 < rtt || p50 > rtt+0.02 {
			t.Errorf("%s: answers take %.3f s", p.name, p50)
		}
		if c.Rate > 0 && up > c.Rate || up <= 0 {
			t.Errorf("%s: %.0f Mbit/s", p.name, up)
		}
	}
	if err := l.alive(); err != nil {
		t.Error(err)
	}
}
