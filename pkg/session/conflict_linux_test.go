package session

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/tun"
)

// TestAroundC16: what a VPN's wider route overlaps is led to exactly, but where that would
// hide some of it from this machine.
func TestAroundC16(t *testing.T) {
	wanted := []RouteStatus{{Prefix: pfx("10.96.0.0/12"), Source: "ServiceCIDR"}}
	var few, many []netip.Addr
	for a := netip.MustParseAddr("10.96.0.1"); len(many) <= mostExact; a = a.Next().Next() {
		many = append(many, a)
	}
	few = many[:3]
	for name, c := range map[string]struct {
		how     tun.Avoid
		partial bool
		table   int
		used    []netip.Addr
		exact   bool
		says    string
	}{
		"all is seen":                  {tun.Either, false, 0, few, true, "only addresses are reached that Services and their pods have"},
		"some namespaces are":          {tun.Either, true, 0, few, false, "it's reached as"},
		"some are, exact by wish":      {tun.Exact, true, 0, few, true, "in the namespaces that you may read"},
		"too many are in use":          {tun.Either, false, 0, many, false, "too many addresses in use"},
		"too many, exact by wish":      {tun.Exact, false, 0, many, false, "too many addresses in use"},
		"a table before the main one":  {tun.Either, false, 52, few, false, "table 52"},
		"neighbours in use are merged": {tun.Either, false, 0, []netip.Addr{netip.MustParseAddr("10.96.0.2"), netip.MustParseAddr("10.96.0.3")}, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := &around{how: c.how, partial: c.partial}
			existing := []tun.Route{{Dst: pfx("10.0.0.0/8"), Device: "vpn0", Table: c.table}}
			var said []string
			inUse := func([]netip.Prefix) []netip.Addr { return c.used }
			for range 2 { // what was mapped stays so
				routes, err := a.routes(wanted, existing, true, inUse, func(s string) { said = append(said, s) })
				if err != nil {
					t.Fatal(err)
				}
				if c.exact != (routes[0].Source == "in use") || c.exact != a.exactly() || c.exact == (len(a.mappings) > 0) {
					t.Errorf("%+v", routes)
				}
				if got := tun.Merge(prefixes(routes)); c.exact && !slices.Equal(got, tun.Merge(single(c.used))) {
					t.Errorf("routes to %v", got)
				}
				if ranges := a.ranges(routes); len(ranges) != 1 || c.exact && ranges[0] != wanted[0].Prefix {
					t.Errorf("ranges %v", ranges)
				}
			}
			if !strings.Contains(strings.Join(said, "\n"), c.says) {
				t.Errorf("said %q", said)
			}
		})
	}
}

// TestVacantC20: an address that no Service has is refused, however it is reached, and no
// packet to it goes by.
func TestVacantC20(t *testing.T) {
	a := &around{mappings: []mapping{{Mapping: tun.Mapping{Real: pfx("10.96.7.0/24"), As: pfx("198.18.7.0/24")}}}}
	none := []netip.Addr{netip.MustParseAddr("10.96.0.9"), netip.MustParseAddr("10.96.7.9"), netip.MustParseAddr("fd00:10:96::9")}
	r := reached{around: a, vacant: func(a netip.Addr) bool { return slices.Contains(none, a) }}
	for _, host := range []string{"10.96.0.9", "198.18.7.9", "fd00:10:96::9"} {
		to := netip.MustParseAddr(host)
		for network, address := range map[string]string{"tcp": netip.AddrPortFrom(to, 80).String(), "udp": netip.AddrPortFrom(to, 53).String(), "ping": host} {
			if _, err := r.DialContext(t.Context(), network, address); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s %s: %v", network, address, err)
			}
		}
		if r.asIs(to) {
			t.Errorf("packets go to %s", host)
		}
	}
	if r.asIs(netip.MustParseAddr("198.18.7.1")) || !r.asIs(netip.MustParseAddr("10.96.0.1")) {
		t.Error("packets go to an address that is another there")
	}
}
