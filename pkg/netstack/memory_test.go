package netstack_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/netstack"
)

// A pipe is a Device whose other side is the test.
type pipe struct {
	in, out chan []byte
	done    chan struct{}
	once    sync.Once
}

func newPipe() *pipe {
	return &pipe{in: make(chan []byte), out: make(chan []byte, 1000), done: make(chan struct{})}
}

func (p *pipe) HeaderLen() int { return 0 }

func (p *pipe) Readv(bufs [][]byte) (n int, err error) {
	select {
	case b := <-p.in:
		for _, buf := range bufs {
			m := copy(buf, b)
			n, b = n+m, b[m:]
		}
		return n, nil
	case <-p.done:
		return 0, net.ErrClosed
	}
}

func (p *pipe) Writev(bufs [][]byte) (int, error) {
	var b []byte
	for _, buf := range bufs {
		b = append(b, buf...)
	}
	select {
	case p.out <- b:
	default:
	}
	return len(b), nil
}

func (p *pipe) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

// gate is a Network that takes its time.
type gate struct {
	channel.Network
	entered chan struct{}
	open    chan struct{}
	left    chan error
}

func (g *gate) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	g.entered <- struct{}{}
	select {
	case <-g.open:
		return g.Network.DialContext(ctx, network, address)
	case <-ctx.Done():
		g.left <- ctx.Err()
		return nil, ctx.Err()
	}
}

func newGate(n channel.Network) *gate {
	return &gate{n, make(chan struct{}, 100), make(chan struct{}), make(chan error, 100)}
}

// until waits for what has no event of its own.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// failing is a Network on which every dial fails in the same way.
type failing struct{ err error }

func (f failing) DialContext(context.Context, string, string) (net.Conn, error) { return nil, f.err }

func (f failing) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

var (
	app4, app6 = netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd63:756c:7665:7274::1")
	srv4, srv6 = netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:10:96::10")
)

// packetOf puts a transport header and what follows into a packet.
func packetOf(src, dst netip.Addr, proto uint8, body []byte) []byte {
	if dst.Is4() {
		h := header.IPv4(make([]byte, 20))
		h.Encode(&header.IPv4Fields{TotalLength: uint16(20 + len(body)), TTL: 64, Protocol: proto,
			SrcAddr: tcpip.AddrFromSlice(src.AsSlice()), DstAddr: tcpip.AddrFromSlice(dst.AsSlice())})
		h.SetChecksum(^h.CalculateChecksum())
		return append(h, body...)
	}
	h := header.IPv6(make([]byte, 40))
	h.Encode(&header.IPv6Fields{PayloadLength: uint16(len(body)), HopLimit: 64, TransportProtocol: tcpip.TransportProtocolNumber(proto),
		SrcAddr: tcpip.AddrFromSlice(src.AsSlice()), DstAddr: tcpip.AddrFromSlice(dst.AsSlice())})
	return append(h, body...)
}

func segment(seq uint32, flags header.TCPFlags) []byte {
	h := header.TCP(make([]byte, 20))
	h.Encode(&header.TCPFields{SrcPort: 40000, DstPort: 80, SeqNum: seq, DataOffset: 20, Flags: flags, WindowSize: 65535})
	return h
}

func datagram(port uint16, payload string) []byte {
	h := header.UDP(make([]byte, 8))
	h.Encode(&header.UDPFields{SrcPort: 40000, DstPort: port, Length: uint16(8 + len(payload))})
	return append(h, payload...)
}

func echo(kind byte, payload string) []byte {
	return append([]byte{kind, 0, 0, 0, 0x12, 0x34, 0, 7}, payload...)
}

func onPipe(t testing.TB, cfg netstack.Config) (*pipe, *netstack.Stack) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	p := newPipe()
	cfg.Device, cfg.MTU = p, 1500
	s, err := netstack.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		goleak.VerifyNone(t, before)
	})
	return p, s
}

func (p *pipe) next(t testing.TB) []byte {
	t.Helper()
	select {
	case b := <-p.out:
		return b
	case <-time.After(10 * time.Second):
		t.Fatal("no packet in 10 s")
		return nil
	}
}

// TestVerdicts reads the very packets that tell an app of a failed dial.
func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		err          error
		rst, silent  bool
		code4, code6 byte
	}{
		{err: syscall.ECONNREFUSED, rst: true, code4: 3, code6: 4},
		{err: syscall.EHOSTUNREACH, code4: 1, code6: 3},
		{err: syscall.ENETUNREACH, code4: 0, code6: 0},
		{err: syscall.EACCES, code4: 13, code6: 1},
		{err: &net.OpError{Op: "dial", Err: syscall.EPERM}, code4: 13, code6: 1},
		{err: net.ErrClosed, code4: 0, code6: 0},
		{err: errors.New("what else there may be"), code4: 1, code6: 3},
		{err: syscall.ETIMEDOUT, silent: true},
		{err: context.DeadlineExceeded, silent: true},
	} {
		p, s := onPipe(t, netstack.Config{Network: failing{c.err}})
		for _, q := range [][]byte{
			packetOf(app4, srv4, 6, segment(77, header.TCPFlagSyn)), packetOf(app6, srv6, 6, segment(77, header.TCPFlagSyn)),
			packetOf(app4, srv4, 17, datagram(9, "hello")), packetOf(app6, srv6, 17, datagram(9, "hello")),
			packetOf(app4, srv4, 1, echo(8, "hello")), packetOf(app6, srv6, 58, echo(128, "hello")),
		} {
			before := failures(s)
			p.in <- q
			until(t, "the dial fails", func() bool { return failures(s) > before })
			if c.silent {
				continue
			}
			code4, code6 := c.code4, c.code6
			if isPing := q[9] == 1 || q[6] == 58; isPing && c.rst {
				code4, code6 = 1, 3
			}
			checkTold(t, c.err, q, p.next(t), c.rst, code4, code6)
		}
		if c.silent && len(p.out) > 0 {
			t.Errorf("%v: the app is told % x", c.err, <-p.out)
		}
	}
}

func failures(s *netstack.Stack) uint64 {
	st := s.Stats()
	return st.TCP.DialFailures + st.UDP.DialFailures + st.Ping.DialFailures
}

// checkTold: b is the answer to q, a RST or the ICMP message.
func checkTold(t *testing.T, err error, q, b []byte, rst bool, code4, code6 byte) {
	t.Helper()
	at, src, dst, proto := 20, 12, 16, b[9]
	if q[0]>>4 == 6 {
		at, src, dst, proto = 40, 8, 24, b[6]
	}
	size := dst - src
	if string(b[src:src+size]) != string(q[dst:dst+size]) || string(b[dst:dst+size]) != string(q[src:src+size]) {
		t.Errorf("%v: answer % x goes elsewhere than % x came from", err, b, q)
	}
	if q[9] == 6 && at == 20 || q[6] == 6 && at == 40 {
		if rst {
			h := header.TCP(b[at:])
			if proto != 6 || h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.AckNumber() != 78 {
				t.Errorf("%v: % x is no RST for the SYN", err, b)
			}
			return
		}
	}
	msg := b[at:]
	want := []byte{3, code4}
	if at == 40 {
		want = []byte{1, code6}
	}
	if string(msg[:2]) != string(want) {
		t.Errorf("%v: type and code % x, want % x", err, msg[:2], want)
	}
	sum := uint16(0)
	if at == 40 {
		sum = header.PseudoHeaderChecksum(58, tcpip.AddrFromSlice(b[8:24]), tcpip.AddrFromSlice(b[24:40]), uint16(len(msg)))
	}
	if checksum.Checksum(msg, sum) != 0xffff {
		t.Errorf("%v: wrong sum in % x", err, msg)
	}
	if quoted := msg[8:]; string(quoted[src:at+8]) != string(q[src:at+8]) {
		t.Errorf("%v: quotes % x of % x", err, quoted, q)
	}
}

// TestResetEndsTheDial: an app that leaves is not dialed for any longer, and
// may come again.
func TestResetEndsTheDial(t *testing.T) {
	g := newGate(failing{syscall.ECONNREFUSED})
	p, _ := onPipe(t, netstack.Config{Network: g})
	for range 3 {
		until(t, "the SYN is dialed for", func() bool {
			p.in <- packetOf(app4, srv4, 6, segment(77, header.TCPFlagSyn)) // again and again, as long as the last one is not forgotten
			return len(g.entered) > 0
		})
		<-g.entered
		p.in <- packetOf(app4, srv4, 6, segment(78, header.TCPFlagRst))
		select {
		case err := <-g.left:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the dial ended with %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the dial goes on without the app")
		}
	}
	if len(p.out) > 0 {
		t.Errorf("an app that has left is told % x", <-p.out)
	}
}

// TestAppHasLeft: a connection for an app that went while it was dialed is
// closed again.
func TestAppHasLeft(t *testing.T) {
	near, far := net.Pipe()
	g := newGate(netOf{near})
	p, s := onPipe(t, netstack.Config{Network: g})
	p.in <- packetOf(app4, srv4, 6, segment(77, header.TCPFlagSyn))
	<-g.entered
	close(g.open)
	synAck := header.TCP(p.next(t)[20:])
	if synAck.Flags() != header.TCPFlagSyn|header.TCPFlagAck || synAck.AckNumber() != 78 {
		t.Fatalf("% x is no SYN-ACK", []byte(synAck))
	}
	rst := header.TCP(segment(78, header.TCPFlagRst))
	p.in <- packetOf(app4, srv4, 6, rst)
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the far end's connection: %v", err)
	}
	if n := s.Stats().TCP.Open; n != 0 {
		t.Errorf("%d flows are open", n)
	}
}

// TestResetAfterTheEnd: an app that has said all it has, and then goes, does not
// leave a connection behind on which the far end is silent.
func TestResetAfterTheEnd(t *testing.T) {
	near, far := net.Pipe()
	half := halfClosed{near, make(chan struct{})}
	p, s := onPipe(t, netstack.Config{Network: netOf{half}})
	p.in <- packetOf(app4, srv4, 6, segment(77, header.TCPFlagSyn))
	synAck := header.TCP(p.next(t)[20:])
	say := func(seq uint32, flags header.TCPFlags) {
		h := header.TCP(segment(seq, flags))
		h.SetAckNumber(synAck.SequenceNumber() + 1)
		p.in <- packetOf(app4, srv4, 6, h)
	}
	say(78, header.TCPFlagAck)
	until(t, "the flow is open", func() bool { return s.Stats().TCP.Open == 1 })
	say(78, header.TCPFlagAck|header.TCPFlagFin)
	if ack := header.TCP(p.next(t)[20:]); ack.AckNumber() != 79 {
		t.Fatalf("% x does not acknowledge the end", []byte(ack))
	}
	<-half.shut
	say(79, header.TCPFlagRst)
	far.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the far end's connection: %v", err)
	}
}

// halfClosed tells of its half-close.
type halfClosed struct {
	net.Conn
	shut chan struct{}
}

func (h halfClosed) CloseWrite() error { close(h.shut); return nil }

// TestShutdownInHandshake: Run does not wait for an app that says no more.
func TestShutdownInHandshake(t *testing.T) {
	near, far := net.Pipe()
	p := newPipe()
	s, err := netstack.New(netstack.Config{Device: p, MTU: 1500, Network: netOf{near}})
	if err != nil {
		t.Fatal(err)
	}
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	p.in <- packetOf(app4, srv4, 6, segment(77, header.TCPFlagSyn))
	p.next(t) // the SYN-ACK
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Run waits for a handshake")
	}
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the far end's connection: %v", err)
	}
}

// netOf is a Network with one connection.
type netOf struct{ c net.Conn }

func (n netOf) DialContext(context.Context, string, string) (net.Conn, error) { return n.c, nil }

func (n netOf) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

// TestNotForUs: what is no flow between two machines gets no dial, no answer.
func TestNotForUs(t *testing.T) {
	p, s := onPipe(t, netstack.Config{Network: failing{syscall.ECONNREFUSED}})
	ip := netip.MustParseAddr
	for _, dst := range []string{"224.0.0.251", "255.255.255.255", "127.0.0.1", "169.254.1.1", "0.0.0.0", "ff02::2", "fe80::1", "::1", "::"} {
		src := app4
		kind := byte(8)
		proto := uint8(1)
		if ip(dst).Is6() {
			src, kind, proto = app6, 128, 58
		}
		p.in <- packetOf(src, ip(dst), proto, echo(kind, "x"))
		p.in <- packetOf(src, ip(dst), 17, datagram(5353, "x"))
		p.in <- packetOf(src, ip(dst), 6, segment(1, header.TCPFlagSyn))
		p.in <- packetOf(ip(dst), src, 17, datagram(5353, "x"))
	}
	for _, b := range [][]byte{{}, {0x45}, {0x60}, make([]byte, 20), make([]byte, 70000)[:65535]} {
		p.in <- b
	}
	p.in <- packetOf(app4, srv4, 17, datagram(9, "hello"))
	p.next(t)
	if n := failures(s); n != 1 {
		t.Errorf("%d dials", n)
	}
	if len(p.out) != 0 {
		t.Errorf("% x was answered", <-p.out)
	}
}

// TestFloods: beyond the limits, flows are not begun.
func TestFloods(t *testing.T) {
	g := newGate(failing{syscall.ECONNREFUSED})
	p, s := onPipe(t, netstack.Config{Network: g, MaxDials: 3, MaxUDP: 3, MaxPing: 3})
	for i := range 20 {
		syn, dgram, req := segment(1, header.TCPFlagSyn), datagram(9, "x"), echo(8, "x")
		for _, b := range [][]byte{syn, dgram} {
			binary.BigEndian.PutUint16(b, uint16(1000+i))
		}
		binary.BigEndian.PutUint16(req[4:], uint16(1000+i))
		p.in <- packetOf(app4, srv4, 6, syn)
		p.in <- packetOf(app4, srv4, 17, dgram)
		p.in <- packetOf(app4, srv4, 1, req)
	}
	for range 9 {
		<-g.entered
	}
	st := s.Stats()
	if len(g.entered) != 0 || st.UDP.Open != 3 || st.Ping.Open != 3 {
		t.Errorf("%d dials too many; %+v", len(g.entered), st)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, cfg := range []netstack.Config{
		{}, {Device: newPipe(), MTU: 1500}, {Network: failing{}, MTU: 1500},
		{Device: newPipe(), Network: failing{}}, {Device: newPipe(), Network: failing{}, MTU: 70000},
	} {
		if s, err := netstack.New(cfg); err == nil || s != nil {
			t.Errorf("New(%+v) = %v, %v", cfg, s, err)
		}
	}
}

// FuzzLinkInput gives the stack packets of all kinds, a Network that refuses
// every flow behind it. What comes out then never is a SYN-ACK, nor an echo reply.
func FuzzLinkInput(f *testing.F) {
	for _, b := range [][]byte{
		packetOf(app4, srv4, 6, segment(77, header.TCPFlagSyn)), packetOf(app6, srv6, 6, segment(77, header.TCPFlagSyn)),
		packetOf(app4, srv4, 17, datagram(9, "hello")), packetOf(app6, srv6, 17, datagram(53, "hello")),
		packetOf(app4, srv4, 1, echo(8, "hello")), packetOf(app6, srv6, 58, echo(128, "hello")),
		packetOf(app6, srv6, 0, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, echo(128, "hello")...)),
		packetOf(app6, srv6, 44, append([]byte{58, 0, 0, 1, 0, 0, 0, 1}, echo(128, "hello")...)),
		packetOf(app6, srv6, 44, append([]byte{58, 0, 0, 0, 0, 0, 0, 1}, echo(128, "hello")...)),
		packetOf(app6, srv6, 60, append([]byte{58, 200, 0, 0, 0, 0, 0, 1}, make([]byte, 2000)...)),
		packetOf(app4, srv4, 1, append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, packetOf(srv4, app4, 17, datagram(9, ""))...)),
		packetOf(app4, srv4, 17, make([]byte, 60000)),
	} {
		f.Add(b, []byte(nil))
	}
	frag := packetOf(app4, srv4, 1, echo(8, "hellohellohellohello"))
	frag[6] = 0x20
	rest := packetOf(app4, srv4, 1, []byte("the end"))
	rest[7] = 28 / 8
	f.Add(frag, rest)

	p, _ := onPipe(f, netstack.Config{Network: failing{syscall.ECONNREFUSED}, MaxDials: 100, UDPIdle: time.Second})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		p.in <- a
		p.in <- b
		p.in <- nil // when this is taken, the others have been dealt with
		for len(p.out) > 0 {
			checkHonest(t, <-p.out)
		}
	})
}

func checkHonest(t *testing.T, b []byte) {
	t.Helper()
	at, proto := 20, b[9]
	if b[0]>>4 == 6 {
		at, proto = 40, b[6]
	} else if h := header.IPv4(b); !h.IsValid(len(b)) || h.CalculateChecksum() != 0xffff {
		t.Fatalf("% x is no packet", b)
	} else {
		at = int(h.HeaderLength())
	}
	switch {
	case proto == 6 && header.TCP(b[at:]).Flags().Contains(header.TCPFlagSyn):
		t.Fatalf("a SYN is answered that was refused: % x", b)
	case proto == 1 && b[at] == 0, proto == 58 && b[at] == 129:
		t.Fatalf("an echo request is answered by nobody: % x", b)
	}
}
