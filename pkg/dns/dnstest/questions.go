package dnstest

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/miekg/dns"
)

// enough is how many questions there are at least.
const enough = 600

// Questions makes full names out of a catalog, right and wrong ones, and asks
// for each in several types, cases and transports. The same seed gives the same
// questions.
//
// Left out is what CoreDNS answers differently from one configuration, or one
// moment, to the next: other classes than IN (refused, unless it forwards), and
// odd cases of the apex and of ns.dns (right, if its cache holds them).
func Questions(domain string, services []catalog.Service, seed int64) []Question {
	g := newGenerator(domain, seed)
	services = sorted(services)
	g.fixed()
	for i := range services {
		g.service(&services[i])
	}
	for _, ns := range namespaces(services) {
		g.namespace(ns)
	}
	for len(g.questions) < enough {
		g.add(g.pick(g.names), g.anyType())
	}
	return g.questions
}

// Short makes the short forms of names that are there, as a session in the
// namespace would ask them.
func Short(domain, namespace string, services []catalog.Service, seed int64) []Question {
	g := newGenerator(domain, seed)
	services = sorted(services)
	for i := range services {
		s := &services[i]
		for _, before := range present(s) {
			base := before + s.Name
			full := g.join(base, s.Namespace, "svc")
			g.short(base+"."+s.Namespace+".", full)
			g.short(base+"."+s.Namespace+".svc.", full)
			if s.Namespace == namespace {
				g.short(base+".", full)
			}
		}
	}
	return g.questions
}

type generator struct {
	domain    string // fully qualified
	random    *rand.Rand
	names     []string
	questions []Question
}

func newGenerator(domain string, seed int64) *generator {
	return &generator{domain: dns.Fqdn(domain), random: rand.New(rand.NewPCG(uint64(seed), 53))}
}

func (g *generator) join(labels ...string) string { return strings.Join(labels, ".") + "." + g.domain }

// fixed are the names that every cluster has, or has not.
func (g *generator) fixed() {
	for _, t := range []uint16{dns.TypeSOA, dns.TypeNS, dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeANY, dns.TypeSRV, dns.TypePTR, dns.TypeCNAME} {
		g.plain(g.domain, t)
		g.plain("ns.dns."+g.domain, t)
		g.plain("dns-version."+g.domain, t)
	}
	for _, labels := range []string{
		"svc", "pod", "a", "dns", "apex.dns", "nosuch.svc", "nosuch.pod", "web.nosuch.svc", "1-2-3-4.nosuch.pod",
		"kubernetes.default.svc", "kubernetes.default.pod", "kubernetes.default", "a.b.c.default.svc", "a.b.c.d.default.svc",
		"*.default.svc", "*.*.svc", "any.any.svc", "_any._any.kubernetes.default.svc", "_.default.svc", "_._tcp.kubernetes.default.svc",
		"https.tcp.kubernetes.default.svc", "_https._tcp.kubernetes.default.svc", "_https._udp.kubernetes.default.svc",
		"_nosuch._tcp.kubernetes.default.svc", "endpoint.kubernetes.default.svc", "default.svc", "default.pod",
		"10-244-0-5.default.pod", "10-244-0-256.default.pod", "fd00--1.default.pod", "--1.default.pod", "1--2--3.default.pod",
		"x.10-244-0-5.default.pod", "x.y.10-244-0-5.default.pod", "x.y.z.10-244-0-5.default.pod", "10-244-0.default.pod",
		"--ffff-10a-b.default.pod", "ns.dns.svc", strings.TrimSuffix(g.domain, "."), "web.shop.svc.svc", "xn--bcher-kva.default.svc",
	} {
		g.several(g.join(labels))
	}
	for _, name := range []string{"1.2.0.192.in-addr.arpa.", "0.192.in-addr.arpa.", "x.10.96.10.in-addr.arpa.",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa."} {
		g.plain(name, dns.TypePTR)
	}
	kubernetes := g.join("kubernetes", "default", "svc")
	g.questions = append(g.questions,
		Question{Name: kubernetes, Type: dns.TypeA, EDNS: 1232, Version: 1},
		Question{Name: kubernetes, Type: dns.TypeA, EDNS: 100, DO: true},
		Question{Name: kubernetes, Type: dns.TypeAXFR, TCP: true},
		Question{Name: g.domain, Type: dns.TypeAXFR, TCP: true},
		Question{Name: g.domain, Type: dns.TypeIXFR, TCP: true})
}

// service asks for a Service, its ports, its endpoints, and their addresses.
func (g *generator) service(s *catalog.Service) {
	for _, before := range befores(s) {
		g.several(g.join(before+s.Name, s.Namespace, "svc"))
	}
	for _, wrong := range []string{"nosuch.", "_nosuch._tcp.", "a.b.c."} {
		g.several(g.join(wrong+s.Name, s.Namespace, "svc"))
	}
	g.several(g.join(s.Name, s.Namespace, "pod"))
	g.several(g.join(s.Name, s.Namespace))
	g.several(g.join(s.Name+"x", s.Namespace, "svc"))
	for _, a := range addresses(s) {
		g.reverse(a)
		g.reverse(a.Next())
		g.several(g.join(dashed(a), s.Namespace, "pod"))
	}
}

// befores are the labels that may stand before a Service, none among them.
func befores(s *catalog.Service) []string {
	all := []string{""}
	for _, p := range s.Ports {
		all = append(all, fmt.Sprintf("_%s._%s.", cmp.Or(p.Name, "none"), p.Protocol))
	}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if i < 4 {
			all = append(all, cmp.Or(e.Hostname, dashed(e.Addr))+".", dashed(e.Addr)+".")
		}
		for _, p := range e.Ports {
			all = append(all, fmt.Sprintf("_%s._%s.", cmp.Or(p.Name, "none"), p.Protocol))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// present are those of befores that name something.
func present(s *catalog.Service) []string {
	if s.ExternalName != "" {
		return []string{""}
	}
	ports, all := s.Ports, []string{""}
	for i := range s.Endpoints[:min(4, len(s.Endpoints))] {
		e := &s.Endpoints[i]
		all = append(all, cmp.Or(e.Hostname, dashed(e.Addr))+".")
		if s.Headless {
			ports = e.Ports
		}
	}
	if s.Headless && len(s.Endpoints) == 0 {
		return all
	}
	for _, p := range ports {
		if p.Name != "" {
			all = append(all, fmt.Sprintf("_%s._%s.", p.Name, p.Protocol))
		}
	}
	return all
}

func addresses(s *catalog.Service) []netip.Addr {
	all := slices.Clone(s.ClusterIPs)
	for i := range s.Endpoints[:min(4, len(s.Endpoints))] {
		all = append(all, s.Endpoints[i].Addr)
	}
	return all
}

func dashed(a netip.Addr) string {
	label := strings.NewReplacer(".", "-", ":", "-").Replace(a.String())
	if strings.HasSuffix(label, "-") {
		label += "0"
	}
	return label
}

func (g *generator) namespace(ns string) {
	g.several(g.join(ns, "svc"))
	g.several(g.join(ns, "pod"))
	g.several(g.join(ns))
	g.several(g.join("nosuch", ns, "svc"))
	g.several(g.join("10-1-2-3", ns, "pod"))
}

func (g *generator) reverse(a netip.Addr) {
	name, err := dns.ReverseAddr(a.String())
	if err == nil {
		g.add(name, dns.TypePTR)
		g.add(name, g.anyType())
	}
}

// several asks for a name in the types that matter, and in one of the others.
func (g *generator) several(name string) {
	g.names = append(g.names, name)
	for _, t := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, g.anyType()} {
		g.add(name, t)
	}
}

func (g *generator) plain(name string, t uint16) {
	g.questions = append(g.questions, Question{Name: name, Type: t})
}

// add asks in a case, with an EDNS and over a transport that chance gives.
func (g *generator) add(name string, t uint16) {
	g.questions = append(g.questions, g.dress(Question{Name: name, Type: t}))
}

func (g *generator) short(name, full string) {
	for _, t := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypeTXT} {
		g.questions = append(g.questions, g.dress(Question{Name: name, Full: full, Type: t}))
	}
}

func (g *generator) dress(q Question) Question {
	if g.random.IntN(3) == 0 {
		q.Name = g.oddCase(q.Name)
	}
	if g.random.IntN(2) == 0 {
		q.EDNS = []uint16{512, 1232, 4096}[g.random.IntN(3)]
		q.DO = g.random.IntN(3) == 0
	}
	q.TCP = g.random.IntN(5) == 0
	return q
}

func (g *generator) oddCase(name string) string {
	b := []byte(name)
	for i, c := range b {
		if c >= 'a' && c <= 'z' && g.random.IntN(2) == 0 {
			b[i] = c - 'a' + 'A'
		}
	}
	return string(b)
}

func (g *generator) anyType() uint16 {
	types := []uint16{dns.TypeTXT, dns.TypeMX, dns.TypeANY, dns.TypeNAPTR, dns.TypeCAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeDS,
		dns.TypeDNSKEY, dns.TypeNS, dns.TypeSOA, dns.TypeCNAME, dns.TypePTR, dns.TypeHINFO, dns.TypeLOC, dns.TypeTLSA, 65280}
	return types[g.random.IntN(len(types))]
}

func (g *generator) pick(names []string) string { return names[g.random.IntN(len(names))] }

func sorted(services []catalog.Service) []catalog.Service {
	return slices.SortedFunc(slices.Values(services), func(a, b catalog.Service) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

func namespaces(services []catalog.Service) []string {
	var all []string
	for i := range services {
		all = append(all, services[i].Namespace)
	}
	return slices.Compact(all)
}
