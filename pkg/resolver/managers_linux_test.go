package resolver

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// packages unpacks them while there is still a network, to be installed where
// there is none.
func packages(t *testing.T, names ...string) (dirs []string) {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("the programs are unpacked from Debian packages")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/cache"
	}
	for _, name := range names {
		dir, err := resolvertest.Unpack(t.Context(), filepath.Join(cache, "culvert-e2e"), name)
		if err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, dir)
	}
	return dirs
}

// A writer is a program that writes resolv.conf.
type writer struct {
	mode Mode
	own  string // the nameserver that it puts between, if it does
	tell func(t *testing.T, server, search string)
}

// course is a day of two sessions on a machine with such a program: it is told
// of another network, the sessions end, one of them without being asked.
func (m writer) course(t *testing.T) {
	t.Helper()
	home, hotel := serve(t, netip.MustParseAddr("10.9.0.53"), "192.0.2.1"), serve(t, netip.MustParseAddr("10.9.0.54"), "192.0.2.2")
	outside := func(n *nameserver) func() bool {
		return func() bool {
			at := m.own
			if at == "" {
				at = fmt.Sprint(n.addr)
			}
			got, err := New(Config{}).Nameservers(netip.Addr{})
			r, askErr := dns.Exchange(new(dns.Msg).SetQuestion("outside.example.", dns.TypeA), at+":53")
			return err == nil && fmt.Sprint(got) == "["+at+":53]" && askErr == nil && strings.HasSuffix(fmt.Sprint(r.Answer), "\t"+n.says+"]")
		}
	}
	m.tell(t, "10.9.0.53", "corp.example")
	soon(t, "the machine is at home", outside(home))
	before := confState(t)

	_, a := newTUN(t, "culvert0", "198.18.0.1")
	_, b := newTUN(t, "culvert1", "198.18.0.2")
	serve(t, a.Server, "10.96.0.1")
	serve(t, b.Server, "10.96.0.2")
	first, second := New(Config{}), New(Config{})
	follow(t, first)
	follow(t, second)
	set(t, first, a)
	set(t, second, b)
	if mode := second.Plan().Mode; first.Plan().Mode != m.mode || mode != m.mode {
		t.Errorf("first %+v, second %+v", first.Plan(), second.Plan())
	}
	asks := func(want, search string) func() bool {
		return func() bool {
			c := parseConf([]byte(sh(t, "cat /etc/resolv.conf")))
			out, err := exec.Command("getent", "ahostsv4", "web").Output()
			return err == nil && strings.HasPrefix(string(out), want+" ") && len(c.Servers) == 1 && c.Search[0] == shop.Search[0] && c.Search[len(c.Search)-1] == search
		}
	}
	soon(t, "the second is asked", asks("10.96.0.2", "corp.example"))
	m.tell(t, "10.9.0.54", "hotel.example")
	soon(t, "names elsewhere are asked in the hotel", outside(hotel))
	soon(t, "the second is asked in the hotel", asks("10.96.0.2", "hotel.example"))
	if got := upstreamOf(t, Config{}, b); got != "[198.18.0.1:53]" {
		t.Errorf("the second asks %s", got)
	}
	must(t, second.Close())
	soon(t, "the first is asked", asks("10.96.0.1", "hotel.example"))
	die(first)
	if left, err := New(Config{}).Leftovers(); err != nil || len(left) == 0 {
		t.Errorf("left %v, %v", left, err)
	}
	must(t, New(Config{}).Restore(t.Context()))
	soon(t, "all is the hotel's", outside(hotel))
	m.tell(t, "10.9.0.53", "corp.example")
	soon(t, "the machine is at home again", func() bool { return outside(home)() && confState(t) == before })
	if after := confState(t); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

// confState is resolv.conf, what lies beside it, and what resolvconf knows.
func confState(t *testing.T) string {
	return sh(t, "cd /etc; ls -lL --time-style=+ resolv.conf*; readlink resolv.conf || true; cat resolv.conf; cd /run; find . -path './resolvconf/*' -type f | sort | xargs -r head")
}

// newUplink makes a link to be at home and in the hotel on, and takes resolv.conf
// away.
func newUplink(t *testing.T) {
	t.Helper()
	sh(t, "ip link set lo up; ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up; rm -f /etc/resolv.conf")
}

func addUplinkAddrs(t *testing.T) {
	t.Helper()
	sh(t, "ip addr add 10.9.0.53/24 dev up0; ip addr add 10.9.0.54/24 dev up0")
}

func tellResolvconf(t *testing.T, server, search string) {
	t.Helper()
	sh(t, fmt.Sprintf("printf 'nameserver %s\nsearch %s\n' | resolvconf -a up0", server, search))
}

// TestOpenresolvB13: openresolv is told of us, as of an interface.
func TestOpenresolvB13(t *testing.T) {
	dirs := packages(t, "openresolv")
	resolvertest.InMachine(t, func(t *testing.T) {
		newUplink(t)
		addUplinkAddrs(t)
		must(t, resolvertest.Install(dirs...))
		writer{mode: ModeResolvconf, tell: tellResolvconf}.course(t)
	})
}

// TestOpenresolvOwnServers: servers that the person names come before all that
// openresolv is told of, so it is no way to be asked.
func TestOpenresolvOwnServers(t *testing.T) {
	dirs := packages(t, "openresolv")
	resolvertest.InMachine(t, func(t *testing.T) {
		newUplink(t)
		addUplinkAddrs(t)
		must(t, resolvertest.Install(dirs...))
		sh(t, "echo name_servers=10.9.0.54 >>/etc/resolvconf.conf")
		tellResolvconf(t, "10.9.0.53", "corp.example")
		if plan := New(Config{}).Preview(t.Context()); plan.Mode != ModeFile || plan.Manager != "resolvconf" {
			t.Errorf("plan %+v", plan)
		}
	})
}

// TestDebianResolvconfB13: Debian's writes a file that resolv.conf leads to.
func TestDebianResolvconfB13(t *testing.T) {
	dirs := packages(t, "resolvconf")
	resolvertest.InMachine(t, func(t *testing.T) {
		newUplink(t)
		addUplinkAddrs(t)
		must(t, resolvertest.Install(dirs...))
		sh(t, `mkdir -p /run/resolvconf/interface; ln -s /run/resolvconf /etc/resolvconf/run; ln -s /etc/resolvconf/run/resolv.conf /etc/resolv.conf
			resolvconf --enable-updates`)
		writer{mode: ModeFile, tell: tellResolvconf}.course(t)
	})
}

// TestNetworkManagerB13: in each of its ways.
func TestNetworkManagerB13(t *testing.T) {
	for name, c := range map[string]struct{ dns, rc, link, own string }{
		"writes":                {"default", "symlink", "", ""},
		"writes, by a symlink":  {"default", "symlink", "../run/NetworkManager/resolv.conf", ""},
		"writes, always a file": {"default", "file", "", ""},
		"with dnsmasq":          {"dnsmasq", "symlink", "", "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			dirs := packages(t, "network-manager", "libndp0", "libnm0", "dnsmasq-base", "libnetfilter-conntrack3", "libnfnetlink0")
			resolvertest.InMachine(t, func(t *testing.T) {
				newUplink(t)
				must(t, resolvertest.Install(dirs...))
				if c.link != "" {
					must(t, os.Symlink(c.link, "/etc/resolv.conf"))
				}
				writer{mode: ModeFile, own: c.own, tell: networkManager(t, c.dns, c.rc)}.course(t)
			})
		})
	}
}

// networkManager runs it, with a bus, and returns how it is told of a network.
// Without udev it takes a /sys that cannot be written for that of a container.
func networkManager(t *testing.T, plugin, rc string) func(t *testing.T, server, search string) {
	t.Helper()
	sh(t, `mount -t sysfs -o ro sysfs /sys
		mkdir -p /run/lib /run/work /etc/NetworkManager/system-connections
		mount -t overlay overlay /var/lib -o lowerdir=/var/lib,upperdir=/run/lib,workdir=/run/work
		cat >/etc/NetworkManager/NetworkManager.conf <<X
[main]
plugins=keyfile
auth-polkit=false
no-auto-default=*
dns=`+plugin+`
rc-manager=`+rc+`
[keyfile]
unmanaged-devices=interface-name:up1
X
		cat >/etc/NetworkManager/system-connections/up0.nmconnection <<X
[connection]
id=up0
type=ethernet
interface-name=up0
[ipv4]
method=manual
address1=10.9.0.53/24
address2=10.9.0.54/24
dns=10.9.0.53;
dns-search=corp.example;
[ipv6]
method=disabled
X
		chmod 600 /etc/NetworkManager/system-connections/*`)
	if _, err := os.Stat("/run/dbus/system_bus_socket"); err != nil {
		must(t, resolvertest.StartBus())
	}
	nm := exec.Command("NetworkManager", "--no-daemon")
	nm.Stdout, nm.Stderr = os.Stderr, os.Stderr
	must(t, nm.Start())
	t.Cleanup(func() {
		nm.Process.Kill()
		nm.Wait()
	})
	soon(t, "NetworkManager is connected", func() bool {
		out, _ := exec.Command("nmcli", "-t", "-f", "DEVICE,STATE", "device").Output()
		return slices.Contains(strings.Split(string(out), "\n"), "up0:connected")
	})
	return func(t *testing.T, server, search string) {
		t.Helper()
		sh(t, "nmcli connection modify up0 ipv4.dns "+server+" ipv4.dns-search "+search+" && nmcli device reapply up0")
	}
}

// TestNetworkManagerWithResolved: it tells systemd-resolved of its links, and
// leaves ours alone.
func TestNetworkManagerWithResolved(t *testing.T) {
	needDebian(t)
	dirs := packages(t, "network-manager", "libndp0", "libnm0")
	resolvertest.InMachine(t, func(t *testing.T) {
		must(t, resolvertest.Install(dirs...))
		m := newMachine(t)
		sh(t, "ip addr flush dev up0")
		tell := networkManager(t, "systemd-resolved", "auto")
		hotel := serve(t, netip.MustParseAddr("10.9.0.54"), "192.0.2.2")
		_, s := newTUN(t, "culvert0", "198.18.0.1")
		ours := serve(t, s.Server, "10.96.0.7")
		before := m.state(t)
		r := New(Config{})
		set(t, r, s)
		if r.Plan().Mode != ModeResolved {
			t.Errorf("plan %+v", r.Plan())
		}
		tell(t, "10.9.0.54", "hotel.example")
		soon(t, "names elsewhere are asked in the hotel", func() bool { return ask(t, "outside.example.", dns.TypeA) == hotel.says })
		if got := ask(t, "web.shop.", dns.TypeA); got != ours.says || hotel.wasAsked("web.shop.") {
			t.Errorf("in the hotel web.shop is %s", got)
		}
		tell(t, "10.9.0.53", "corp.example")
		must(t, r.Close())
		soon(t, "all is as before", func() bool { return strings.Contains(m.state(t), "(up0): corp.example") })
		if after := m.state(t); after != before {
			t.Errorf("before\n%s\nafter\n%s", before, after)
		}
	})
}
