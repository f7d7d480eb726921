package resolver

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

var shop = Settings{
	Link: "culvert0", LinkIndex: 7, Server: netip.MustParseAddr("198.18.0.1"),
	Search: []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local"},
	Zones:  []string{"cluster.local", "svc", "shop", "10.in-addr.arpa"},
}

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestParseConf(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want conf
	}{
		"empty":            {"", conf{}},
		"usual":            {"nameserver 10.0.0.2\nsearch corp.example lan\noptions ndots:2 edns0\n", conf{addrs("10.0.0.2"), []string{"corp.example", "lan"}, []string{"options ndots:2 edns0"}}},
		"no last newline":  {"nameserver 10.0.0.2", conf{Servers: addrs("10.0.0.2")}},
		"tabs and spaces":  {"nameserver\t 10.0.0.2 \nsearch\ta  b\n", conf{Servers: addrs("10.0.0.2"), Search: []string{"a", "b"}}},
		"comments":         {"# nameserver 1.1.1.1\n; nameserver 1.1.1.1\n nameserver 1.1.1.1\nnameserver 10.0.0.2 # here\n", conf{Servers: addrs("10.0.0.2")}},
		"last search wins": {"domain a.b\nsearch c d\n", conf{Search: []string{"c", "d"}}},
		"last domain wins": {"search c d\ndomain a.b x\n", conf{Search: []string{"a.b"}}},
		"three servers":    {"nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4\n", conf{Servers: addrs("1.1.1.1", "1.1.1.2", "1.1.1.3")}},
		"IPv6, with zone":  {"nameserver 2001:db8::1\nnameserver fe80::1%eth0\n", conf{Servers: addrs("2001:db8::1", "fe80::1%eth0")}},
		"bad addresses":    {"nameserver dns.example\nnameserver\nnameserver 10.0.0\n", conf{}},
		"carriage returns": {"nameserver 10.0.0.2\r\nsearch a\r\n", conf{Servers: addrs("10.0.0.2"), Search: []string{"a"}}},
		"more options":     {"options a\noptions b\nsortlist 10.0.0.0/8\n", conf{Other: []string{"options a", "options b", "sortlist 10.0.0.0/8"}}},
	} {
		if got := parseConf([]byte(c.text)); !sameConf(got, c.want) {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

func sameConf(a, b conf) bool {
	return slices.Equal(a.Servers, b.Servers) && slices.Equal(a.Search, b.Search) && slices.Equal(a.Other, b.Other)
}

func TestRender(t *testing.T) {
	orig := parseConf([]byte("nameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example\noptions ndots:2 rotate\n"))
	got := string(orig.with(shop).render(mark("culvert0", "1234") + "\n"))
	want := `# written by culvert for culvert0 1234
nameserver 198.18.0.1
search shop.svc.cluster.local svc.cluster.local cluster.local corp.example
options ndots:2 rotate
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if id := markOf([]byte(got)); id != "culvert0 1234" {
		t.Errorf("mark %q", id)
	}
}

func TestJoinSearch(t *testing.T) {
	long := strings.Repeat("a", 60) + ".example"
	many := []string{"1.x", "2.x", "3.x", "4.x", "5.x", "6.x", "7.x"}
	for name, c := range map[string]struct{ ours, theirs, want []string }{
		"both":                  {[]string{"a"}, []string{"b"}, []string{"a", "b"}},
		"each once":             {[]string{"a", "b"}, []string{"B.", "c"}, []string{"a", "b", "c"}},
		"six at most":           {[]string{"a", "b", "c"}, []string{"d", "e", "f", "g"}, []string{"a", "b", "c", "d", "e", "f"}},
		"as long as a line":     {[]string{long}, []string{"b" + long, "c" + long, "d" + long}, []string{long, "b" + long, "c" + long}},
		"theirs was beyond":     {[]string{"a"}, many, append([]string{"a"}, many...)},
		"nothing of theirs":     {[]string{"a"}, nil, []string{"a"}},
		"nothing of ours":       {nil, []string{"a"}, []string{"a"}},
		"ours alone is too big": {many, nil, many[:6]},
	} {
		if got := joinSearch(c.ours, c.theirs); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func TestMarkOf(t *testing.T) {
	for text, want := range map[string]string{
		"":                                  "",
		"# written by culvert for x":        "", // cut off
		"# written by culvert for x 1\n":    "x 1",
		"\n# written by culvert for x\n":    "",
		" # written by culvert for x\n":     "",
		"nameserver 1.1.1.1\n":              "",
		"# written by culvert for x\nmore":  "x",
		"# Written by Culvert for x\nmore":  "",
		"# written by culvert for \nmore\n": "",
	} {
		if got := markOf([]byte(text)); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

// FuzzResolvConf: whatever an original says, what we write is read again as
// meant, and names no server but ours.
func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 10.0.0.2\nsearch corp.example lan\noptions ndots:2\n"))
	f.Add([]byte("domain a\n\x00search \xff\xfe\noptions\n# written by culvert for x\n"))
	f.Add([]byte("search " + strings.Repeat("a.b ", 300) + "\nnameserver fe80::1%eth0"))
	f.Fuzz(func(t *testing.T, text []byte) {
		orig := parseConf(text)
		if len(orig.Servers) > confServers {
			t.Fatalf("%d servers", len(orig.Servers))
		}
		want := orig.with(shop)
		out := want.render(mark("culvert0", "1234") + "\n")
		if got := parseConf(out); !sameConf(got, want) {
			t.Fatalf("wrote %+v, read %+v from %q", want, got, out)
		}
		if markOf(out) != "culvert0 1234" || bytes.Count(out, []byte("nameserver ")) < 1 {
			t.Fatalf("mark of %q", out)
		}
		if len(want.Search) == 0 || want.Search[0] != shop.Search[0] || !slices.Equal(want.Servers, []netip.Addr{shop.Server}) {
			t.Fatalf("ours is not in front: %+v", want)
		}
		if fits(orig.Search) && !fits(want.Search) {
			t.Fatalf("search outgrew its bounds: %v", want.Search)
		}
	})
}
