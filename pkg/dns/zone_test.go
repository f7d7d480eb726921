package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/miekg/dns"
)

func addrs(s ...string) (all []netip.Addr) {
	for _, a := range s {
		all = append(all, netip.MustParseAddr(a))
	}
	return all
}

// shop is a catalog with every kind of Service.
func shop() []catalog.Service {
	http := []catalog.Port{{Name: "http", Protocol: "tcp", Port: 80}}
	dnsPorts := []catalog.Port{{Name: "dns", Protocol: "udp", Port: 53}, {Name: "dns-tcp", Protocol: "tcp", Port: 53}}
	endpoint := func(a, hostname string, ports ...catalog.Port) catalog.Endpoint {
		return catalog.Endpoint{Addr: netip.MustParseAddr(a), Hostname: hostname, Ports: ports}
	}
	backend := catalog.Port{Name: "http", Protocol: "tcp", Port: 8080}
	pg := catalog.Port{Name: "pg", Protocol: "tcp", Port: 5432}
	return []catalog.Service{
		{Namespace: "default", Name: "kubernetes", ClusterIPs: addrs("10.96.0.1"),
			Ports:     []catalog.Port{{Name: "https", Protocol: "tcp", Port: 443}},
			Endpoints: []catalog.Endpoint{endpoint("172.30.0.11", "", catalog.Port{Name: "https", Protocol: "tcp", Port: 6443})}},
		{Namespace: "kube-system", Name: "kube-dns", ClusterIPs: addrs("10.96.0.10"), Ports: dnsPorts,
			Endpoints: []catalog.Endpoint{endpoint("10.244.0.2", "", dnsPorts...)}},
		{Namespace: "shop", Name: "web", ClusterIPs: addrs("10.96.1.1"), Ports: http,
			Endpoints: []catalog.Endpoint{endpoint("10.244.0.5", "", backend), endpoint("10.244.0.6", "", backend)}},
		{Namespace: "shop", Name: "dual", ClusterIPs: addrs("10.96.1.2", "fd00:96::2"), Ports: append(http, catalog.Port{Name: "alt", Protocol: "tcp", Port: 81})},
		{Namespace: "shop", Name: "db", Headless: true, Ports: []catalog.Port{pg},
			Endpoints: []catalog.Endpoint{endpoint("10.244.0.7", "db-0", pg), endpoint("10.244.0.8", "db-1", pg), endpoint("fd00:244::", "", pg)}},
		{Namespace: "shop", Name: "portless", Headless: true, Endpoints: []catalog.Endpoint{endpoint("10.244.0.9", "")}},
		{Namespace: "shop", Name: "empty", Headless: true, Ports: http},
		{Namespace: "shop", Name: "out", ExternalName: "www.Example.com"},
		{Namespace: "shop", Name: "in", ExternalName: "web.shop.svc.cluster.local"},
		{Namespace: "shop", Name: "again", ExternalName: "in.shop.svc.cluster.local."},
		{Namespace: "shop", Name: "loop", ExternalName: "pool.shop.svc.cluster.local"},
		{Namespace: "shop", Name: "pool", ExternalName: "loop.shop.svc.cluster.local"},
		{Namespace: "shop", Name: "self", ExternalName: "a.self.shop.svc.cluster.local"},
		{Namespace: "shop", Name: "lost", ExternalName: "nosuch.shop.svc.cluster.local"},
		{Namespace: "shop", Name: "number", ExternalName: "192.0.2.1"},
		{Namespace: "shop", Name: "tons", ExternalName: "ns.dns.cluster.local"},
		{Namespace: "dev", Name: "web", ClusterIPs: addrs("10.96.1.9"), Ports: http},
		{Namespace: "dev", Name: "com", ClusterIPs: addrs("10.96.1.10"), Ports: http},
	}
}

func fill(z *Zone, scope catalog.Scope) {
	z.SetNamespaces([]string{"default", "kube-system", "shop", "dev", "bare"})
	z.SetPrefixes([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:96::/112")})
	for _, s := range shop() {
		z.PutService(s)
	}
	z.SetScope(scope)
}

func newShop(cfg Config) *Server {
	cfg.ClusterDNS = netip.MustParseAddrPort("10.96.0.10:53")
	if cfg.Namespace == "" {
		cfg.Namespace = "shop"
	}
	s := New(cfg)
	fill(s.Zone(), catalog.Scope{All: true})
	return s
}

// local asks a server that must answer from its zone, and prints the reply in
// one line: rcode, the records, and SOA if there is one.
func local(t testing.TB, s *Server, m *dns.Msg) (*dns.Msg, string) {
	t.Helper()
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	reply, later := s.handle(raw, nil, false)
	if later != nil {
		return nil, map[whose]string{upstreams: "upstream", clusters: "cluster"}[later.to]
	}
	got := new(dns.Msg)
	if err := got.Unpack(reply); err != nil {
		t.Fatalf("reply to %v: %v", m, err)
	}
	return got, line(got)
}

func line(m *dns.Msg) string {
	var words []string
	for _, rr := range m.Answer {
		words = append(words, rdata(rr))
	}
	slices.Sort(words)
	for _, rr := range m.Extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			words = append(words, "+"+rr.Header().Name+"="+rdata(rr))
		}
	}
	if len(m.Ns) > 0 {
		words = append(words, "SOA "+m.Ns[0].Header().Name)
	}
	return strings.Join(append([]string{dns.RcodeToString[m.Rcode]}, words...), " ")
}

func rdata(rr dns.RR) string { return strings.TrimPrefix(rr.String(), rr.Header().String()) }

func ask1(name, qtype string) *dns.Msg {
	return new(dns.Msg).SetQuestion(name, dns.StringToType[qtype])
}

func TestZone(t *testing.T) {
	const nodata, nxdomain = "NOERROR SOA cluster.local.", "NXDOMAIN SOA cluster.local."
	for _, c := range []struct{ name, qtype, want string }{
		{"web.shop.svc.cluster.local.", "A", "NOERROR 10.96.1.1"},
		{"web.shop.svc.cluster.local.", "AAAA", nodata},
		{"web.shop.svc.cluster.local.", "MX", nodata},
		{"web.shop.svc.cluster.local.", "ANY", nodata},
		{"web.shop.svc.cluster.local.", "SRV", "NOERROR 0 100 80 web.shop.svc.cluster.local. +web.shop.svc.cluster.local.=10.96.1.1"},
		{"_http._tcp.web.shop.svc.cluster.local.", "SRV", "NOERROR 0 100 80 web.shop.svc.cluster.local. +web.shop.svc.cluster.local.=10.96.1.1"},
		{"_http._tcp.web.shop.svc.cluster.local.", "A", "NOERROR 10.96.1.1"},
		{"_http._udp.web.shop.svc.cluster.local.", "SRV", nxdomain},
		{"10-244-0-5.web.shop.svc.cluster.local.", "A", "NOERROR 10.244.0.5"},
		{"dual.shop.svc.cluster.local.", "AAAA", "NOERROR fd00:96::2"},
		{"dual.shop.svc.cluster.local.", "SRV", "NOERROR 0 25 80 dual.shop.svc.cluster.local. 0 25 81 dual.shop.svc.cluster.local. " +
			"+dual.shop.svc.cluster.local.=10.96.1.2 +dual.shop.svc.cluster.local.=fd00:96::2"},
		{"db.shop.svc.cluster.local.", "A", "NOERROR 10.244.0.7 10.244.0.8"},
		{"db.shop.svc.cluster.local.", "AAAA", "NOERROR fd00:244::"},
		{"db-0.db.shop.svc.cluster.local.", "A", "NOERROR 10.244.0.7"},
		{"db-0.db.shop.svc.cluster.local.", "AAAA", nodata},
		{"db-9.db.shop.svc.cluster.local.", "A", nxdomain},
		{"fd00-244--0.db.shop.svc.cluster.local.", "AAAA", "NOERROR fd00:244::"},
		{"_pg._tcp.db.shop.svc.cluster.local.", "SRV", "NOERROR 0 33 5432 db-0.db.shop.svc.cluster.local. 0 33 5432 db-1.db.shop.svc.cluster.local. " +
			"0 33 5432 fd00-244--0.db.shop.svc.cluster.local. +db-0.db.shop.svc.cluster.local.=10.244.0.7 " +
			"+db-1.db.shop.svc.cluster.local.=10.244.0.8 +fd00-244--0.db.shop.svc.cluster.local.=fd00:244::"},
		{"portless.shop.svc.cluster.local.", "A", "NOERROR 10.244.0.9"},
		{"portless.shop.svc.cluster.local.", "SRV", nodata},
		{"empty.shop.svc.cluster.local.", "A", nxdomain},
		{"out.shop.svc.cluster.local.", "A", "upstream"},
		{"out.shop.svc.cluster.local.", "CNAME", "NOERROR www.Example.com."},
		{"out.shop.svc.cluster.local.", "SRV", nodata},
		{"x.out.shop.svc.cluster.local.", "A", nxdomain},
		{"in.shop.svc.cluster.local.", "A", "NOERROR 10.96.1.1 web.shop.svc.cluster.local."},
		{"in.shop.svc.cluster.local.", "AAAA", nodata},
		{"again.shop.svc.cluster.local.", "A", "NOERROR 10.96.1.1 in.shop.svc.cluster.local. web.shop.svc.cluster.local."},
		{"loop.shop.svc.cluster.local.", "A", nodata},
		{"self.shop.svc.cluster.local.", "A", nodata},
		{"lost.shop.svc.cluster.local.", "A", nodata},
		{"number.shop.svc.cluster.local.", "A", nxdomain},
		{"tons.shop.svc.cluster.local.", "A", "NOERROR 10.96.0.10 ns.dns.cluster.local."},
		{"nosuch.shop.svc.cluster.local.", "A", nxdomain},
		{"web.nosuch.svc.cluster.local.", "A", nxdomain},
		{"shop.svc.cluster.local.", "A", nodata},
		{"shop.svc.cluster.local.", "TXT", nxdomain},
		{"bare.svc.cluster.local.", "A", nodata},
		{"nosuch.svc.cluster.local.", "A", nxdomain},
		{"nosuch.svc.cluster.local.", "SOA", nodata},
		{"svc.cluster.local.", "A", nodata},
		{"web.shop.cluster.local.", "A", nxdomain},
		{"a.b.c.web.shop.svc.cluster.local.", "A", nxdomain},
		{"10-1-2-3.shop.pod.cluster.local.", "A", "NOERROR 10.1.2.3"},
		{"10-1-2-3.shop.pod.cluster.local.", "AAAA", nodata},
		{"fd00--1.shop.pod.cluster.local.", "AAAA", "NOERROR fd00::1"},
		{"x.10-1-2-3.shop.pod.cluster.local.", "A", "NOERROR 10.1.2.3"},
		{"10-1-2-3.nosuch.pod.cluster.local.", "A", nxdomain},
		{"10-1-2-300.shop.pod.cluster.local.", "A", nxdomain},
		{"cluster.local.", "A", nodata},
		{"cluster.local.", "NS", "NOERROR kube-dns.kube-system.svc.cluster.local. +kube-dns.kube-system.svc.cluster.local.=10.96.0.10"},
		{"ns.dns.cluster.local.", "A", "NOERROR 10.96.0.10"},
		{"ns.dns.cluster.local.", "AAAA", nodata},
		{"dns-version.cluster.local.", "TXT", `NOERROR "1.1.0"`},
		{"cluster.local.", "AXFR", "REFUSED"},

		{"1.1.96.10.in-addr.arpa.", "PTR", "NOERROR web.shop.svc.cluster.local."},
		{"7.0.244.10.in-addr.arpa.", "PTR", "NOERROR db-0.db.shop.svc.cluster.local."},
		{"5.0.244.10.in-addr.arpa.", "PTR", "NOERROR 10-244-0-5.web.shop.svc.cluster.local."},
		{"11.0.30.172.in-addr.arpa.", "PTR", "NOERROR 172-30-0-11.kubernetes.default.svc.cluster.local."},
		{"77.0.244.10.in-addr.arpa.", "PTR", "NXDOMAIN SOA in-addr.arpa."},
		{"0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.4.2.0.0.0.d.f.in-addr.arpa.", "PTR", "upstream"},
		{"0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.4.4.2.0.0.0.d.f.ip6.arpa.", "PTR", "NOERROR fd00-244--0.db.shop.svc.cluster.local."},
		{"2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa.", "PTR", "NOERROR dual.shop.svc.cluster.local."},
		{"3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa.", "PTR", "NXDOMAIN SOA ip6.arpa."},
		{"1.2.0.192.in-addr.arpa.", "PTR", "upstream"},
		{"0.244.10.in-addr.arpa.", "NS", "upstream"},

		{"web.", "A", "NOERROR 10.96.1.1"},
		{"web.", "AAAA", "NOERROR SOA web."},
		{"web.shop.", "A", "NOERROR 10.96.1.1"},
		{"web.dev.", "A", "NOERROR 10.96.1.9"},
		{"web.shop.svc.", "A", "NOERROR 10.96.1.1"},
		{"nosuch.shop.svc.", "A", "NXDOMAIN SOA svc."},
		{"shop.svc.", "A", "NOERROR SOA svc."},
		{"db-0.db.", "A", "NOERROR 10.244.0.7"},
		{"db-0.db.shop.", "A", "NOERROR 10.244.0.7"},
		{"db-9.db.", "A", "upstream"},
		{"_pg._tcp.db.", "A", "NOERROR 10.244.0.7 10.244.0.8"},
		{"_http._tcp.web.dev.", "SRV", "NOERROR 0 100 80 web.dev.svc.cluster.local. +web.dev.svc.cluster.local.=10.96.1.9"},
		{"http.tcp.web.", "A", "upstream"},
		{"10-1-2-3.shop.pod.", "A", "NOERROR 10.1.2.3"},
		{"a.b.pod.", "A", "upstream"},
		{"empty.", "A", "NXDOMAIN SOA empty."},
		{"golang.dev.", "A", "upstream"},
		{"com.", "NS", "upstream"},
		{"example.com.", "A", "upstream"},
		{"www.example.com.", "A", "upstream"},
		{"local.", "A", "upstream"},
		{"xcluster.local.", "A", "upstream"},
		{".", "NS", "upstream"},
	} {
		t.Run(c.name+" "+c.qtype, func(t *testing.T) {
			_, got := local(t, newShop(Config{}), ask1(c.name, c.qtype))
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestCaseOfQuestionIsKept(t *testing.T) {
	m, _ := local(t, newShop(Config{}), ask1("WeB.shOp.SVC.Cluster.LOCAL.", "A"))
	if m.Question[0].Name != "WeB.shOp.SVC.Cluster.LOCAL." || m.Answer[0].Header().Name != "WeB.shOp.SVC.Cluster.LOCAL." {
		t.Errorf("got %v", m)
	}
	if m, _ = local(t, newShop(Config{}), ask1("WeB.", "A")); m.Answer[0].Header().Name != "WeB." {
		t.Errorf("got %v", m)
	}
}

// What is not held whole is asked of the cluster; what was put is not.
func TestScope(t *testing.T) {
	const held, fresh = "held", "fresh"
	for _, c := range []struct{ name, qtype, held, fresh string }{
		{"web.shop.svc.cluster.local.", "A", "NOERROR 10.96.1.1", "NOERROR 10.96.1.1"},
		{"web.shop.svc.cluster.local.", "AAAA", "NOERROR SOA cluster.local.", "NOERROR SOA cluster.local."},
		{"nosuch.shop.svc.cluster.local.", "A", "NXDOMAIN SOA cluster.local.", "cluster"},
		{"db-9.db.shop.svc.cluster.local.", "A", "NXDOMAIN SOA cluster.local.", "cluster"},
		{"web.dev.svc.cluster.local.", "A", "NOERROR 10.96.1.9", "NOERROR 10.96.1.9"},
		{"nosuch.dev.svc.cluster.local.", "A", "cluster", "cluster"},
		{"web.other.svc.cluster.local.", "A", "cluster", "cluster"},
		{"other.svc.cluster.local.", "A", "cluster", "cluster"},
		{"shop.svc.cluster.local.", "A", "NOERROR SOA cluster.local.", "cluster"},
		{"10-1-2-3.other.pod.cluster.local.", "A", "cluster", "cluster"},
		{"cluster.local.", "A", "NOERROR SOA cluster.local.", "cluster"},
		{"cluster.local.", "SOA", "NOERROR", "cluster"},
		{"77.0.244.10.in-addr.arpa.", "PTR", "cluster", "cluster"},
		{"1.1.96.10.in-addr.arpa.", "PTR", "NOERROR web.shop.svc.cluster.local.", "NOERROR web.shop.svc.cluster.local."},
		{"1.2.0.192.in-addr.arpa.", "PTR", "upstream", "upstream"},
		{"nosuch.", "A", "upstream", "cluster"},
		{"nosuch.", "NS", "upstream", "upstream"},
		{"localhost.", "A", "upstream", "upstream"},
		{"nosuch.other.", "A", "upstream", "upstream"},
		{"golang.dev.", "A", "upstream", "upstream"},
		{"nosuch.other.svc.", "A", "cluster", "cluster"},
	} {
		for _, scope := range []string{held, fresh} {
			s := newShop(Config{})
			want := c.fresh
			s.Zone().SetScope(catalog.Scope{})
			if scope == held {
				s.Zone().SetScope(catalog.Scope{Namespaces: []string{"shop"}})
				want = c.held
			}
			_, got := local(t, s, ask1(c.name, c.qtype))
			if first, _, _ := strings.Cut(got, " ns.dns"); first != want {
				t.Errorf("%s: %s %s: got %s, want %s", scope, c.name, c.qtype, got, want)
			}
		}
	}
}

// Below the suffix all names are those of this cluster, in each of their forms.
func TestSuffix(t *testing.T) {
	for _, c := range []struct{ name, qtype, want, fresh string }{
		{"web.staging.", "A", "NOERROR 10.96.1.1", "NOERROR 10.96.1.1"},
		{"WEB.Shop.Staging.", "A", "NOERROR 10.96.1.1", "NOERROR 10.96.1.1"},
		{"web.dev.staging.", "A", "NOERROR 10.96.1.9", "NOERROR 10.96.1.9"},
		{"web.shop.svc.staging.", "A", "NOERROR 10.96.1.1", "NOERROR 10.96.1.1"},
		{"web.shop.svc.cluster.local.staging.", "A", "NOERROR 10.96.1.1", "NOERROR 10.96.1.1"},
		{"db-0.db.staging.", "A", "NOERROR 10.244.0.7", "NOERROR 10.244.0.7"},
		{"_pg._tcp.db.shop.staging.", "A", "NOERROR 10.244.0.7 10.244.0.8", "NOERROR 10.244.0.7 10.244.0.8"},
		{"10-1-2-3.shop.pod.staging.", "A", "NOERROR 10.1.2.3", "cluster"},
		{"web.shop.staging.", "AAAA", "NOERROR SOA staging.", "NOERROR SOA staging."},
		{"web.shop.staging.", "SRV", "NOERROR 0 100 80 web.shop.svc.cluster.local. +web.shop.svc.cluster.local.=10.96.1.1", "NOERROR 0 100 80 web.shop.svc.cluster.local. +web.shop.svc.cluster.local.=10.96.1.1"},
		{"nosuch.staging.", "A", "NXDOMAIN SOA staging.", "cluster"},
		{"nosuch.shop.staging.", "A", "NXDOMAIN SOA staging.", "cluster"},
		{"nosuch.shop.svc.Staging.", "A", "NXDOMAIN SOA Staging.", "cluster"},
		{"nosuch.pod.staging.", "A", "NXDOMAIN SOA staging.", "cluster"},
		{"a.b.c.d.e.f.staging.", "A", "NXDOMAIN SOA staging.", "cluster"},
		{"svc.staging.", "A", "NOERROR SOA staging.", "cluster"},
		{"staging.", "A", "NOERROR SOA staging.", "cluster"},
		{"out.shop.staging.", "CNAME", "NOERROR www.Example.com.", "NOERROR www.Example.com."},
		{"web.xstaging.", "A", "upstream", "upstream"},
		{"web.prod.", "A", "upstream", "upstream"},
		{"web.shop.", "A", "NOERROR 10.96.1.1", "NOERROR 10.96.1.1"},
	} {
		s := newShop(Config{Suffix: "Staging"})
		if _, got := local(t, s, ask1(c.name, c.qtype)); got != c.want {
			t.Errorf("%s %s: got %s, want %s", c.name, c.qtype, got, c.want)
		}
		s.Zone().SetScope(catalog.Scope{})
		if _, got := local(t, s, ask1(c.name, c.qtype)); got != c.fresh {
			t.Errorf("nothing held: %s %s: got %s, want %s", c.name, c.qtype, got, c.fresh)
		}
	}
}

// A resolver on the machine must not hide for long what was just made.
func TestNegativeAnswersB14AreBrief(t *testing.T) {
	for _, q := range []*dns.Msg{ask1("nosuch.shop.svc.cluster.local.", "A"), ask1("web.shop.svc.cluster.local.", "AAAA")} {
		m, _ := local(t, newShop(Config{}), q)
		if len(m.Ns) != 1 || m.Ns[0].Header().Ttl != 1 {
			t.Errorf("%s: %v", q, m)
		}
	}
}

// The names of the cluster's DNS are those of Services that not everybody sees.
func TestNameserversOutOfSight(t *testing.T) {
	s := newShop(Config{})
	z := s.Zone()
	z.DropService("kube-system", "kube-dns")
	for scope, want := range map[bool]string{false: "cluster", true: "NOERROR ns.dns.cluster.local. +ns.dns.cluster.local.=10.96.0.10"} {
		z.SetScope(catalog.Scope{All: scope, Namespaces: []string{"shop"}})
		if _, got := local(t, s, ask1("cluster.local.", "NS")); got != want {
			t.Errorf("all %t: got %s, want %s", scope, got, want)
		}
	}
}

func TestPutAndDrop(t *testing.T) {
	s := newShop(Config{})
	z := s.Zone()
	at := func(name, qtype string) string { _, l := local(t, s, ask1(name, qtype)); return l }
	z.PutService(catalog.Service{Namespace: "newborn", Name: "a", ClusterIPs: addrs("10.96.3.1")})
	if got := at("a.newborn.svc.cluster.local.", "A"); got != "NOERROR 10.96.3.1" {
		t.Errorf("a Service in a namespace not yet listed: %s", got)
	}
	z.PutService(catalog.Service{Namespace: "newborn", Name: "a", ClusterIPs: addrs("10.96.3.2")})
	if got := at("1.3.96.10.in-addr.arpa.", "PTR"); got != "NXDOMAIN SOA in-addr.arpa." {
		t.Errorf("the address it had before: %s", got)
	}
	z.PutService(catalog.Service{Namespace: "newborn", Name: "b", ClusterIPs: addrs("10.96.3.2")})
	z.DropService("newborn", "a")
	if got := at("2.3.96.10.in-addr.arpa.", "PTR"); got != "NOERROR b.newborn.svc.cluster.local." {
		t.Errorf("an address handed on: %s", got)
	}
	z.DropService("newborn", "b")
	z.DropService("newborn", "b")
	if got := at("newborn.svc.cluster.local.", "A"); got != "NXDOMAIN SOA cluster.local." {
		t.Errorf("the namespace after that: %s", got)
	}
	for _, sv := range shop() {
		z.DropService(sv.Namespace, sv.Name)
	}
	if len(z.services)+len(z.virtual)+len(z.endpoints)+len(z.counts) != 0 {
		t.Errorf("left over: %v %v %v %v", z.services, z.virtual, z.endpoints, z.counts)
	}
}

func TestSizes(t *testing.T) {
	s := newShop(Config{})
	big := catalog.Service{Namespace: "shop", Name: "big", Headless: true}
	for i := range 200 {
		big.Endpoints = append(big.Endpoints, catalog.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 244, 7, byte(i)})})
	}
	s.Zone().PutService(big)
	for _, c := range []struct {
		edns uint16
		tcp  bool
		want bool
	}{{0, false, true}, {512, false, true}, {1232, false, true}, {4096, false, false}, {0, true, false}} {
		m := ask1("big.shop.svc.cluster.local.", "A")
		if c.edns > 0 {
			m.SetEdns0(c.edns, true)
		}
		raw, _ := m.Pack()
		reply, _ := s.handle(raw, nil, c.tcp)
		got := new(dns.Msg)
		if err := got.Unpack(reply); err != nil {
			t.Fatal(err)
		}
		if got.Truncated != c.want || !c.tcp && len(reply) > max(512, int(c.edns)) || !c.want && len(got.Answer) != 200 {
			t.Errorf("%+v: truncated %t, %d bytes, %d answers", c, got.Truncated, len(reply), len(got.Answer))
		}
		if opt := got.IsEdns0(); (opt != nil) != (c.edns > 0) || opt != nil && !opt.Do() {
			t.Errorf("%+v: opt %v", c, opt)
		}
	}
}

func TestOddQueries(t *testing.T) {
	s := newShop(Config{})
	web := func(change func(m *dns.Msg)) *dns.Msg {
		m := ask1("web.shop.svc.cluster.local.", "A")
		change(m)
		return m
	}
	for want, m := range map[string]*dns.Msg{
		"REFUSED":                           web(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }),
		"NOTIMP":                            web(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }),
		dns.RcodeToString[dns.RcodeBadVers]: web(func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }),
		"FORMERR":                           web(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }),
		"upstream": func() *dns.Msg {
			m := ask1("web.", "TXT")
			m.Question[0].Qclass = dns.ClassCHAOS
			return m
		}(),
	} {
		if _, got := local(t, s, m); !strings.HasPrefix(got, want) {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	for _, raw := range [][]byte{nil, make([]byte, 11), append([]byte{0, 1, 0x80}, make([]byte, 20)...)} {
		if reply, later := s.handle(raw, nil, false); reply != nil || later != nil {
			t.Errorf("%x was answered: %x", raw, reply)
		}
	}
	raw, _ := web(func(m *dns.Msg) { m.SetEdns0(1232, false) }).Pack()
	if reply, _ := s.handle(raw[:len(raw)-1], nil, false); reply == nil || reply[3]&15 != dns.RcodeFormatError {
		t.Errorf("cut query: %x", reply)
	}
}

func BenchmarkZone(b *testing.B) {
	s := newShop(Config{})
	for i := range 2000 {
		s.Zone().PutService(catalog.Service{Namespace: "shop", Name: fmt.Sprint("s", i), ClusterIPs: addrs("10.96.9.9"),
			Ports: []catalog.Port{{Name: "http", Protocol: "tcp", Port: 80}}})
	}
	for _, c := range []struct{ name, qtype string }{{"web.shop.svc.cluster.local.", "A"}, {"web.", "A"}, {"web.shop.", "AAAA"},
		{"db.shop.svc.cluster.local.", "SRV"}, {"7.0.244.10.in-addr.arpa.", "PTR"}, {"nosuch.shop.svc.cluster.local.", "A"}} {
		m := ask1(c.name, c.qtype)
		m.SetEdns0(1232, false)
		raw, _ := m.Pack()
		b.Run(c.name+c.qtype, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if reply, _ := s.handle(raw, nil, false); reply == nil {
					b.Fatal("no reply")
				}
			}
		})
	}
}

func TestWithinAndLabels(t *testing.T) {
	names := []string{".", "local.", "cluster.local.", "web.cluster.local.", "xcluster.local.", `x\.cluster.local.`, `x\\.cluster.local.`, "a.b.cluster.local.", "cluster.local.de."}
	for _, name := range names {
		for _, domain := range names {
			if got, want := within(domain, name), dns.IsSubDomain(domain, name); got != want {
				t.Errorf("%s within %s: %v", name, domain, got)
			}
		}
		if got, want := labelsOf(name), dns.SplitDomainName(name); !slices.Equal(got, want) {
			t.Errorf("labels of %s: %q, want %q", name, got, want)
		}
	}
	if got := labelsOf("web.shop"); !slices.Equal(got, []string{"web", "shop"}) {
		t.Errorf("labels of what is relative: %q", got)
	}
}
