package dns

import (
	"net/netip"
	"testing"

	"github.com/miekg/dns"

	"github.com/culvert-dev/culvert/pkg/catalog"
)

// What is reached under another address is answered, and asked for, under that.
func TestShown(t *testing.T) {
	real, shown := netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("198.18.0.10")
	swap := func(from, to netip.Addr) func(netip.Addr) netip.Addr {
		return func(a netip.Addr) netip.Addr {
			if a == from {
				return to
			}
			return a
		}
	}
	s := New(Config{Namespace: "shop", Shown: swap(real, shown), Real: swap(shown, real)})
	s.Zone().SetScope(catalog.Scope{All: true})
	s.Zone().PutService(catalog.Service{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{real}, Ports: []catalog.Port{{Name: "http", Port: 80, Protocol: "TCP"}}})
	s.Zone().PutService(catalog.Service{Namespace: "shop", Name: "db", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.97.0.10")}})

	ask := func(name string, qtype uint16) *dns.Msg {
		q, err := new(dns.Msg).SetQuestion(name, qtype).Pack()
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(s.Answer(t.Context(), q, true)); err != nil {
			t.Fatal(err)
		}
		return m
	}
	for name, want := range map[string]string{"web.shop.svc.cluster.local.": "198.18.0.10", "db.shop.": "10.97.0.10"} {
		if m := ask(name, dns.TypeA); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != want {
			t.Errorf("%s: %v", name, m)
		}
	}
	if m := ask("_http._tcp.web.shop.svc.cluster.local.", dns.TypeSRV); len(m.Extra) != 1 || m.Extra[0].(*dns.A).A.String() != "198.18.0.10" {
		t.Errorf("SRV: %v", m)
	}
	if m := ask("10.0.18.198.in-addr.arpa.", dns.TypePTR); len(m.Answer) != 1 || m.Answer[0].(*dns.PTR).Ptr != "web.shop.svc.cluster.local." {
		t.Errorf("PTR: %v", m)
	}
	if m := ask("10.0.96.10.in-addr.arpa.", dns.TypePTR); m.Rcode != dns.RcodeServerFailure { // there is no upstream
		t.Errorf("PTR of the LAN's: %v", m)
	}
}
