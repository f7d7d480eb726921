package tun_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/tun"
)

func prefixes(s string) []netip.Prefix {
	var ps []netip.Prefix
	for _, f := range strings.Fields(s) {
		ps = append(ps, netip.MustParsePrefix(f))
	}
	return ps
}

func TestMergeC18(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"10.42.2.5/24", "10.42.2.0/24"},
		{"10.0.0.0/8 10.1.0.0/16", "10.0.0.0/8"},
		{"10.1.0.0/16 10.0.0.0/8 10.0.0.0/8", "10.0.0.0/8"},
		{"10.0.0.0/9 10.128.0.0/9", "10.0.0.0/8"},
		{"10.128.0.0/9 10.0.0.0/9", "10.0.0.0/8"},
		{"10.1.0.0/16 10.2.0.0/16", "10.1.0.0/16 10.2.0.0/16"}, // neighbours, but not siblings
		{"10.1.0.0/16 10.2.0.0/16 10.3.0.0/16", "10.1.0.0/16 10.2.0.0/15"},
		{"0.0.0.0/1 128.0.0.0/1", "0.0.0.0/0"},
		{"255.255.255.255/32 255.255.255.254/32", "255.255.255.254/31"},
		{"fd00::1/128 fd00::/128", "fd00::/127"},
		{"::ffff:10.0.0.0/104", "10.0.0.0/8"},
		{"::ffff:10.0.0.0/104 10.0.0.0/8", "10.0.0.0/8"},
		{"fd00::/64 10.0.0.0/24 fd00::/48", "10.0.0.0/24 fd00::/48"},
		{"255.255.255.255/32 ::/128", "255.255.255.255/32 ::/128"}, // the end of one family is not before the other
		{"::/1 8000::/1", "::/0"},
	} {
		if got := tun.Merge(prefixes(c.in)); !slices.Equal(got, prefixes(c.want)) {
			t.Errorf("Merge(%s) = %v, want %s", c.in, got, c.want)
		}
	}
	if got := tun.Merge([]netip.Prefix{{}, netip.PrefixFrom(netip.Addr{}, 3)}); len(got) != 0 {
		t.Errorf("Merge(invalid) = %v", got)
	}
}

func TestSubtract(t *testing.T) {
	for _, c := range []struct{ from, minus, want string }{
		{"10.0.0.0/8", "", "10.0.0.0/8"},
		{"10.0.0.0/8", "10.0.0.0/8", ""},
		{"10.0.0.0/16", "10.0.0.0/8", ""},
		{"10.0.0.0/8", "10.128.0.0/9", "10.0.0.0/9"},
		{"10.0.0.0/8", "11.0.0.0/8 9.0.0.0/8 fd00::/8", "10.0.0.0/8"},
		{"10.0.0.0/30", "10.0.0.1/32", "10.0.0.0/32 10.0.0.2/31"},
		{"10.0.0.0/30", "10.0.0.1/32 10.0.0.3/32", "10.0.0.0/32 10.0.0.2/32"},
		{"0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"},
		{"0.0.0.0/0", "128.0.0.0/1", "0.0.0.0/1"},
		{"255.255.255.254/31", "255.255.255.255/32", "255.255.255.254/32"},
		{"10.0.0.0/24 10.0.2.0/24", "10.0.0.0/22", ""},
		{"10.0.0.0/24 fd00::/126", "10.0.0.0/25 fd00::/127", "10.0.0.128/25 fd00::2/127"},
		{"10.96.0.0/12", "10.96.0.1/32", "10.96.0.0/32 10.96.0.2/31 10.96.0.4/30 10.96.0.8/29 10.96.0.16/28 10.96.0.32/27 10.96.0.64/26 10.96.0.128/25 10.96.1.0/24 10.96.2.0/23 10.96.4.0/22 10.96.8.0/21 10.96.16.0/20 10.96.32.0/19 10.96.64.0/18 10.96.128.0/17 10.97.0.0/16 10.98.0.0/15 10.100.0.0/14 10.104.0.0/13"},
	} {
		if got := tun.Subtract(prefixes(c.from), prefixes(c.minus)); !slices.Equal(got, prefixes(c.want)) {
			t.Errorf("Subtract(%s, %s) = %v, want %s", c.from, c.minus, got, c.want)
		}
	}
}

func TestContains(t *testing.T) {
	ps := prefixes("10.0.0.1/8 fe80::/10 ::ffff:192.168.0.0/112")
	for a, want := range map[string]bool{
		"10.200.0.1": true, "11.0.0.1": false, "::ffff:10.0.0.1": true,
		"fe80::1%eth0": true, "fd00::1": false, "192.168.3.4": true,
	} {
		if tun.Contains(ps, netip.MustParseAddr(a)) != want {
			t.Errorf("Contains(%s) is not %v", a, want)
		}
	}
	if tun.Contains(ps, netip.Addr{}) {
		t.Error("an invalid address is contained")
	}
}

// The world of the property tests is 256 addresses at each end of each family,
// so that every one can be looked at.
var worlds = []netip.Addr{
	netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("255.255.255.0"),
	netip.MustParseAddr("::"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00"),
}

func inWorld(world, host, bits byte) netip.Prefix {
	base := worlds[int(world)%len(worlds)]
	b := base.AsSlice()
	b[len(b)-1] = host
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, base.BitLen()-int(bits)%9)
}

// check holds Merge, Subtract and Plan to what they promise, address by address.
func check(t *testing.T, from, minus []netip.Prefix) {
	t.Helper()
	merged, left := tun.Merge(from), tun.Subtract(from, minus)
	for _, base := range worlds {
		a := base
		for range 256 {
			in, out := tun.Contains(from, a), tun.Contains(minus, a)
			if tun.Contains(merged, a) != in {
				t.Fatalf("Merge(%v) = %v: wrong about %v", from, merged, a)
			}
			if tun.Contains(left, a) != (in && !out) {
				t.Fatalf("Subtract(%v, %v) = %v: wrong about %v", from, minus, left, a)
			}
			a = a.Next()
		}
	}
	for _, ps := range [][]netip.Prefix{merged, left} {
		minimal(t, ps)
		if again := tun.Merge(ps); !slices.Equal(again, ps) {
			t.Fatalf("Merge(%v) = %v is not where it ends", ps, again)
		}
	}
}

// minimal: masked, sorted, none inside another, no two that are one.
func minimal(t *testing.T, ps []netip.Prefix) {
	t.Helper()
	for i, p := range ps {
		if p != p.Masked() {
			t.Fatalf("%v has host bits", p)
		}
		for _, q := range ps[i+1:] {
			if p.Overlaps(q) || q.Addr().Less(p.Addr()) {
				t.Fatalf("%v overlap or are not sorted", ps)
			}
			if p.Bits() == q.Bits() && p.Bits() > 0 && parent(p) == parent(q) {
				t.Fatalf("%v and %v are one", p, q)
			}
		}
	}
}

func parent(p netip.Prefix) netip.Prefix { return netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked() }

func TestArithmeticC18OnRandomPrefixes(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	some := func() (ps []netip.Prefix) {
		for range rnd.IntN(12) {
			ps = append(ps, inWorld(byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32())))
		}
		return ps
	}
	for range 2000 {
		check(t, some(), some())
	}
}

func FuzzArithmetic(f *testing.F) {
	f.Add([]byte{0, 1, 8, 1, 255, 3}, []byte{2, 7, 0})
	f.Fuzz(func(t *testing.T, from, minus []byte) {
		read := func(b []byte) (ps []netip.Prefix) {
			for ; len(b) >= 3 && len(ps) < 40; b = b[3:] {
				ps = append(ps, inWorld(b[0], b[1], b[2]))
			}
			return ps
		}
		check(t, read(from), read(minus))
	})
}

// FuzzAnyPrefix takes prefixes from everywhere, invalid ones too.
func FuzzAnyPrefix(f *testing.F) {
	f.Add(slices.Repeat([]byte{10}, 60))
	f.Fuzz(func(t *testing.T, b []byte) {
		var ps []netip.Prefix
		for ; len(b) >= 18 && len(ps) < 30; b = b[18:] {
			a := netip.AddrFrom16([16]byte(b[:16]))
			if b[16]%2 == 0 {
				a = netip.AddrFrom4([4]byte(b[:4]))
			}
			ps = append(ps, netip.PrefixFrom(a, int(int8(b[17]))))
		}
		half := len(ps) / 2
		minimal(t, tun.Merge(ps))
		left := tun.Subtract(ps[:half], ps[half:])
		minimal(t, left)
		for _, p := range left {
			if tun.Contains(ps[half:], p.Addr()) || !tun.Contains(ps[:half], p.Addr()) {
				t.Fatalf("Subtract(%v, %v) = %v", ps[:half], ps[half:], left)
			}
		}
	})
}

func TestPlan(t *testing.T) {
	got := tun.Plan(prefixes("10.96.0.0/30 10.244.0.0/24 10.96.0.0/31"), prefixes("10.244.0.128/25"),
		[]netip.Addr{netip.MustParseAddr("::ffff:10.96.0.1"), netip.MustParseAddr("192.0.2.1"), {}, netip.MustParseAddr("fe80::1%eth0")})
	if want := prefixes("10.96.0.0/32 10.96.0.2/31 10.244.0.0/25"); !slices.Equal(got, want) {
		t.Errorf("Plan = %v, want %v", got, want)
	}
}

func TestConflicts(t *testing.T) {
	route := func(dst, dev, via string) tun.Route {
		r := tun.Route{Dst: netip.MustParsePrefix(dst), Device: dev}
		if via != "" {
			r.Gateway = netip.MustParseAddr(via)
		}
		return r
	}
	existing := []tun.Route{
		route("0.0.0.0/0", "eth0", "192.168.1.1"),
		route("::/0", "eth0", "fe80::1"),
		route("0.0.0.0/1", "vpn0", ""), route("128.0.0.0/1", "vpn0", ""), route("2000::/3", "vpn0", ""),
		route("169.254.0.0/16", "eth0", ""), route("224.0.0.0/4", "eth0", ""), route("fe80::/64", "eth0", ""),
		route("127.0.0.0/8", "lo", ""), route("10.96.0.10/32", "lo", ""),
		route("10.0.0.0/8", "vpn0", "10.8.0.1"),
		route("172.17.0.0/16", "docker0", ""),
		route("10.96.0.0/12", "eth1", ""),
		route("10.244.3.0/24", "eth2", "192.168.1.7"),
		route("192.168.1.0/24", "eth0", ""),
		route("fd00:10:96::/112", "eth3", ""),
		route("10.96.0.0/16", "", ""),
	}
	for _, c := range []struct{ wanted, want string }{
		{"172.16.0.0/16", ""},
		{"172.17.0.0/16", "172.17.0.0/16 overlaps the route 172.17.0.0/16 dev docker0"},
		{"192.168.1.128/25", "192.168.1.128/25 overlaps the route 192.168.1.0/24 dev eth0"},
		{"10.244.0.0/16", "10.244.0.0/16 overlaps the route 10.0.0.0/8 via 10.8.0.1 dev vpn0; 10.244.0.0/16 overlaps the route 10.244.3.0/24 via 192.168.1.7 dev eth2"},
		{"10.96.0.5/16", "10.96.0.0/16 overlaps the route 10.0.0.0/8 via 10.8.0.1 dev vpn0; 10.96.0.0/16 overlaps the route 10.96.0.0/12 dev eth1; 10.96.0.0/16 overlaps the route 10.96.0.0/16"},
		{"fd00:10:96::1/128", "fd00:10:96::1/128 overlaps the route fd00:10:96::/112 dev eth3"},
		{"fd00:10:97::/112 100.64.0.0/10", ""},
		{"169.254.169.254/32", ""},
	} {
		var got []string
		for _, x := range tun.Conflicts(prefixes(c.wanted), existing) {
			got = append(got, x.String())
		}
		if s := strings.Join(got, "; "); s != c.want {
			t.Errorf("Conflicts(%s) =\n%s, want\n%s", c.wanted, s, c.want)
		}
	}
}

func TestFreeAddrs(t *testing.T) {
	for _, c := range []struct{ taken, v4, v6 string }{
		{"", "198.18.0.1", "fd63:756c:7665:7274::1"},
		{"0.0.0.0/0 ::/0 192.168.0.0/16", "198.18.0.1", "fd63:756c:7665:7274::1"},
		{"198.18.0.1/32 fd63:756c:7665:7274::1/128", "198.18.0.2", "fd63:756c:7665:7274::2"},
		{"198.18.0.0/24", "198.18.1.1", "fd63:756c:7665:7274::1"},
		{"198.18.0.0/16", "198.19.0.1", "fd63:756c:7665:7274::1"},
		{"198.18.0.0/15 fd63:756c:7665:7274::/64", "100.64.0.1", "fd63:756c:7665:7275::1"},
		{"128.0.0.0/2 100.0.0.0/6 192.0.0.0/2 fc00::/7", "", ""},
	} {
		v4, v6 := tun.FreeAddrs(prefixes(c.taken))
		if s := str(v4); s != c.v4 {
			t.Errorf("FreeAddrs(%s): v4 %s, want %s", c.taken, s, c.v4)
		}
		if s := str(v6); s != c.v6 {
			t.Errorf("FreeAddrs(%s): v6 %s, want %s", c.taken, s, c.v6)
		}
	}
}

func str(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func FuzzFreeAddrs(f *testing.F) {
	f.Add([]byte{198, 18, 0, 1, 32})
	f.Fuzz(func(t *testing.T, b []byte) {
		var taken []netip.Prefix
		for ; len(b) >= 5; b = b[5:] {
			a := netip.AddrFrom4([4]byte(b[:4]))
			taken = append(taken, netip.PrefixFrom(a, 2+int(b[4])%31))
		}
		v4, v6 := tun.FreeAddrs(taken)
		if v4.IsValid() && (tun.Contains(taken, v4) || binary.BigEndian.Uint32(v4.AsSlice())&0xff == 0) {
			t.Fatalf("%v is taken by %v", v4, taken)
		}
		if !v6.IsValid() {
			t.Fatal("no IPv6 address is free, though none is taken")
		}
	})
}
