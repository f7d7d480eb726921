package resolver

import (
	"reflect"
	"testing"
)

func TestParseEntry(t *testing.T) {
	want := entry{ModeFile, Settings{Link: "culvert0", LinkIndex: 7, Server: shop.Server, Search: shop.Search}}
	if got, ok := parseEntry(entry{ModeFile, shop}.render()); !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, text := range []string{
		"",
		"nameserver 198.18.0.1\n",
		"# written by culvert for culvert0 7\nnameserver 198.18.0.1\n",
		"# written by culvert for culvert0 x resolv.conf\nnameserver 198.18.0.1\n",
		"# written by culvert for culvert0 7 resolv.conf\n",
		"# written by culvert for culvert0 7 resolv.conf\nnameserver 198.18.0.1\nnameserver 198.18.0.2\n",
	} {
		if got, ok := parseEntry([]byte(text)); ok {
			t.Errorf("%q is %+v", text, got)
		}
	}
}

// TestEntries: a file that is no entry is nobody's, one that cannot be read as
// an entry counts for nothing, and the last to come is first.
func TestEntries(t *testing.T) {
	cfg, p := etc(t, original)
	for i, link := range []string{"culvert2", "culvert0", "culvert1"} {
		s := shop
		s.Link, s.LinkIndex = link, 10+i
		f := &file{paths: p, mode: ModeFile, log: New(cfg).cfg.Log}
		must(t, f.enter(entry{ModeFile, s}))
		t.Cleanup(f.letGo)
	}
	write(t, p.conf+entrySuffix+"x", "whatever")
	write(t, p.conf+".culvert-forward", "whatever")
	living, dead, err := p.entries()
	if err != nil || len(living) != 3 || living[0].Link != "culvert1" || living[2].Link != "culvert2" {
		t.Errorf("living %+v, %v", living, err)
	}
	if len(dead) != 1 || dead[0] != p.conf+entrySuffix+"x" {
		t.Errorf("dead %v", dead)
	}
}

func TestParseList(t *testing.T) {
	got := parseList("# resolv.conf from eth0\nnameserver 10.0.0.2\nsearch corp.example\noptions edns0\n\n" +
		"# resolv.conf from culvert\n# written by culvert for culvert0\nnameserver 198.18.0.1\nsearch shop.svc.cluster.local\n\n" +
		"# resolv.conf from wlan0.dhcp\nnameserver 10.0.0.3\nnameserver 10.0.0.4\nnameserver fe80::1%wlan0\ndomain lan\n\n")
	want := conf{addrs("10.0.0.2", "10.0.0.3", "10.0.0.4", "fe80::1%wlan0"), []string{"corp.example", "lan"}, []string{"options edns0"}}
	if !sameConf(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := parseList(""); !sameConf(got, conf{}) {
		t.Errorf("of nothing %+v", got)
	}
}
