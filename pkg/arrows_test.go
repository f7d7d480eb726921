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
	{"manifests", "pkg/catalog", "pkg/channel/internal/deadline", "pkg/resolver/resolvertest", "pkg/strangers", "pkg/cgroup", "pkg/cli/talk", "pkg/consul", "pkg/consul/consultest"},
	{"pkg/ca", "pkg/ca/catest"},
	{"pkg/channel", "pkg/dns/dnstest"},
	{"pkg/relay", "pkg/process", "pkg/fdpass", "pkg/channel/memchan"},
	{"pkg/channel/internal/wiring", "pkg/channel/channeltest", "pkg/release"},
	{"pkg/channel/internal/signalling", "pkg/channel/internal/mux", "pkg/channel/resume"},
	{"pkg/channel/sshchan", "pkg/channel/tlschan", "pkg/channel/wiretest"},
	{"pkg/netstack"},
	{"pkg/channel/wgchan", "pkg/channel/openssh"},
	{"pkg/channel/wires"},
	{"pkg/tun", "pkg/dns", "pkg/resolver", "pkg/router", "pkg/redirect", "pkg/proxy", "pkg/kube/heal", "pkg/deploy"},
	{"pkg/kube", "pkg/hub"},
	{"pkg/privileged", "pkg/sandbox", "pkg/shadow"},
	{"pkg/session", "pkg/cli/hubs"},
	{"pkg/cli/rollouts"},
	{"pkg/cli"},
	{"cmd/culvert", "cmd/shadow", "cmd/hub"},
}

// fences says which packages may import a library, by prefix.
var fences = map[string][]string{
	"k8s.io/":                     {"pkg/kube"},
	"gvisor.dev/":                 {"pkg/netstack", "pkg/channel/wgchan"},
	"golang.zx2c4.com/":           {"pkg/channel/wgchan"},
	"filippo.io/":                 {"pkg/channel/wgchan"},
	"golang.org/x/crypto/ssh":     {"pkg/channel/sshchan", "pkg/channel/tlschan", "pkg/hub", "pkg/ca"}, // in tlschan it reads the keys
	"github.com/coreos/go-oidc":   {"pkg/ca"},
	"github.com/go-jose/":         {"pkg/ca/catest"},
	"go.yaml.in/":                 {"pkg/ca", "pkg/release"},
	"github.com/miekg/dns":        {"pkg/dns", "pkg/dns/dnstest", "pkg/resolver/resolvertest"},
	"github.com/spf13/":           {"pkg/cli", "pkg/cli/hubs", "pkg/cli/rollouts", "pkg/cli/talk"},
	"github.com/goccy/":           {"pkg/deploy"},
	"github.com/google/jsonschem": {"pkg/deploy"},
	"github.com/jotfs/":           {"pkg/deploy"},
	"github.com/godbus/":          {"pkg/resolver", "pkg/resolver/resolvertest"},
	"github.com/vishvananda/":     {"pkg/tun", "pkg/redirect", "pkg/channel/channeltest"},
	"github.com/google/nftables":  {"pkg/redirect"},
	"github.com/mdlayher/":        {"pkg/redirect"},
	"github.com/google/go-contai": {"images"},
	"github.com/prometheus/":      {"pkg/hub"},
	"github.com/pires/":           {"pkg/hub"},
	"github.com/hashicorp/":       {"pkg/consul"},
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

// lean are the programs of images, and what is not to be linked into them: the cluster's
// client is most of culvert itself.
var lean = map[string][]string{
	"cmd/shadow": {"pkg/kube", "pkg/session"},
	"cmd/hub":    {"pkg/kube", "pkg/kube/heal", "pkg/session", "pkg/netstack", "pkg/channel/wgchan"},
}

func TestLean(t *testing.T) {
	imported := imports(t)
	for program, heavy := range lean {
		linked := map[string]bool{}
		for found := []string{program}; len(found) > 0; {
			pkg := found[0]
			found, linked[pkg] = found[1:], true
			for p := range imported[pkg] {
				if ours, is := strings.CutPrefix(p, module); is && !linked[ours] {
					found = append(found, ours)
				}
			}
		}
		if len(linked) < 3 {
			t.Errorf("%s links %v", program, linked)
		}
		for _, h := range heavy {
			if linked[h] {
				t.Errorf("%s links %s", program, h)
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
