package privileged

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/fdpass"
)

func TestCommand(t *testing.T) {
	self := []string{"/opt/culvert", "privileged"}
	sudoAsks := append([]string{"/usr/bin/sudo", "-p", prompt, "--"}, self...)
	sudoMute := append([]string{"/usr/bin/sudo", "-n", "--"}, self...)
	pkexec := append([]string{"/usr/bin/pkexec"}, self...)
	for name, c := range map[string]struct {
		world World
		want  []string
	}{
		"root":                          {World{EUID: 0}, self},
		"root with sudo":                {World{EUID: 0, Sudo: "/usr/bin/sudo", TTY: true}, self},
		"file capabilities":             {World{EUID: 1000, Capable: true, Sudo: "/usr/bin/sudo", TTY: true}, self},
		"sudo on a terminal":            {World{EUID: 1000, Sudo: "/usr/bin/sudo", TTY: true}, sudoAsks},
		"sudo, all there is":            {World{EUID: 1000, Sudo: "/usr/bin/sudo", Pkexec: "/usr/bin/pkexec", TTY: true, Display: true}, sudoAsks},
		"sudo in a pipeline":            {World{EUID: 1000, Sudo: "/usr/bin/sudo"}, sudoMute},
		"pkexec on a desktop":           {World{EUID: 1000, Sudo: "/usr/bin/sudo", Pkexec: "/usr/bin/pkexec", Display: true}, pkexec},
		"pkexec on a terminal":          {World{EUID: 1000, Pkexec: "/usr/bin/pkexec", TTY: true}, pkexec},
		"pkexec with nowhere to ask":    {World{EUID: 1000, Pkexec: "/usr/bin/pkexec"}, nil},
		"neither":                       {World{EUID: 1000, TTY: true, Display: true}, nil},
		"an OS without user identities": {World{EUID: -1}, nil},
	} {
		c.world.Self = self[0]
		got, err := Command(c.world)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
		if c.want == nil && (!errors.Is(err, ErrNotPermitted) || !errors.Is(err, os.ErrPermission)) {
			t.Errorf("%s: %v", name, err)
		}
		if c.want != nil && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	mute, err := Command(World{Self: self[0], EUID: 1000, Sudo: "/usr/bin/sudo", TTY: true, Display: true}.quietly())
	if err != nil || !slices.Equal(mute, sudoMute) {
		t.Errorf("quietly: %q, %v", mute, err)
	}
}

// TestImports holds the fence: what runs as root contains little.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Skipf("go list: %v", err)
	}
	allowed := []string{
		"github.com/culvert-dev/culvert/pkg/privileged", "github.com/culvert-dev/culvert/pkg/resolver",
		"github.com/culvert-dev/culvert/pkg/tun", "github.com/godbus/dbus/", "github.com/vishvananda/",
		"golang.org/x/sys/", "github.com/culvert-dev/culvert/pkg/fdpass",
	}
	for pkg := range strings.Lines(string(out)) {
		pkg = strings.TrimSpace(pkg)
		host, _, _ := strings.Cut(pkg, "/")
		std := !strings.Contains(host, ".")
		if !std && !slices.ContainsFunc(allowed, func(p string) bool { return strings.HasPrefix(pkg, p) }) {
			t.Errorf("%s is linked into what runs as root", pkg)
		}
		if pkg == "net/http" || pkg == "crypto/tls" || pkg == "crypto/x509" {
			t.Errorf("%s is linked into what runs as root", pkg)
		}
	}
}

func TestNotStarted(t *testing.T) {
	for _, c := range []struct {
		command string
		refused bool
	}{{"/usr/bin/sudo", true}, {"/usr/bin/pkexec", true}, {"/opt/culvert", false}} {
		err := notStarted([]string{c.command, "privileged"}, "sudo: a password is required", errors.New("EOF"))
		if errors.Is(err, ErrNotPermitted) != c.refused || !strings.Contains(err.Error(), "a password is required") {
			t.Errorf("%s: %v", c.command, err)
		}
	}
}

func TestStartFails(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	if _, err := Start(t.Context(), Config{Command: []string{missing, "privileged"}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	// A real program that is not the child, and says why it ends.
	_, err := Start(t.Context(), Config{Command: []string{"sh", "-c", "echo no such thing >&2; exit 1"}})
	if err == nil || !strings.Contains(err.Error(), "no such thing") || errors.Is(err, ErrNotPermitted) {
		t.Errorf("not the child: %v", err)
	}
}

func prefixes(all ...string) (out []netip.Prefix) {
	for _, p := range all {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestCheckRoutes(t *testing.T) {
	if err := CheckRoutes(prefixes("10.0.0.0/8", "10.96.0.0/12", "100.64.0.0/10", "fd00:10::/64", "2001:db8::/32", "203.0.113.7/32")); err != nil {
		t.Error(err)
	}
	for _, p := range []string{
		"0.0.0.0/0", "::/0", "0.0.0.0/1", "128.0.0.0/1", "64.0.0.0/2", "10.0.0.0/7", "2000::/3", "fc00::/7",
		"127.0.0.0/8", "127.0.0.53/32", "::1/128", "169.254.0.0/16", "169.254.169.254/32", "fe80::/64",
		"224.0.0.0/8", "239.1.2.3/32", "ff02::1/128", "255.255.255.255/32", "0.0.0.0/32", "::ffff:10.0.0.0/112",
		"10.0.0.1/8",
	} {
		if err := CheckRoutes(prefixes("10.96.0.0/12", p)); !errors.Is(err, errRefused) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if err := CheckRoutes([]netip.Prefix{{}}); !errors.Is(err, errRefused) {
		t.Errorf("no prefix: %v", err)
	}
	if err := CheckRoutes(make([]netip.Prefix, MaxRoutes+1)); !errors.Is(err, errRefused) {
		t.Errorf("too many: %v", err)
	}
}

func TestCheckTUN(t *testing.T) {
	good := TUN{Name: "culvert0", MTU: 1500, Addrs: []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd63::1")}}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*TUN){
		"another's name":   func(w *TUN) { w.Name = "eth0" },
		"a pattern":        func(w *TUN) { w.Name = "culvert%d" },
		"a path":           func(w *TUN) { w.Name = "culvert/../x" },
		"a long name":      func(w *TUN) { w.Name = "culvert-123456789" },
		"no MTU":           func(w *TUN) { w.MTU = 0 },
		"a large MTU":      func(w *TUN) { w.MTU = 65536 },
		"no address":       func(w *TUN) { w.Addrs = nil },
		"many addresses":   func(w *TUN) { w.Addrs = make([]netip.Addr, maxAddrs+1) },
		"an empty address": func(w *TUN) { w.Addrs = []netip.Addr{{}} },
		"loopback":         func(w *TUN) { w.Addrs = []netip.Addr{netip.MustParseAddr("127.0.0.53")} },
		"link-local":       func(w *TUN) { w.Addrs = []netip.Addr{netip.MustParseAddr("169.254.169.254")} },
		"multicast":        func(w *TUN) { w.Addrs = []netip.Addr{netip.MustParseAddr("ff02::1")} },
		"any":              func(w *TUN) { w.Addrs = []netip.Addr{netip.IPv6Unspecified()} },
		"mapped":           func(w *TUN) { w.Addrs = []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1")} },
		"zone":             func(w *TUN) { w.Addrs = []netip.Addr{netip.MustParseAddr("fd00::1%eth0")} },
	} {
		w := good
		change(&w)
		if err := w.check(); !errors.Is(err, errRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzRequest: whatever the user's side sends, what passes the checks cannot
// take the machine's own traffic or touch another's device.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"Op":"set-routes","Routes":["10.0.0.0/8","fd00::/48"]}`))
	f.Add([]byte(`{"Op":"open-tun","TUN":{"Name":"culvert0","MTU":1500,"Addrs":["198.18.0.1"]}}`))
	f.Add([]byte(`{"Op":"set-dns","DNS":{"Link":"culvert0","Server":"198.18.0.1","Search":["a.b"],"Zones":["svc"]}}`))
	f.Add([]byte(`{"Op":"listen-dns","Listen":"198.18.0.1"}{"Op":"undo"}`))
	outside := []netip.Addr{
		netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("::1"), netip.MustParseAddr("169.254.169.254"),
		netip.MustParseAddr("fe80::1"), netip.MustParseAddr("224.0.0.251"), netip.MustParseAddr("ff02::fb"),
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var req request
		if err := fdpass.Decode(text, &req); err != nil {
			return
		}
		if CheckRoutes(req.Routes) == nil {
			for _, p := range req.Routes {
				if p.Bits() < minBits4 || slices.ContainsFunc(outside, p.Contains) {
					t.Errorf("took route %v", p)
				}
			}
		}
		if req.TUN != nil && req.TUN.check() == nil {
			if name := req.TUN.Name; name != "" && !strings.HasPrefix(name, "culvert") || strings.ContainsAny(name, "/%. \n") {
				t.Errorf("took name %q", name)
			}
			for _, a := range req.TUN.Addrs {
				if slices.Contains(outside, a) || a.IsUnspecified() {
					t.Errorf("took address %v", a)
				}
			}
		}
	})
}
