// Package wiring is what wires are made of, whatever is spoken on them: the life of a
// wire from its first goroutine to its last (Life), of one over a byte stream the
// connection below (Tap) and its flows' turns to write, datagrams on a stream,
// connections that wait for an answer, addresses, and the words that kernels' errors
// cross in.
package wiring

import (
	"net"
	"net/netip"
)

// Addr is an address that need not be numbers.
type Addr struct{ Net, Text string }

func (a Addr) Network() string { return a.Net }
func (a Addr) String() string  { return a.Text }

// ParseAddr is an address as package net would have it, if it is numbers.
func ParseAddr(network, address string) net.Addr {
	if network == "ping" {
		if ip, err := netip.ParseAddr(address); err == nil {
			return &net.IPAddr{IP: ip.AsSlice(), Zone: ip.Zone()}
		}
	}
	if ap, err := netip.ParseAddrPort(address); err == nil {
		if network == "tcp" {
			return net.TCPAddrFromAddrPort(ap)
		}
		return net.UDPAddrFromAddrPort(ap)
	}
	return Addr{network, address}
}
