package session

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/resolver"
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

func TestSettingsB12(t *testing.T) {
	n := naming{
		device: "culvert0", index: 7, server: netip.MustParseAddr("198.18.0.1"), namespace: "shop", domain: "cluster.local",
		suffix: "staging", namespaces: []string{"shop", "dev"}, prefixes: []netip.Prefix{pfx("10.96.0.0/16")},
	}
	want := resolver.Settings{
		Link: "culvert0", LinkIndex: 7, Server: n.server, Search: []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local"},
		Zones: []string{"cluster.local", "svc", "shop", "staging", "96.10.in-addr.arpa", "dev"},
	}
	if got := n.settings(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for i := range 300 {
		n.namespaces = append(n.namespaces, fmt.Sprintf("n%03d", i))
	}
	if got := n.settings().Zones; len(got) != maxZones || !slices.Equal(got[:6], want.Zones) {
		t.Errorf("of many namespaces %d zones, first %q", len(got), got[:6])
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
		{Prefix: pfx("10.96.0.0/32"), Source: "ServiceCIDR kubernetes"},
		{Prefix: pfx("10.244.0.0/24"), Source: "node node1 podCIDR"},
		{Prefix: pfx("192.168.7.0/24"), Source: "--include"},
	}
	if got := plan.routes(found); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestConflictsNameBoth(t *testing.T) {
	routes := []RouteStatus{{Prefix: pfx("10.96.0.0/16"), Source: "ServiceCIDR kubernetes"}}
	existing := []tun.Route{{Dst: pfx("10.0.0.0/8"), Device: "vpn0", Gateway: netip.MustParseAddr("10.1.1.1")}, {Dst: pfx("192.168.0.0/16"), Device: "eth0"}}
	err := conflicts(routes, existing)
	var conflict *ConflictError
	if !errors.As(err, &conflict) {
		t.Fatal(err)
	}
	const want = "10.96.0.0/16 (ServiceCIDR kubernetes) overlaps this machine's route 10.0.0.0/8 via 10.1.1.1 dev vpn0"
	if err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	if err := conflicts(routes, existing[1:]); err != nil {
		t.Error(err)
	}
}
