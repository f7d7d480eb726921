package netstack

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	vnetHdrLen = 10

	// headLen bytes of each packet are a view of their own: more than any IP
	// and TCP header, so that gVisor never has to pull headers up out of a
	// large chunk, which copies the chunk.
	headLen = 128

	// A body is handed on in the chunk it was read into where it fills much
	// of it, and copied into one of its size where it would waste it.
	bodyLen  = 64 << 10
	keepBody = 16 << 10
)

// A link is the device as gVisor sees it.
type link struct {
	device     Device
	local      bool // see Config
	mtu        atomic.Uint32
	dispatcher atomic.Pointer[stack.NetworkDispatcher]

	// echo takes echo requests, which gVisor must not see. The message is
	// the callee's to keep.
	echo func(src, dst netip.Addr, msg []byte)
	own  func(netip.Addr) bool // gVisor answers for these

	// reopen hears of each TCP segment that begins a flow, before gVisor.
	reopen func(p packet, segment []byte)

	repeats repeats // nil: nothing is lost on this machine

	// pass takes packets that are no flow's here, and are carried as they are.
	pass func(p packet, bufs [][]byte) bool
}

// run hands on packets until the device fails.
func (l *link) run() error {
	in := inbound{head: make([]byte, headLen), body: buffer.NewViewSize(bodyLen)}
	defer func() { in.body.Release() }()
	hdr := make([]byte, l.device.HeaderLen())
	bufs := make([][]byte, 3)
	for {
		bufs[0], bufs[1], bufs[2] = hdr, in.head, in.body.AsSlice()
		n, err := l.device.Readv(bufs)
		if err != nil {
			return fmt.Errorf("netstack: %w", err)
		}
		if in.n = n - len(hdr); in.n > 0 {
			l.input(&in, hdr)
		}
	}
}

// An inbound is where a packet is read into: n bytes, the first headLen of them
// in head.
type inbound struct {
	head []byte
	body *buffer.View
	n    int
	bufs [][]byte // for who wants them in one
}

// input gives one packet to whom it is for. Only what is from one machine to
// another one is carried: no multicast, no broadcast, nothing of the link's own.
func (l *link) input(in *inbound, hdr []byte) {
	head := in.head[:min(in.n, headLen)]
	p, ok := parse(head)
	if !ok || !l.carries(p.dst) || !l.carries(p.src) {
		return
	}
	switch {
	case l.own(p.dst):
		p.generalize(head)
		l.deliver(p, in)
	case p.isEcho(head):
		l.echo(p.src, p.dst, in.message(p.at))
	case l.pass(p, in.behind(hdr)):
	case p.proto == protoICMPv6 && p.fragment:
		// gVisor would answer it once it's whole, and ask nobody.
	default:
		if p.isSYN(head) {
			l.reopen(p, head[p.at:])
		}
		l.deliver(p, in)
	}
}

func (l *link) carries(a netip.Addr) bool {
	return a.IsGlobalUnicast() || l.local && a.Is4() && (a.IsLoopback() || a.IsLinkLocalUnicast())
}

// behind is the packet behind its header, in its buffers.
func (in *inbound) behind(hdr []byte) [][]byte {
	in.bufs = append(in.bufs[:0], hdr, in.head[:min(in.n, headLen)])
	if in.n > headLen {
		in.bufs = append(in.bufs, in.body.AsSlice()[:in.n-headLen])
	}
	return in.bufs
}

// message returns a copy of the packet from at on.
func (in *inbound) message(at int) []byte {
	msg := make([]byte, 0, in.n-at)
	msg = append(msg, in.head[at:min(in.n, headLen)]...)
	if rest := in.n - headLen; rest > 0 {
		msg = append(msg, in.body.AsSlice()[:rest]...)
	}
	return msg
}

func (l *link) deliver(p packet, in *inbound) {
	d := l.dispatcher.Load()
	if d == nil {
		return
	}
	if l.repeats != nil {
		l.repeats.hold(p, in.head[:min(in.n, headLen)])
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: in.take()})
	defer pkt.DecRef()
	proto := header.IPv4ProtocolNumber
	if p.dst.Is6() {
		proto = header.IPv6ProtocolNumber
	}
	(*d).DeliverNetworkPacket(proto, pkt)
}

// take returns the packet as gVisor wants it, and leaves in ready for another.
func (in *inbound) take() buffer.Buffer {
	b := buffer.MakeWithView(buffer.NewViewWithData(in.head[:min(in.n, headLen)]))
	switch rest := in.n - headLen; {
	case rest <= 0:
	case rest < keepBody:
		b.Append(buffer.NewViewWithData(in.body.AsSlice()[:rest]))
	default:
		in.body.CapLength(rest)
		b.Append(in.body)
		in.body = buffer.NewViewSize(bodyLen)
	}
	return b
}

// WritePackets implements stack.LinkWriter. What the device does not take is
// lost, as on any link.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		slices := pkt.AsSlices()
		if l.device.HeaderLen() == 0 {
			l.device.Writev(slices)
			continue
		}
		hdr := vnetHdr(pkt)
		l.device.Writev(append([][]byte{hdr[:]}, slices...))
	}
	return pkts.Len(), nil
}

// write sends a packet that is complete, sums and all.
func (l *link) write(packet []byte) {
	var hdr [vnetHdrLen]byte
	l.device.Writev([][]byte{hdr[:l.device.HeaderLen()], packet})
}

// vnetHdr tells the kernel what is left to do on a packet: to sum it, and to
// segment it if it's more than one segment.
func vnetHdr(pkt *stack.PacketBuffer) (hdr [vnetHdrLen]byte) {
	const needsCsum, tcp4, tcp6 = 1, 1, 4
	gso := &pkt.GSOOptions
	if !gso.NeedsCsum {
		return hdr
	}
	hdr[0] = needsCsum
	binary.NativeEndian.PutUint16(hdr[6:], gso.L3HdrLen)
	binary.NativeEndian.PutUint16(hdr[8:], gso.CsumOffset)
	if gso.Type == stack.GSONone || pkt.Data().Size() <= int(gso.MSS) {
		return hdr
	}
	hdr[1] = tcp4
	if gso.Type == stack.GSOTCPv6 {
		hdr[1] = tcp6
	}
	binary.NativeEndian.PutUint16(hdr[2:], uint16(pkt.HeaderSize()))
	binary.NativeEndian.PutUint16(hdr[4:], gso.MSS)
	return hdr
}

// SupportedGSO implements stack.GSOEndpoint.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.device.HeaderLen() == 0 {
		return stack.GSONotSupported
	}
	return stack.HostGSOSupported
}

// GSOMaxSize implements stack.GSOEndpoint.
func (*link) GSOMaxSize() uint32 { return maxPacket }

// Capabilities implements stack.LinkEndpoint. What came through no wire needs
// no check. Sums the other way are gVisor's own but where GSO says otherwise:
// with CapabilityTXChecksumOffload it would leave out those of a SYN-ACK too,
// and tell nobody.
func (*link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

// Attach implements stack.LinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

// IsAttached implements stack.LinkEndpoint.
func (l *link) IsAttached() bool { return l.dispatcher.Load() != nil }

// MTU implements stack.LinkEndpoint.
func (l *link) MTU() uint32 { return l.mtu.Load() }

// The rest of stack.LinkEndpoint is about links that have more to them.

func (*link) SetMTU(uint32)                           {}
func (*link) MaxHeaderLength() uint16                 { return 0 }
func (*link) LinkAddress() tcpip.LinkAddress          { return "" }
func (*link) SetLinkAddress(tcpip.LinkAddress)        {}
func (*link) Wait()                                   {}
func (*link) Close()                                  {}
func (*link) SetOnCloseAction(func())                 {}
func (*link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (*link) AddHeader(*stack.PacketBuffer)           {}
func (*link) ParseHeader(*stack.PacketBuffer) bool    { return true }
