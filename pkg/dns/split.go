package dns

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// A whose says who answers a question.
type whose int

const (
	upstreams whose = iota // the machine's own nameservers
	zones                  // the zone, under a name of the cluster
	reverses               // the zone, under an address
	selves                 // this server, of itself
	clusters               // the cluster's DNS
	perhaps                // the cluster's DNS, and upstream if it does not exist there
)

// A route is where a question goes. full is the name below the cluster
// domain where a short one was asked, in lower case. start is the owner of the
// SOA in a negative answer: resolvers keep one only below that owner.
type route struct {
	to    whose
	full  string
	start string
	addr  netip.Addr
}

// split decides by the name alone, and for short names by what the zone holds;
// those are short only in a plain query of class IN.
func (s *Server) split(q dns.Question, opcode int) route {
	name := lower(q.Name)
	if slices.Contains(s.never, name) {
		return route{to: upstreams}
	}
	if !s.plain && within(s.zone.domain, name) {
		return route{to: zones, full: name, start: q.Name[len(q.Name)-len(s.zone.domain):]}
	}
	if s.suffix != "" && within(s.suffix, name) {
		return route{to: zones, full: s.zone.expand(name[:len(name)-len(s.suffix)], s.namespace), start: q.Name[len(q.Name)-len(s.suffix):]}
	}
	if name == s.self {
		return route{to: selves, full: name, start: q.Name}
	}
	if a, start, ok := reversed(name); ok {
		return s.reverse(a, route{to: upstreams, full: name, start: start})
	}
	for _, extra := range s.extra {
		if within(extra, name) {
			return route{to: clusters, full: name}
		}
	}
	if s.plain || q.Qclass != dns.ClassINET || opcode != dns.OpcodeQuery {
		return route{to: upstreams}
	}
	return s.zone.short(name, s.namespace, q)
}

// within tells whether a name is a domain or one below it, both in lower case. It is asked
// for each question, and so in a way that needs no memory where names are ordinary.
func within(domain, name string) bool {
	if !strings.HasSuffix(name, domain) {
		return false
	}
	if strings.IndexByte(name, '\\') >= 0 || domain == "." {
		return dns.IsSubDomain(domain, name)
	}
	return len(name) == len(domain) || name[len(name)-len(domain)-1] == '.'
}

// labelsOf are those of a name, for which likewise.
func labelsOf(name string) []string {
	if strings.IndexByte(name, '\\') >= 0 || name == "" || name == "." {
		return dns.SplitDomainName(name)
	}
	return strings.Split(strings.TrimSuffix(name, "."), ".")
}

// reverse asks for the name of the address that is reached under a. What the cluster has
// too, but is reached under another, is somebody else's here.
func (s *Server) reverse(a netip.Addr, r route) route {
	switch real := s.real(a); {
	case real != a:
		r.to, r.addr = reverses, real
		r.full, _ = dns.ReverseAddr(real.String())
	case s.shown(a) == a && s.zone.owns(a):
		r.to, r.addr = reverses, a
	}
	return r
}

// owns tells whose an address is: the cluster's if it is known or routed there.
func (z *Zone) owns(a netip.Addr) bool {
	z.mu.RLock()
	defer z.mu.RUnlock()
	return len(z.namesOf(a)) > 0 || z.covers(a)
}

// short looks a name up as the search path of a pod would, in the session's
// namespace first, and takes it only if that finds something that is there. So
// golang.dev stays what it is, though there be a namespace dev.
//
// What cannot be known goes to the cluster only where nobody else can have the
// name: below svc, or a single label. Others never depend on the tunnel; they
// can be asked for in full.
func (z *Zone) short(name, namespace string, q dns.Question) route {
	labels := labelsOf(name)
	n := len(labels)
	if n > 1 && labels[n-1] == "svc" {
		return route{to: zones, full: name + z.domain, start: "svc."}
	}
	if n == 0 || n > 5 {
		return route{to: upstreams}
	}
	z.mu.RLock()
	defer z.mu.RUnlock()
	if full, found := z.search(labels, namespace); found {
		return route{to: zones, full: full, start: name}
	}
	if n == 1 && namespace != "" && !z.holds(namespace) && name != "localhost." && isAddress(q.Qtype) {
		return route{to: perhaps, full: name + namespace + ".svc." + z.domain}
	}
	return route{to: upstreams}
}

// search finds what is there under a short name; the caller holds the lock.
func (z *Zone) search(labels []string, namespace string) (full string, found bool) {
	n := len(labels)
	for _, tail := range tails(namespace) {
		if all := append(labels[:n:n], tail...); z.has(all) {
			return z.full(all), true
		}
	}
	return "", false
}

func (z *Zone) full(labels []string) string { return strings.Join(append(labels, z.domain), ".") }

// expand gives the full name for one below the suffix. All there is is the
// cluster's, so what is not there has a name as well, which is then denied or
// asked of the cluster's DNS: that of a Service.
func (z *Zone) expand(name, namespace string) string {
	z.mu.RLock()
	defer z.mu.RUnlock()
	labels := labelsOf(name)
	n := len(labels)
	full, found := z.search(labels, namespace)
	switch {
	case found:
		return full
	case within(z.domain, name):
		return name
	case n == 1 && labels[0] != "svc" && namespace != "":
		return z.full([]string{labels[0], namespace, "svc"})
	case n > 1 && labels[n-1] != "svc" && labels[n-1] != "pod":
		return z.full(append(labels, "svc"))
	}
	return z.full(labels)
}

func isAddress(qtype uint16) bool { return qtype == dns.TypeA || qtype == dns.TypeAAAA }

// tails are the search path of a pod, short of the domain.
func tails(namespace string) [][]string {
	if namespace == "" {
		return [][]string{{"svc"}, {}}
	}
	return [][]string{{namespace, "svc"}, {"svc"}, {}}
}

// has tells whether labels below the domain name a Service that is there, or
// an endpoint, a port or a pod of the cluster.
func (z *Zone) has(labels []string) bool {
	n := len(labels)
	if n < 3 || n > 5 {
		return false
	}
	if labels[n-1] == "pod" {
		return n == 3 && z.exists(labels[1]) && pod(labels).verdict == exists
	}
	svc := z.services[key{labels[n-2], labels[n-3]}]
	if svc == nil || labels[n-1] != "svc" {
		return false
	}
	before := labels[:n-3]
	if len(before) == 2 && !(strings.HasPrefix(before[0], "_") && strings.HasPrefix(before[1], "_")) {
		return false
	}
	return len(before) == 0 || len(svc.hits(before)) > 0
}

const (
	reverse4 = "in-addr.arpa."
	reverse6 = "ip6.arpa."
)

// reversed reads the address out of a reverse name of a single address.
func reversed(name string) (a netip.Addr, start string, ok bool) {
	if digits, is := strings.CutSuffix(name, "."+reverse4); is {
		a, err := netip.ParseAddr(backwards(digits, "."))
		return a, reverse4, err == nil && a.Is4()
	}
	if digits, is := strings.CutSuffix(name, "."+reverse6); is && len(digits) == 63 {
		a, ok := nibbles(digits)
		return a, reverse6, ok
	}
	return netip.Addr{}, "", false
}

func backwards(s, sep string) string {
	parts := strings.Split(s, sep)
	for i, j := 0, len(parts)-1; i < j; i, j = i+1, j-1 {
		parts[i], parts[j] = parts[j], parts[i]
	}
	return strings.Join(parts, sep)
}

// nibbles reads 32 hexadecimal digits with dots between, the last one first.
func nibbles(s string) (netip.Addr, bool) {
	var ip [16]byte
	for i := range 32 {
		c := s[2*(31-i)]
		d := strings.IndexByte("0123456789abcdef", c)
		if d < 0 || i > 0 && s[2*(31-i)+1] != '.' {
			return netip.Addr{}, false
		}
		ip[i/2] = ip[i/2]<<4 | byte(d)
	}
	return netip.AddrFrom16(ip).Unmap(), true
}
