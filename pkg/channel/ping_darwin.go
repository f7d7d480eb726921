package channel

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/net/icmp"
)

// openPing makes an ICMP datagram socket. This kernel leaves the identifier as
// it is and hands every reply to every such socket, so that address and
// sequence number decide whose it is.
func (h *Host) openPing(to netip.Addr) (net.Conn, error) {
	network, any := "udp4", "0.0.0.0"
	if to.Is6() {
		network, any = "udp6", "::"
	}
	pc, err := icmp.ListenPacket(network, any)
	if err != nil {
		return nil, err
	}
	return &ping{PacketConn: pc, to: to}, nil
}

type ping struct {
	*icmp.PacketConn
	to  netip.Addr
	ids echoIDs
}

func (p *ping) Write(msg []byte) (int, error) {
	if len(msg) < echoHeader {
		return 0, &net.OpError{Op: "write", Net: "ping", Addr: p.RemoteAddr(), Err: syscall.EINVAL}
	}
	p.ids.out(msg)
	if p.to.Is4() {
		msg = withChecksum(msg)
	}
	return p.WriteTo(msg, &net.UDPAddr{IP: p.to.AsSlice(), Zone: p.to.Zone()})
}

func (p *ping) Read(buf []byte) (int, error) {
	for {
		n, from, err := p.ReadFrom(buf)
		if err != nil {
			return n, err
		}
		if a, ok := from.(*net.UDPAddr); ok && a.AddrPort().Addr().Unmap() == p.to && p.ids.in(buf[:n]) {
			return n, nil
		}
	}
}

func (p *ping) RemoteAddr() net.Addr { return &net.IPAddr{IP: p.to.AsSlice(), Zone: p.to.Zone()} }

func withChecksum(msg []byte) []byte {
	msg = append([]byte(nil), msg...)
	msg[2], msg[3] = 0, 0
	var sum uint32
	for i := 0; i+1 < len(msg); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(msg[i:]))
	}
	if len(msg)%2 == 1 {
		sum += uint32(msg[len(msg)-1]) << 8
	}
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(msg[2:], ^uint16(sum))
	return msg
}
