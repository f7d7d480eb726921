package session

import (
	"errors"
	"net/netip"
	"reflect"
	"testing"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/tun"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestReverseZones(t *testing.T) {
	for p, want := range map[string][]string{
		"10.96.0.0/16":    {"96.10.in-addr.arpa"},
		"10.244.0.0/24":   {"0.244.10.in-addr.arpa"},
		"10.244.0.7/32":   {"7.0.244.10.in-addr.arpa"},
		"10.96.0.0/15":    {"96.10.in-addr.arpa", "97.10.in-addr.arpa"},
		"172.16.0.0/9":    {"172.in-addr.arpa"},
		"255.254.0.0/15":  {"254.255.in-addr.arpa", "255.255.in-addr.arpa"},
		"fd00:10:96::/62": {"0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", "1.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", "2.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", "3.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa"},
		"0.0.0.0/0":       nil,
	} {
		if got := reverseZones(pfx(p)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %q, want %q", p, got, want)
		}
	}
}

func TestRoutesKeepTheirSource(t *testing.T) {
	plan := routePlan{
		include: []netip.Prefix{pfx("192.168.7.0/24")},
		exclude: []netip.Prefix{pfx("10.244.1.0/24")},
		pinned:  []netip.Addr{netip.MustParseAddr("10.96.0.1")},
	}
	found := []kube.Route{
		{Prefix: pfx("10.96.0.0/31"), Source: "ServiceCIDR kubernetes"},
		{Prefix: pfx("10.244.0.0/24"), Source: "node node1 podCIDR"},
		{Prefix: pfx("10.244.1.0/24"), Source: "node node2 podCIDR"},
	}
	want := []RouteStatus{
		{pfx("10.96.0.0/32"), "ServiceCIDR kubernetes"},
		{pfx("10.244.0.0/24"), "node node1 podCIDR"},
		{pfx("192.168.7.0/24"), "--include"},
	}
	if got := plan.routes(found); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestConflictsNameBoth(t *testing.T) {
	routes := []RouteStatus{{pfx("10.96.0.0/16"), "ServiceCIDR kubernetes"}}
	existing := []tun.Route{{Dst: pfx("10.0.0.0/8"), Device: "vpn0", Gateway: netip.MustParseAddr("10.1.1.1")}, {Dst: pfx("192.168.0.0/16"), Device: "eth0"}}
	err := conflicts(routes, existing)
	var conflict *ConflictError
	if !errors.As(err, &conflict) {
		t.Fatal(err)
	}
	const want = "the cluster's 10.96.0.0/16 (ServiceCIDR kubernetes) overlaps this machine's route 10.0.0.0/8 via 10.1.1.1 dev vpn0"
	if err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	if err := conflicts(routes, existing[1:]); err != nil {
		t.Error(err)
	}
}
