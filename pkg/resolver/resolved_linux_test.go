package resolver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// nameserver answers every A with one address and every PTR with one name, and
// remembers what it was asked.
type nameserver struct {
	addr  netip.Addr
	says  string
	udp   *dns.Server
	mu    sync.Mutex
	asked []string
}

func serve(t *testing.T, addr netip.Addr, says string) *nameserver {
	t.Helper()
	n := &nameserver{addr: addr, says: says}
	pc, err := net.ListenPacket("udp", netip.AddrPortFrom(addr, 53).String())
	if err != nil {
		t.Fatal(err)
	}
	n.udp = &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(n.answer)}
	done := make(chan error, 1)
	go func() { done <- n.udp.ActivateAndServe() }()
	t.Cleanup(func() {
		pc.Close()
		<-done
	})
	return n
}

func (n *nameserver) answer(w dns.ResponseWriter, q *dns.Msg) {
	n.mu.Lock()
	n.asked = append(n.asked, strings.ToLower(q.Question[0].Name))
	n.mu.Unlock()
	m := new(dns.Msg).SetReply(q)
	hdr := dns.RR_Header{Name: q.Question[0].Name, Class: dns.ClassINET, Rrtype: q.Question[0].Qtype, Ttl: 1}
	switch q.Question[0].Qtype {
	case dns.TypeA:
		m.Answer = []dns.RR{&dns.A{Hdr: hdr, A: net.ParseIP(n.says)}}
	case dns.TypePTR:
		m.Answer = []dns.RR{&dns.PTR{Hdr: hdr, Ptr: "n" + strings.ReplaceAll(n.says, ".", "-") + ".example."}}
	}
	w.WriteMsg(m)
}

func (n *nameserver) wasAsked(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.asked, name)
}

// machine is a namespace with an uplink, a nameserver there and
// systemd-resolved, which asks it.
type machine struct {
	program *resolvertest.Program
	stop    func() error
	uplink  *nameserver
}

var uplinkAddr = netip.MustParseAddr("10.9.0.53")

func newMachine(t *testing.T) *machine {
	t.Helper()
	sh(t, "ip link set lo up; ip link add up0 type veth peer name up1; ip addr add 10.9.0.53/24 dev up0; ip link set up0 up; ip link set up1 up")
	m := &machine{program: fetch(t), uplink: serve(t, uplinkAddr, "192.0.2.1")}
	var err error
	m.stop, err = m.program.Start(t.Context(), resolvertest.Config{Upstream: map[string]netip.Addr{"up0": uplinkAddr}, Log: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.stop(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func fetch(t *testing.T) *resolvertest.Program {
	t.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/var/cache"
	}
	program, err := resolvertest.Fetch(t.Context(), filepath.Join(dir, "culvert-e2e"))
	if err != nil {
		t.Fatal(err)
	}
	return program
}

func sh(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// state is every setting that systemd-resolved has and every file of it.
func (m *machine) state(t *testing.T) string {
	t.Helper()
	return sh(t, "for what in dns domain default-route llmnr mdns dnssec dnsovertls; do "+m.program.Resolvectl()+" $what; done; readlink /etc/resolv.conf; cat /etc/resolv.conf /run/systemd/resolve/resolv.conf; ls /etc/resolv.conf*")
}

// newTUN makes a device as a session has it, with our server on its address.
func newTUN(t *testing.T, name, addr string) (*tun.Device, Settings) {
	t.Helper()
	dev, err := tun.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	a := netip.MustParseAddr(addr)
	if err := (tun.Link{Name: name}).Configure(1500, a); err != nil {
		t.Fatal(err)
	}
	link, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	s := shop
	s.Link, s.LinkIndex, s.Server = name, link.Index, a
	return dev, s
}

// ask asks the stub as any program does.
func ask(t *testing.T, name string, kind uint16) string {
	t.Helper()
	r, err := dns.Exchange(new(dns.Msg).SetQuestion(name, kind), "127.0.0.53:53")
	if err != nil {
		return err.Error()
	}
	if len(r.Answer) == 0 {
		return dns.RcodeToString[r.Rcode]
	}
	return strings.TrimPrefix(r.Answer[len(r.Answer)-1].String(), r.Answer[len(r.Answer)-1].Header().String())
}

func needDebian(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("systemd-resolved is unpacked from a Debian package")
	}
	fetch(t) // while there is still a network
}

func TestResolved(t *testing.T) {
	needDebian(t)
	resolvertest.InMachine(t, func(t *testing.T) {
		others := goleak.IgnoreCurrent()
		t.Cleanup(func() { goleak.VerifyNone(t, others) }) // after all other cleanups
		m := newMachine(t)
		dev, s := newTUN(t, "culvert0", "198.18.0.1")
		ours := serve(t, s.Server, "10.96.0.7")
		if got := ask(t, "outside.example.", dns.TypeA); got != "192.0.2.1" {
			t.Fatalf("before: %s", got)
		}
		before := m.state(t)
		r := New(Config{})
		set(t, r, s)
		if r.Plan().Mode != ModeResolved {
			t.Fatalf("plan %+v", r.Plan())
		}
		t.Logf("%s", m.state(t))
		split(t, m, ours)
		set(t, r, s) // again is the same
		split(t, m, ours)
		if got, err := r.Upstreams(s.Server); err != nil || len(got) != 1 || got[0] != netip.AddrPortFrom(uplinkAddr, 53) {
			t.Errorf("upstreams %v, %v", got, err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if after := m.state(t); after != before {
			t.Errorf("before\n%s\nafter\n%s", before, after)
		}
		if got := ask(t, "web.shop.", dns.TypeA); got != "192.0.2.1" {
			t.Errorf("after Close web.shop. is %s", got)
		}
		none := s
		none.Search, none.Zones = nil, nil // then only the default route setting keeps other names away
		set(t, r, none)
		if got := ask(t, "elsewhere.example.", dns.TypeA); got != m.uplink.says || ours.wasAsked("elsewhere.example.") {
			t.Errorf("without domains elsewhere.example. is %s", got)
		}
		set(t, r, s)
		dev.Close() // and the settings die with the link
		if err := r.Close(); err != nil {
			t.Errorf("Close without the link: %v", err)
		}
		if got := ask(t, "other.shop.", dns.TypeA); got != "192.0.2.1" {
			t.Errorf("without the link other.shop. is %s", got)
		}
		if state := m.state(t); strings.Contains(state, "culvert") || strings.Contains(state, "198.18") {
			t.Errorf("left\n%s", state)
		}
	})
}

// split: the cluster's names are asked of ours, the others of the uplink's.
func split(t *testing.T, m *machine, ours *nameserver) {
	t.Helper()
	for _, name := range []string{"web.shop.svc.cluster.local.", "web.shop.svc.", "web.shop.", "no.such.shop.", "_http._tcp.web.shop.svc.cluster.local."} {
		if got := ask(t, name, dns.TypeA); got != ours.says {
			t.Errorf("%s is %s", name, got)
		}
	}
	if got := ask(t, "7.0.96.10.in-addr.arpa.", dns.TypePTR); got != "n10-96-0-7.example." {
		t.Errorf("reverse name %s", got)
	}
	for _, name := range []string{"outside.example.", "svc.example.", "workshop.", "local.", "1.2.0.192.in-addr.arpa."} {
		ask(t, name, dns.TypeA)
		if ours.wasAsked(name) {
			t.Errorf("%s was asked of ours", name)
		}
	}
	if got := ask(t, "outside.example.", dns.TypeA); got != m.uplink.says {
		t.Errorf("outside.example. is %s", got)
	}
	if m.uplink.wasAsked("web.shop.") || m.uplink.wasAsked("web.shop.svc.cluster.local.") {
		t.Error("the cluster's names were asked of the uplink's server")
	}
	// A name without dots, as the C library and as Go search it.
	if got := sh(t, "getent ahostsv4 web"); !strings.Contains(got, ours.says) {
		t.Errorf("getent: %s", got)
	}
	ips, err := (&net.Resolver{PreferGo: true}).LookupNetIP(t.Context(), "ip4", "web")
	if err != nil || len(ips) != 1 || ips[0].String() != ours.says {
		t.Errorf("Go: %v, %v", ips, err)
	}
}

func TestResolvedOursIsDown(t *testing.T) {
	needDebian(t)
	resolvertest.InMachine(t, func(t *testing.T) {
		m := newMachine(t)
		_, s := newTUN(t, "culvert0", "198.18.0.1")
		r := New(Config{})
		set(t, r, s)
		if got := ask(t, "web.shop.", dns.TypeA); got == m.uplink.says || m.uplink.wasAsked("web.shop.") {
			t.Errorf("web.shop. is %s: it went to the uplink's server", got)
		}
		if got := ask(t, "outside.example.", dns.TypeA); got != m.uplink.says {
			t.Errorf("outside.example. is %s", got)
		}
		if err := m.stop(); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err == nil {
			t.Error("Close says nothing of a bus that is gone")
		}
	})
}

func TestResolvedTwoSessions(t *testing.T) {
	needDebian(t)
	resolvertest.InMachine(t, func(t *testing.T) {
		m := newMachine(t)
		before := m.state(t)
		devA, a := newTUN(t, "culvert0", "198.18.0.1")
		devB, b := newTUN(t, "culvert1", "198.18.0.2")
		a.Search, a.Zones = []string{"a.svc.one.local"}, []string{"one.local"}
		b.Search, b.Zones = []string{"b.svc.two.local"}, []string{"two.local"}
		for i := range 900 { // more than systemd-resolved takes
			b.Zones = append(b.Zones, fmt.Sprintf("namespace-%d", i))
		}
		serve(t, a.Server, "10.96.0.1")
		serve(t, b.Server, "10.96.0.2")
		first, second := New(Config{}), New(Config{})
		set(t, first, a)
		set(t, second, b)
		for name, want := range map[string]string{"x.one.local.": "10.96.0.1", "x.two.local.": "10.96.0.2", "x.namespace-200.": "10.96.0.2", "x.example.": "192.0.2.1"} {
			if got := ask(t, name, dns.TypeA); got != want {
				t.Errorf("%s is %s, want %s", name, got, want)
			}
		}
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		if got := ask(t, "y.two.local.", dns.TypeA); got != "10.96.0.2" {
			t.Errorf("after the other ended y.two.local. is %s", got)
		}
		if err := second.Close(); err != nil {
			t.Fatal(err)
		}
		devA.Close()
		devB.Close()
		if after := m.state(t); after != before {
			t.Errorf("before\n%s\nafter\n%s", before, after)
		}
	})
}

// TestResolvedB10PassedOver: it runs, but resolv.conf names another server.
func TestResolvedB10PassedOver(t *testing.T) {
	needDebian(t)
	resolvertest.InMachine(t, func(t *testing.T) {
		newMachine(t)
		sh(t, "rm /etc/resolv.conf; echo nameserver 10.9.0.53 >/etc/resolv.conf")
		w := look(t.Context(), Config{})
		if !w.Resolved || w.Answers || Detect(w).Mode != ModeFile {
			t.Errorf("world %+v, plan %+v", w, Detect(w))
		}
		if onBus(context.Background(), "unix:path=/nonexistent") {
			t.Error("on a bus that is not")
		}
	})
}
