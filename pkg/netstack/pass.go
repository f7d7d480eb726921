package netstack

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Where the Network carries packets, those of the apps' flows go by it as they are, and
// it's the far end that dials. A flow of TCP stays where it began: here, or on the wire
// that carried its SYN. When that wire is gone, its app is told by a reset.
type passage struct {
	*run
	carrier channel.Carrier // nil: none

	mu     sync.Mutex
	joined map[channel.Packets]bool
	open   map[flowKey]*passed   // of TCP
	asked  map[flowKey]time.Time // when datagrams were sent there last
}

// flowKey has no ports where it stands for fragments.
type flowKey struct{ app, far netip.AddrPort }

func (k flowKey) withoutPorts() flowKey {
	return flowKey{netip.AddrPortFrom(k.app.Addr(), 0), netip.AddrPortFrom(k.far.Addr(), 0)}
}

// passed is a flow of TCP that is passed on.
type passed struct {
	wire             channel.Packets
	ack              uint32 // what the app knows of
	heard            bool   // of the far end
	appEnds, farEnds bool   // have said their last: it's not counted any more
	last             time.Time
}

const (
	sweepEvery = 5 * time.Second
	mostAsked  = 8192 // of UDP: others are gVisor's to bound
)

// over tells whether a flow, which ends without a word where a kernel loses patience,
// has been silent for longer than kernels wait.
func (f *passed) over(now time.Time) bool {
	patience := 24 * time.Hour
	switch {
	case f.ended():
		patience = 10 * time.Second
	case !f.heard:
		patience = 3 * time.Minute
	}
	return now.Sub(f.last) > patience
}

func (f *passed) ended() bool { return f.appEnds && f.farEnds }

func newPassage(r *run) *passage {
	p := &passage{run: r, joined: make(map[channel.Packets]bool), open: make(map[flowKey]*passed), asked: make(map[flowKey]time.Time)}
	if r.cfg.Device.HeaderLen() == vnetHdrLen {
		p.carrier, _ = r.cfg.Network.(channel.Carrier)
	}
	return p
}

// pass hands a packet on, unless its flow is here: that is where gVisor has an endpoint,
// or a dial is under way. Fragments and echoes don't tell, and are.
func (g *passage) pass(p packet, bufs [][]byte) bool {
	if g.carrier == nil || p.fragment {
		return false
	}
	switch transport := bufs[1][p.at:]; {
	case p.proto == protoTCP && len(transport) >= header.TCPMinimumSize:
		return g.passTCP(p, transport, bufs)
	case p.proto == protoUDP && len(transport) >= header.UDPMinimumSize:
		return g.passUDP(p, transport, bufs)
	}
	return false
}

// wire is where a flow may begin; nil: here.
func (g *passage) wire(p packet, transport []byte) channel.Packets {
	id := p.endpoint(transport)
	wire := g.carrier.Packets(p.dst)
	if wire == nil || g.dials(id) || g.ip.FindTransportEndpoint(protocol(p.dst), p.transport(), id, nic) != nil {
		return nil
	}
	g.join(wire)
	return wire
}

// join has what comes by a wire go to the device.
func (g *passage) join(wire channel.Packets) {
	g.mu.Lock()
	joined := g.joined[wire]
	g.joined[wire] = true
	g.mu.Unlock()
	if joined || !g.begin() {
		return
	}
	wire.Receive(func(bufs [][]byte) { g.receive(wire, bufs) })
	go func() {
		defer g.flows.Done()
		g.follow(wire)
	}()
}

// follow looks for flows that are over until a wire is gone.
func (g *passage) follow(wire channel.Packets) {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			g.mu.Lock()
			g.sweep(time.Now())
			g.mu.Unlock()
		case <-wire.Done():
			g.broken(wire)
			return
		case <-g.ctx.Done():
			return
		}
	}
}

// sweep forgets what is over. The lock is held.
func (g *passage) sweep(now time.Time) {
	for key, f := range g.open {
		if f.over(now) {
			g.forget(key, f)
		}
	}
	maps.DeleteFunc(g.asked, func(_ flowKey, last time.Time) bool { return now.Sub(last) > g.cfg.UDPIdle })
}

func (g *passage) passUDP(p packet, transport []byte, bufs [][]byte) bool {
	wire, key, n := g.wire(p, transport), flowKey{p.from(transport), p.to(transport)}, payload(bufs, p.at+header.UDPMinimumSize)
	if wire == nil || !g.ask(key) || !wire.Send(bufs) {
		return false
	}
	g.udp.sent.Add(n)
	return true
}

// ask notes where datagrams go to, and so may come from.
func (g *passage) ask(key flowKey) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, known := g.asked[key]
	if !known && len(g.asked) >= mostAsked {
		return false
	}
	now := time.Now()
	g.asked[key], g.asked[key.withoutPorts()] = now, now
	return true
}

func (g *passage) passTCP(p packet, transport []byte, bufs [][]byte) bool {
	h := header.TCP(transport)
	key := flowKey{p.from(transport), p.to(transport)}
	f, asked := g.find(key)
	if h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn && !asked {
		f = g.first(key, p, transport)
	}
	if f == nil {
		return false
	}
	ack, flags, n := h.AckNumber(), h.Flags(), payload(bufs, p.at+int(h.DataOffset()))
	carried := f.wire.Send(bufs)
	g.mu.Lock()
	defer g.mu.Unlock()
	f.ack = ack
	g.saw(f, &f.appEnds, flags)
	if carried {
		g.tcp.sent.Add(n)
	}
	if !carried || flags.Contains(header.TCPFlagRst) {
		g.forget(key, f)
	}
	return carried
}

// payload is how much is behind so many bytes of headers. What is repeated counts again.
func payload(bufs [][]byte, headers int) uint64 {
	n := -headers
	for _, b := range bufs[1:] {
		n += len(b)
	}
	return uint64(max(0, n))
}

// find tells also whether the flow is one whose SYN was sent on the present wire and has
// no answer yet: on another it is sent where that leads, as a new one.
func (g *passage) find(key flowKey) (f *passed, asked bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f = g.open[key]
	return f, f != nil && !f.heard && f.wire == g.carrier.Packets(key.far.Addr())
}

// first is for a SYN: the flow is a new one.
func (g *passage) first(key flowKey, p packet, transport []byte) *passed {
	wire := g.wire(p, transport)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.forget(key, g.open[key])
	if wire == nil || len(g.open) >= g.cfg.MaxTCP {
		return nil
	}
	f := &passed{wire: wire, last: time.Now()}
	g.open[key] = f
	g.count(f, 1)
	return f
}

func (g *passage) count(f *passed, more int) {
	f.wire.Count(more)
	g.tcp.open.Add(int64(more))
}

// saw notes a segment of the end that ends belongs to.
func (g *passage) saw(f *passed, ends *bool, flags header.TCPFlags) {
	f.last = time.Now()
	if flags.Contains(header.TCPFlagFin) && !*ends {
		*ends = true
		if f.ended() {
			g.count(f, -1)
		}
	}
}

// forget is called with the lock held.
func (g *passage) forget(key flowKey, f *passed) {
	if f == nil || g.open[key] != f {
		return
	}
	delete(g.open, key)
	if !f.ended() {
		g.count(f, -1)
	}
}

// receive gives the device what comes by a wire, if an app has asked for it.
func (g *passage) receive(wire channel.Packets, bufs [][]byte) {
	p, ok := parse(bufs[1])
	if !ok {
		return
	}
	at := bufs[1][p.at:]
	switch g.mu.Lock(); {
	case p.fragment:
		_, ok = g.asked[flowKey{netip.AddrPortFrom(p.dst, 0), netip.AddrPortFrom(p.src, 0)}]
	case p.proto == protoTCP && len(at) >= header.TCPMinimumSize:
		ok = g.answer(wire, flowKey{p.to(at), p.from(at)}, header.TCP(at).Flags())
		if ok {
			g.tcp.received.Add(payload(bufs, p.at+int(header.TCP(at).DataOffset())))
		}
	case p.proto == protoUDP && len(at) >= header.UDPMinimumSize:
		if _, ok = g.asked[flowKey{p.to(at), p.from(at)}]; ok {
			g.udp.received.Add(payload(bufs, p.at+header.UDPMinimumSize))
		}
	default:
		ok = g.complaint(wire, p, at)
	}
	g.mu.Unlock()
	if ok {
		g.cfg.Device.Writev(bufs)
	}
}

// answer takes a segment of a flow. It is false for one that isn't that wire's. The lock
// is held, as for complaint.
func (g *passage) answer(wire channel.Packets, key flowKey, flags header.TCPFlags) bool {
	f := g.open[key]
	if f == nil || f.wire != wire {
		return false
	}
	f.heard = true
	g.saw(f, &f.farEnds, flags)
	if flags.Contains(header.TCPFlagRst) {
		g.forget(key, f)
	}
	return true
}

// complaint takes an error of ICMP, behind whose eight bytes is what it's about. A flow
// that begins with one has ended.
func (g *passage) complaint(wire channel.Packets, p packet, icmp []byte) bool {
	const quoted = 8
	if len(icmp) < quoted || !isError(p.proto, icmp[0]) {
		return false
	}
	q, ok := parse(icmp[quoted:])
	if !ok || q.fragment || len(icmp) < quoted+q.at+4 {
		return false
	}
	about := icmp[quoted+q.at:]
	key := flowKey{q.from(about), q.to(about)}
	if q.proto == protoUDP {
		_, ok = g.asked[key]
		return ok
	}
	f := g.open[key]
	if q.proto != protoTCP || f == nil || f.wire != wire {
		return false
	}
	if !f.heard {
		g.forget(key, f)
	}
	return true
}

// isError tells of those that say what became of a packet, and ask for nothing.
func isError(proto, kind uint8) bool {
	switch proto {
	case protoICMP:
		return slices.Contains([]header.ICMPv4Type{header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem}, header.ICMPv4Type(kind))
	case protoICMPv6:
		return kind >= uint8(header.ICMPv6DstUnreachable) && kind <= uint8(header.ICMPv6ParamProblem)
	}
	return false
}

// broken asks the app's kernel about all flows of a wire that is gone: to its answers
// nobody has a flow here, and gVisor says so.
func (g *passage) broken(wire channel.Packets) {
	var questions [][]byte
	g.mu.Lock()
	delete(g.joined, wire)
	for key, f := range g.open {
		if f.wire == wire {
			g.forget(key, f)
			if f.heard {
				questions = append(questions, key.question(f.ack))
			}
		}
	}
	g.mu.Unlock()
	for _, q := range questions {
		g.link.write(q)
	}
}

// question is a segment from the far end that the app's kernel has seen before, and
// answers with what it has seen since.
func (k flowKey) question(ack uint32) []byte {
	tcp := header.TCP(make([]byte, header.TCPMinimumSize))
	tcp.Encode(&header.TCPFields{
		SrcPort: k.far.Port(), DstPort: k.app.Port(), SeqNum: ack - 1,
		DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagAck,
	})
	src, dst := address(k.far.Addr()), address(k.app.Addr())
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, header.TCPMinimumSize)
	tcp.SetChecksum(^tcp.CalculateChecksum(sum))
	if k.app.Addr().Is4() {
		return append(ip4(k.far.Addr(), k.app.Addr(), protoTCP, len(tcp)), tcp...)
	}
	return append(ip6(k.far.Addr(), k.app.Addr(), protoTCP, len(tcp)), tcp...)
}
