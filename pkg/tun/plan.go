package tun

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// A Route is one that the machine has, whoever made it.
type Route struct {
	Dst     netip.Prefix
	Device  string     // "" where it leads nowhere (blackhole, unreachable)
	Gateway netip.Addr // invalid where the destination is on the link
	Table   int        // that is asked before the main one; 0 for all others
}

func (r Route) String() string {
	var b strings.Builder
	b.WriteString(r.Dst.String())
	if r.Gateway.IsValid() {
		b.WriteString(" via " + r.Gateway.String())
	}
	if r.Device != "" {
		b.WriteString(" dev " + r.Device)
	}
	if r.Table != 0 {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	return b.String()
}

// A Conflict is a wanted prefix and an existing route for some of the same
// addresses.
type Conflict struct {
	Wanted   netip.Prefix
	Existing Route
}

func (c Conflict) String() string {
	return fmt.Sprintf("%v overlaps the route %v", c.Wanted, c.Existing)
}

// Plan returns the routes that lead exactly to what is wanted, less what is
// excluded and less the pinned addresses: those that must stay reachable
// without the tunnel, because the tunnel itself runs over them.
func Plan(wanted, excluded []netip.Prefix, pinned []netip.Addr) []netip.Prefix {
	holes := slices.Clone(excluded)
	for _, a := range pinned {
		if a = a.Unmap().WithZone(""); a.IsValid() {
			holes = append(holes, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return Subtract(wanted, holes)
}

// Conflicts returns every pair of a wanted prefix and an existing route that
// overlap, be the route narrower, equal or wider. Routes that are there for
// everything, or for no more than one link, stand in nobody's way.
func Conflicts(wanted []netip.Prefix, existing []Route) []Conflict {
	var found []Conflict
	for _, w := range wanted {
		w = normal(w)
		for _, r := range existing {
			if d := normal(r.Dst); w.Overlaps(d) && !harmless(d) && r.Device != "lo" {
				found = append(found, Conflict{w, r})
			}
		}
	}
	return found
}

// linkOnly are destinations that never leave a link, or the machine.
var linkOnly = [...]netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// harmless tells whether a route to d is a default route, or one for a link
// only. Halves of everything are how VPNs write a default route that the real
// one outlives (0.0.0.0/1 and 128.0.0.0/1; 2000::/3), so they count as one.
func harmless(d netip.Prefix) bool {
	if d.Addr().Is4() && d.Bits() <= 1 || d.Addr().Is6() && d.Bits() <= 3 {
		return true
	}
	return slices.ContainsFunc(linkOnly[:], func(l netip.Prefix) bool {
		return l.Bits() <= d.Bits() && l.Contains(d.Addr())
	})
}

// The pools that own addresses are taken from, most wanted first. 198.18.0.0/15
// is set aside for benchmarks (RFC 2544), so that no network uses it; some
// proxies do, hence the next, shared address space (RFC 6598), and then the
// documentation networks (RFC 5737).
var (
	pools4 = [...]string{"198.18.0.0/15", "100.64.0.0/10", "203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24"}
	pools6 = [...]string{"fd63:756c:7665:7274::/64", "fd63:756c:7665:7275::/64"}
)

// FreeAddrs chooses the device's own addresses, one of each family, so that
// none of the taken prefixes holds them: existing routes and addresses, and
// whatever is wanted in the tunnel. An address is invalid where all is taken.
func FreeAddrs(taken []netip.Prefix) (v4, v6 netip.Addr) {
	holes := holesOf(taken)
	return free(pools4[:], holes), free(pools6[:], holes)
}

// shared is address space for carriers (RFC 6598). Who has any of it may have all, as
// Tailscale has, which has routes for single hosts and drops the rest.
var shared = netip.MustParsePrefix("100.64.0.0/10")

// holesOf is what no address may be taken from.
func holesOf(taken []netip.Prefix) (holes []netip.Prefix) {
	for _, p := range taken {
		switch p = normal(p); {
		case !p.IsValid() || harmless(p):
		case p.Overlaps(shared):
			holes = append(holes, p, shared)
		default:
			holes = append(holes, p)
		}
	}
	return holes
}

// free returns the first address of the pools that is in no hole and does not
// end in 0, which some programs take for a network.
func free(pools []string, holes []netip.Prefix) netip.Addr {
	for _, pool := range pools {
		for _, p := range Subtract([]netip.Prefix{netip.MustParsePrefix(pool)}, holes) {
			a := p.Addr()
			if b := a.AsSlice(); b[len(b)-1] == 0 {
				a = a.Next()
			}
			if p.Contains(a) {
				return a
			}
		}
	}
	return netip.Addr{}
}
