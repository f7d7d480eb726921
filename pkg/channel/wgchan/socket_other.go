//go:build !linux

package wgchan

import (
	"net"
	"net/netip"

	"golang.zx2c4.com/wireguard/conn"
)

// A socket sends and receives a packet with each call.
type socket struct{ conn *net.UDPConn }

func newSocket(c *net.UDPConn) *socket { return &socket{c} }

func (s *socket) receive(packets [][]byte, sizes []int, from []conn.Endpoint) (int, error) {
	n, at, err := s.conn.ReadFromUDPAddrPort(packets[0])
	if err != nil {
		return 0, err
	}
	sizes[0], from[0] = n, endpoint{netip.AddrPortFrom(at.Addr().Unmap(), at.Port())}
	return 1, nil
}

// send sends packets to one address. What the path does not take is lost there.
func (s *socket) send(packets [][]byte, to netip.AddrPort) error {
	var first error
	for _, p := range packets {
		if _, err := s.conn.WriteToUDPAddrPort(p, to); err != nil && first == nil {
			first = err
		}
	}
	return first
}
