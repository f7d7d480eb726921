package tun

import (
	"fmt"
	"net/netip"
	"slices"
)

// An Avoid is what to do about addresses that are the cluster's, and this machine's
// network's as well.
type Avoid string

const (
	Refuse Avoid = "refuse" // to begin
	Exact  Avoid = "exact"  // route those that somebody in the cluster has now, and no others
	Map    Avoid = "map"    // reach them under other addresses, which names lead to
	Either Avoid = "auto"   // Exact where that hides nothing that is known, else Map
)

// A Mapping has the addresses of Real reached under those of As, in the same order. Both
// are of one size and family.
type Mapping struct{ Real, As netip.Prefix }

// Shown is the address under which a is reached.
func (m Mapping) Shown(a netip.Addr) (netip.Addr, bool) { return translate(m.Real, m.As, a) }

// Real is the address that is reached under a.
func (m Mapping) Meant(a netip.Addr) (netip.Addr, bool) { return translate(m.As, m.Real, a) }

func translate(from, to netip.Prefix, a netip.Addr) (netip.Addr, bool) {
	if a = a.Unmap(); !from.Contains(a) {
		return a, false
	}
	host, net := a.AsSlice(), to.Masked().Addr().AsSlice()
	for i := range host {
		mask := byte(0xff)
		if bits := to.Bits() - 8*i; bits > 0 {
			mask >>= min(bits, 8)
		}
		host[i] = net[i]&^mask | host[i]&mask
	}
	out, ok := netip.AddrFromSlice(host)
	return out, ok
}

// Ways are how the addresses of one wanted prefix are reached.
type Ways struct {
	Whole  []netip.Prefix // as they are
	Exact  []netip.Prefix // only those of them that somebody has
	Mapped []netip.Prefix // under others
}

// Around decides for a wanted prefix and what overlaps it. own are the machine's own
// addresses with their networks: a neighbour there may have any address, so that Either
// maps those, and what is as narrow as the wanted prefix, which was meant exactly. A
// wider route, as a VPN makes for a whole company, does not say who is there. One in a
// table before the main one, as Tailscale makes, is taken whatever routes we have.
func Around(wanted netip.Prefix, found []Conflict, own []netip.Prefix, how Avoid) Ways {
	var w Ways
	var taken []netip.Prefix
	for _, c := range found {
		overlap := normal(c.Existing.Dst)
		wider := overlap.Bits() < wanted.Bits()
		if wider {
			overlap = wanted
		}
		taken = append(taken, overlap)
		if how == Exact || how == Either && wider && c.Existing.Table == 0 && !slices.Contains(own, normal(c.Existing.Dst)) {
			w.Exact = append(w.Exact, overlap)
		} else {
			w.Mapped = append(w.Mapped, overlap)
		}
	}
	w.Whole = Subtract([]netip.Prefix{wanted}, taken)
	w.Mapped = Merge(w.Mapped)
	w.Exact = Subtract(w.Exact, w.Mapped)
	return w
}

// Pools for Mapped addresses, beside those that the device's own are taken from.
var (
	mapPools4 = [...]string{"198.18.0.0/15", "100.64.0.0/10", "240.0.0.0/5"}
	mapPools6 = [...]string{"fd63:756c:7665::/48"}
)

// FreePrefix finds one of the same size as real that overlaps nothing that is taken.
func FreePrefix(real netip.Prefix, taken []netip.Prefix) (netip.Prefix, error) {
	pools := mapPools4[:]
	if real.Addr().Is6() {
		pools = mapPools6[:]
	}
	holes := holesOf(taken)
	for _, pool := range pools {
		for _, p := range Subtract([]netip.Prefix{netip.MustParsePrefix(pool)}, holes) {
			if p.Bits() <= real.Bits() {
				return netip.PrefixFrom(p.Addr(), real.Bits()), nil
			}
		}
	}
	return netip.Prefix{}, fmt.Errorf("no range as large as %v is free on this machine", real)
}
