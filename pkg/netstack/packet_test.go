package netstack

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func FuzzParse(f *testing.F) {
	f.Add([]byte(ip4(netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), protoICMP, 0)))
	f.Add([]byte(ip6(netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), protoICMPv6, 0)))
	f.Add(append(ip6(netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), 0, 16), 43, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := parse(b)
		if !ok {
			return
		}
		if p.at < header.IPv4MinimumSize || p.at > len(b) || p.src.BitLen() != p.dst.BitLen() {
			t.Fatalf("parse(% x) = %+v", b, p)
		}
		if p.isEcho(b) && p.at+header.ICMPv4MinimumSize > len(b) {
			t.Fatalf("half an echo request: % x", b)
		}
		if p.dst.Is6() && extension(p.proto) && !p.fragment {
			t.Fatalf("parse(% x) stops at an extension: %+v", b, p)
		}
	})
}
