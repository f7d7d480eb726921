package tun

import (
	"net/netip"
	"slices"
)

// Merge returns the smallest list of prefixes that holds exactly the addresses
// of ps: host bits are masked, mapped IPv4 is IPv4, what is covered is dropped
// and neighbours are joined. IPv4 comes first, each family in order. Invalid
// prefixes hold no address.
func Merge(ps []netip.Prefix) []netip.Prefix {
	return cover(spans(ps))
}

// Subtract returns the smallest list of prefixes that holds exactly the
// addresses of from which are not in minus.
func Subtract(from, minus []netip.Prefix) []netip.Prefix {
	var left []span
	holes := spans(minus)
	for _, s := range spans(from) {
		left = append(left, s.without(holes)...)
	}
	return cover(left)
}

// Contains tells whether a is in one of ps. A zone does not matter, and mapped
// IPv4 is IPv4.
func Contains(ps []netip.Prefix, a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool {
		return normal(p).Contains(a)
	})
}

// A span is all addresses from lo to hi, both of them included and of one
// family.
type span struct{ lo, hi netip.Addr }

// without returns s less the holes, which are sorted and apart.
func (s span) without(holes []span) []span {
	var left []span
	for _, h := range holes {
		if h.lo.BitLen() != s.lo.BitLen() || h.hi.Less(s.lo) {
			continue
		}
		if s.hi.Less(h.lo) {
			break
		}
		if s.lo.Less(h.lo) {
			left = append(left, span{s.lo, h.lo.Prev()})
		}
		if !h.hi.Less(s.hi) {
			return left
		}
		s.lo = h.hi.Next()
	}
	return append(left, s)
}

// normal returns p masked, as IPv4 where it is mapped IPv4.
func normal(p netip.Prefix) netip.Prefix {
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked()
}

// spans returns what ps hold as spans, sorted and apart: between any two of
// them is an address that is in neither.
func spans(ps []netip.Prefix) []span {
	all := make([]span, 0, len(ps))
	for _, p := range ps {
		if p = normal(p); p.IsValid() {
			all = append(all, span{p.Addr(), last(p)})
		}
	}
	slices.SortFunc(all, func(a, b span) int { return a.lo.Compare(b.lo) })

	apart := all[:0]
	for _, s := range all {
		if n := len(apart); n > 0 && apart[n-1].touches(s) {
			if apart[n-1].hi.Less(s.hi) {
				apart[n-1].hi = s.hi
			}
			continue
		}
		apart = append(apart, s)
	}
	return apart
}

// touches tells whether s, which does not begin after t, overlaps t or ends
// right before it.
func (s span) touches(t span) bool {
	if s.lo.BitLen() != t.lo.BitLen() {
		return false
	}
	return !s.hi.Less(t.lo) || s.hi.Next() == t.lo
}

// cover returns the fewest prefixes that hold exactly the spans.
func cover(ss []span) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range ss {
		for {
			p := widest(s)
			ps = append(ps, p)
			end := last(p)
			if end == s.hi {
				break
			}
			s.lo = end.Next()
		}
	}
	return ps
}

// widest returns the widest prefix that begins where s does and stays inside.
func widest(s span) netip.Prefix {
	p := netip.PrefixFrom(s.lo, s.lo.BitLen())
	for p.Bits() > 0 {
		wider := netip.PrefixFrom(s.lo, p.Bits()-1)
		if wider.Masked().Addr() != s.lo || s.hi.Less(last(wider)) {
			break
		}
		p = wider
	}
	return p
}

// last returns the last address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
