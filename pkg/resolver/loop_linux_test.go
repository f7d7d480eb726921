package resolver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	ours "github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// TestDnsmasqB15: a cache on this machine asks whom resolv.conf names, and so us, while
// we ask it: names elsewhere are found as fast as before.
func TestDnsmasqB15(t *testing.T) {
	for name, c := range map[string]struct{ conf, dnsmasq string }{
		"servers of resolv.conf": {"nameserver 127.0.0.1\nnameserver 10.9.0.53\n", "bind-interfaces\nlisten-address=127.0.0.1\n"},
		"dynamically":            {"nameserver 127.0.0.1\nnameserver 10.9.0.53\n", "bind-dynamic\ninterface=lo\n"},
		"a server of its own":    {"nameserver 127.0.0.1\n", "server=10.9.0.53\nbind-interfaces\nlisten-address=127.0.0.1\n"},
		"all at once":            {"nameserver 127.0.0.1\n", "server=10.9.0.53\nall-servers\nbind-interfaces\nlisten-address=127.0.0.1\n"},
		"in order":               {"nameserver 127.0.0.1\n", "server=10.9.0.53\nstrict-order\nbind-interfaces\nlisten-address=127.0.0.1\n"},
		"a file of its own":      {"nameserver 127.0.0.1\n", "resolv-file=/run/upstream\nbind-interfaces\nlisten-address=127.0.0.1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dirs := packages(t, "dnsmasq-base", "libnetfilter-conntrack3", "libnfnetlink0")
			resolvertest.InMachine(t, func(t *testing.T) {
				newUplink(t)
				addUplinkAddrs(t)
				must(t, resolvertest.Install(dirs...))
				home := serve(t, netip.MustParseAddr("10.9.0.53"), "192.0.2.1")
				write(t, "/etc/resolv.conf", c.conf)
				write(t, "/run/upstream", "nameserver 10.9.0.53\n")
				write(t, "/run/dnsmasq.conf", "user=root\nno-hosts\ncache-size=0\npid-file\n"+c.dnsmasq)
				dnsmasq := exec.Command("dnsmasq", "-k", "-C", "/run/dnsmasq.conf", "--log-facility=-")
				dnsmasq.Stderr = os.Stderr
				must(t, dnsmasq.Start())
				t.Cleanup(func() { dnsmasq.Process.Kill(); dnsmasq.Wait() })
				soon(t, "dnsmasq answers", func() bool { return asked("127.0.0.1", "up.example.") == home.says })

				loop(t, home)
			})
		})
	}
}

// TestResolvedAsksB15: systemd-resolved that does not write resolv.conf reads it.
func TestResolvedAsksB15(t *testing.T) {
	for name, conf := range map[string]string{
		"beside it":   "nameserver 10.9.0.53\n",
		"also itself": "nameserver 127.0.0.53\nnameserver 10.9.0.53\n",
	} {
		t.Run(name, func(t *testing.T) {
			needDebian(t)
			resolvertest.InMachine(t, func(t *testing.T) {
				m := newMachine(t)
				must(t, os.Remove("/etc/resolv.conf"))
				write(t, "/etc/resolv.conf", conf)
				s := loop(t, m.uplink)
				soon(t, "it asks us", func() bool {
					return asked("127.0.0.53", "there.example.") == m.uplink.says && strings.Contains(sh(t, m.program.Resolvectl()+" dns"), s.Server.String())
				})
			})
		})
	}
}

// asked is the address that a server gives a name.
func asked(server, name string) string {
	r, err := dns.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), server+":53")
	if err != nil {
		return err.Error()
	}
	if len(r.Answer) == 0 {
		return dns.RcodeToString[r.Rcode]
	}
	return r.Answer[0].(*dns.A).A.String()
}

// loop puts our server into resolv.conf until the test ends, and asks it for names that
// the server at home knows.
func loop(t *testing.T, home *nameserver) Settings {
	t.Helper()
	before := confState(t)
	_, s := newTUN(t, "culvert0", "198.18.0.1")
	r := New(Config{})
	server := ours.New(ours.Config{Namespace: "shop", Upstream: func() []netip.AddrPort {
		got, err := r.Upstreams(s.Server)
		if err != nil {
			t.Error(err)
		}
		return got
	}})
	at := netip.AddrPortFrom(s.Server, 53)
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	must(t, err)
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, udp, tcp) }()
	follow(t, r)
	set(t, r, s)
	if mode := r.Plan().Mode; mode != ModeFile {
		t.Errorf("mode %v", mode)
	}
	t.Cleanup(func() {
		must(t, r.Close())
		cancel()
		must(t, <-done)
		if after := confState(t); after != before {
			t.Errorf("before\n%s\nafter\n%s", before, after)
		}
	})
	for i := range 10 {
		began := time.Now()
		got := asked(s.Server.String(), fmt.Sprintf("n%d.example.", i))
		if took := time.Since(began); got != home.says || took > time.Second {
			t.Errorf("%s after %v", got, took)
		}
		time.Sleep(200 * time.Millisecond) // for it reads the file at its leisure
	}
	return s
}
