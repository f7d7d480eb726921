package privileged

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// errRefused says that a request is not one that the child would ever do.
var errRefused = errors.New("refused")

const (
	namePrefix = "culvert"
	maxAddrs   = 8

	// Prefixes shorter than these are no cluster's; several together would be
	// a default route.
	minBits4 = 8
	minBits6 = 16
)

// MaxRoutes is how many SetRoutes takes.
const MaxRoutes = 4096

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errRefused}, args...)...)
}

func (t TUN) check() error {
	switch {
	case !validName(t.Name):
		return refuse("device name %q is not %s and then letters, digits or -", t.Name, namePrefix)
	case t.MTU < 1280 || t.MTU > 65535:
		return refuse("mtu %d is not between 1280 and 65535", t.MTU)
	case len(t.Addrs) == 0 || len(t.Addrs) > maxAddrs:
		return refuse("%d addresses, not between 1 and %d", len(t.Addrs), maxAddrs)
	}
	for _, a := range t.Addrs {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() {
			return refuse("address %v", a)
		}
		if why := reserved(netip.PrefixFrom(a, a.BitLen())); why != "" {
			return refuse("address %v is %s", a, why)
		}
	}
	return nil
}

// validName lets no request touch or pose as a device that is not ours.
func validName(name string) bool {
	rest, ours := strings.CutPrefix(name, namePrefix)
	return name == "" || ours && len(name) <= 15 && !strings.ContainsFunc(rest, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	})
}

// CheckRoutes is what SetRoutes says of all, before there is a child to ask.
func CheckRoutes(all []netip.Prefix) error {
	if len(all) > MaxRoutes {
		return refuse("%d routes, at most %d", len(all), MaxRoutes)
	}
	for _, p := range all {
		if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
			return refuse("route %v", p)
		}
		if p.Addr().Is4() && p.Bits() < minBits4 || p.Addr().Is6() && p.Bits() < minBits6 {
			return refuse("route %v is wider than /%d (IPv4) or /%d (IPv6)", p, minBits4, minBits6)
		}
		if why := reserved(p); why != "" {
			return refuse("route %v is in %s", p, why)
		}
	}
	return nil
}

// never are addresses that no tunnel carries.
var never = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
	{netip.MustParsePrefix("::/16"), "loopback and mapped addresses"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

func reserved(p netip.Prefix) string {
	for _, n := range never {
		if n.prefix.Overlaps(p) {
			return n.what
		}
	}
	return ""
}
