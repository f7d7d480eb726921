package resolver

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestSources(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                  {"dns", "files"},
		"passwd: files\nhosts: files dns\n": {"files", "dns"},
		" hosts:\tfiles mymachines resolve [!UNAVAIL=return] dns # hosts: none\n":          {"files", "mymachines", "resolve", "dns"},
		"# hosts: dns\nhosts: files mdns4_minimal [NOTFOUND=return SUCCESS=continue]dns\n": {"files", "mdns4_minimal", "dns"},
		"hosts: files [unclosed": {"files"},
	} {
		if got := sources(text); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestAsked(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r := New(Config{Root: root})
	if got, err := r.Asked(); err != nil || !reflect.DeepEqual(got, Asked{Sources: []string{"dns", "files"}}) {
		t.Errorf("nothing there: %+v, %v", got, err)
	}
	write("etc/resolv.conf", "nameserver 198.18.0.1\nnameserver 192.0.2.1\n")
	write("etc/nsswitch.conf", "hosts: files\n")
	write("var/run/nscd/socket", "")
	want := Asked{Cache: true, Sources: []string{"files"}, Servers: []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("192.0.2.1")}}
	if got, err := r.Asked(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}
