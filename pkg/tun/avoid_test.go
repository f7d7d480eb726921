package tun

import (
	"net/netip"
	"reflect"
	"testing"
)

func prefixList(texts ...string) (all []netip.Prefix) {
	for _, t := range texts {
		all = append(all, netip.MustParsePrefix(t))
	}
	return all
}

func TestAround(t *testing.T) {
	for name, c := range map[string]struct {
		wanted   string
		existing []string
		own      []string
		how      Avoid
		want     Ways
	}{
		"C16 the LAN has a part of it": {"10.96.0.0/16", []string{"10.96.7.0/24"}, []string{"10.96.7.0/24"}, Either,
			Ways{Whole: Subtract(prefixList("10.96.0.0/16"), prefixList("10.96.7.0/24")), Mapped: prefixList("10.96.7.0/24")}},
		"C16 a VPN has all of ten": {"10.96.0.0/16", []string{"10.0.0.0/8"}, []string{"10.8.0.0/24"}, Either,
			Ways{Exact: prefixList("10.96.0.0/16")}},
		"the LAN is wider":        {"10.96.0.0/16", []string{"10.0.0.0/8"}, []string{"10.0.0.0/8"}, Either, Ways{Mapped: prefixList("10.96.0.0/16")}},
		"the same":                {"10.96.0.0/16", []string{"10.96.0.0/16"}, nil, Either, Ways{Mapped: prefixList("10.96.0.0/16")}},
		"exact by wish":           {"10.96.0.0/16", []string{"10.96.0.0/16"}, nil, Exact, Ways{Exact: prefixList("10.96.0.0/16")}},
		"map by wish":             {"10.96.0.0/16", []string{"10.0.0.0/8"}, nil, Map, Ways{Mapped: prefixList("10.96.0.0/16")}},
		"a VPN, and Docker in it": {"172.16.0.0/12", []string{"172.16.0.0/11", "172.17.0.0/16"}, []string{"172.17.0.0/16"}, Either, Ways{Mapped: prefixList("172.17.0.0/16"), Exact: Subtract(prefixList("172.16.0.0/12"), prefixList("172.17.0.0/16"))}},
		"IPv6, a part of it":      {"fd00:10:96::/112", []string{"fd00:10:96::8000/113"}, nil, Either, Ways{Whole: prefixList("fd00:10:96::/113"), Mapped: prefixList("fd00:10:96::8000/113")}},
	} {
		var found []Conflict
		for _, e := range c.existing {
			found = append(found, Conflict{netip.MustParsePrefix(c.wanted), Route{Dst: netip.MustParsePrefix(e)}})
		}
		if got := Around(netip.MustParsePrefix(c.wanted), found, prefixList(c.own...), c.how); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestMapping(t *testing.T) {
	for _, c := range []struct{ real, as, addr, shown string }{
		{"10.96.0.0/16", "198.18.0.0/16", "10.96.3.4", "198.18.3.4"},
		{"10.96.16.0/20", "198.18.32.0/20", "10.96.31.255", "198.18.47.255"},
		{"10.96.0.10/32", "198.18.0.1/32", "10.96.0.10", "198.18.0.1"},
		{"fd00:10:96::/112", "fd63:756c:7665::/112", "fd00:10:96::a:b", ""},
		{"fd00:10:96::/112", "fd63:756c:7665::/112", "fd00:10:96::ab", "fd63:756c:7665::ab"},
	} {
		m := Mapping{netip.MustParsePrefix(c.real), netip.MustParsePrefix(c.as)}
		addr := netip.MustParseAddr(c.addr)
		shown, ok := m.Shown(addr)
		if ok != (c.shown != "") || ok && shown.String() != c.shown {
			t.Errorf("%v: %v is shown as %v, %v", m, addr, shown, ok)
		}
		if back, _ := m.Meant(shown); ok && back != addr {
			t.Errorf("%v: %v means %v", m, shown, back)
		}
	}
}

func TestFreePrefix(t *testing.T) {
	for _, c := range []struct {
		real  string
		taken []string
		want  string
	}{
		{"10.96.0.0/16", nil, "198.18.0.0/16"},
		{"10.96.0.0/16", []string{"198.18.0.1/32"}, "198.19.0.0/16"},
		{"10.96.0.0/12", []string{"198.18.0.1/32"}, "100.64.0.0/12"},
		{"10.96.0.0/12", []string{"198.18.0.1/32", "100.100.100.100/32"}, "240.0.0.0/12"}, // Tailscale's
		{"10.0.0.0/8", nil, "240.0.0.0/8"},
		{"0.0.0.0/4", nil, ""},
		{"fd00::/64", []string{"fd63:756c:7665:7274::1/128"}, "fd63:756c:7665::/64"},
	} {
		got, err := FreePrefix(netip.MustParsePrefix(c.real), prefixList(c.taken...))
		if (err == nil) != (c.want != "") || err == nil && got.String() != c.want {
			t.Errorf("%s: %v, %v, want %s", c.real, got, err, c.want)
		}
	}
}
