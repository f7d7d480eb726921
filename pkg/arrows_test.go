package pkg

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/culvert-dev/culvert/"

// layers is the map of doc.go, lowest first. A package imports only from
// layers below its own.
var layers = [][]string{
	{"manifests", "pkg/catalog", "pkg/channel/internal/deadline", "pkg/resolver/resolvertest"},
	{"pkg/channel", "pkg/dns/dnstest"},
	{"pkg/relay", "pkg/process", "pkg/channel/memchan"},
	{"pkg/channel/internal/wiring", "pkg/channel/channeltest"},
	{"pkg/channel/sshchan", "pkg/channel/tlschan", "pkg/channel/wiretest"},
	{"pkg/channel/wires"},
	{"pkg/tun", "pkg/netstack", "pkg/dns", "pkg/resolver", "pkg/router", "pkg/redirect", "pkg/kube/heal"},
	{"pkg/kube"},
	{"pkg/privileged", "pkg/shadow"},
	{"pkg/session"},
	{"pkg/cli"},
	{"cmd/culvert", "cmd/shadow"},
}

// fences says which packages may import a library, by prefix.
var fences = map[string][]string{
	"k8s.io/":                     {"pkg/kube"},
	"gvisor.dev/":                 {"pkg/netstack"},
	"golang.zx2c4.com/":           {"pkg/tun", "pkg/netstack"},
	"golang.org/x/crypto/ssh":     {"pkg/channel/sshchan", "pkg/channel/tlschan"}, // there it reads the keys
	"github.com/libp2p/":          {"pkg/channel/tlschan"},
	"github.com/miekg/dns":        {"pkg/dns", "pkg/dns/dnstest", "pkg/resolver/resolvertest"},
	"github.com/spf13/":           {"pkg/cli"},
	"github.com/godbus/":          {"pkg/resolver", "pkg/resolver/resolvertest"},
	"github.com/vishvananda/":     {"pkg/tun", "pkg/redirect", "pkg/channel/channeltest"},
	"github.com/google/nftables":  {"pkg/redirect"},
	"github.com/mdlayher/":        {"pkg/redirect"},
	"github.com/google/go-contai": {"images"},
}

// noRoom are names that say nothing of what is in a room.
var noRoom = []string{"util", "utils", "common", "helper", "helpers", "types", "manager", "handler", "core", "base", "misc"}

func layerOf(pkg string) int {
	for i, l := range layers {
		if slices.Contains(l, pkg) {
			return i
		}
	}
	return -1
}

// imports returns, for each package folder, what its files import, whatever
// the OS they are for. Tests may reach anywhere.
func imports(t *testing.T) map[string]map[string]bool {
	t.Helper()
	found := map[string]map[string]bool{}
	for _, top := range []string{"pkg", "cmd", "manifests", "images"} {
		err := filepath.WalkDir(filepath.Join("..", top), func(file string, d fs.DirEntry, err error) error {
			if d != nil && d.Name() == "testdata" {
				return fs.SkipDir
			}
			if err != nil || d.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			if err != nil {
				return err
			}
			pkg := path.Dir(strings.TrimPrefix(filepath.ToSlash(file), "../"))
			if found[pkg] == nil {
				found[pkg] = map[string]bool{}
			}
			for _, i := range f.Imports {
				p, _ := strconv.Unquote(i.Path.Value)
				found[pkg][p] = true
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func TestArrowsPointDown(t *testing.T) {
	for pkg, imported := range imports(t) {
		if pkg == "pkg" || pkg == "images" {
			continue
		}
		from := layerOf(pkg)
		if from < 0 {
			t.Errorf("%s is not on the map in doc.go and arrows_test.go", pkg)
			continue
		}
		for p := range imported {
			to, ours := strings.CutPrefix(p, module)
			if !ours {
				continue
			}
			if l := layerOf(to); l < 0 || l >= from {
				t.Errorf("%s imports %s, which is not below it", pkg, to)
			}
		}
	}
}

func TestFences(t *testing.T) {
	for pkg, imported := range imports(t) {
		for p := range imported {
			for prefix, rooms := range fences {
				if strings.HasPrefix(p, prefix) && !slices.Contains(rooms, pkg) {
					t.Errorf("%s imports %s, which is kept to %v", pkg, p, rooms)
				}
			}
		}
	}
}

func TestRoomNames(t *testing.T) {
	for pkg := range imports(t) {
		if slices.Contains(noRoom, path.Base(pkg)) {
			t.Errorf("%s: the name does not say what is inside", pkg)
		}
	}
}
