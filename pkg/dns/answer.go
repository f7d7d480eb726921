package dns

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// An outcome is what the zone says to a question: records, or none of them with
// the start of the authority that says so, or that it may not know.
type outcome struct {
	verdict
	answer   []dns.RR
	extra    []dns.RR
	external string // the rest of a chain of aliases, still to be asked elsewhere
}

// answer resolves a name below the domain, given in lower case. The records are
// owned by what was asked, which may be a short form of it, in its own case.
func (z *Zone) answer(name string, q dns.Question) outcome {
	z.mu.RLock()
	defer z.mu.RUnlock()
	labels := z.below(name)
	f := z.lookup(labels)
	if f.verdict == unknown {
		return outcome{verdict: unknown}
	}
	if strings.HasPrefix(name, nameserver+z.domain) && q.Qtype != dns.TypeTXT && q.Qtype != dns.TypePTR {
		return z.nameserverAddresses(q)
	}
	switch q.Qtype {
	case dns.TypeA, dns.TypeAAAA:
		return z.addresses(name, q, f)
	case dns.TypeSRV:
		return z.srv(q, f)
	case dns.TypeCNAME:
		return z.cname(q, f)
	case dns.TypeTXT:
		return z.txt(q, f, labels)
	case dns.TypeSOA:
		return z.start(q, labels)
	case dns.TypeNS:
		if len(labels) == 0 {
			return z.nameservers(q)
		}
	}
	return outcome{verdict: f.verdict}
}

// below gives the labels before the domain.
func (z *Zone) below(name string) []string {
	return labelsOf(strings.TrimSuffix(name, z.domain))
}

// addresses follows aliases within the domain. As in CoreDNS an alias is kept
// only if something is found behind it; a loop, or eleven aliases, find nothing.
func (z *Zone) addresses(name string, q dns.Question, f found) outcome {
	first := f.verdict
	var chain []dns.RR
	owner := q.Name
	for {
		if f.verdict == unknown {
			return outcome{verdict: unknown}
		}
		alias := aliasOf(f)
		if alias == "" {
			break
		}
		target := lower(alias)
		if dns.IsSubDomain(name, target) || len(chain) > 10 || met(chain, target) {
			return outcome{verdict: first}
		}
		chain = append(chain, &dns.CNAME{Hdr: z.header(owner, dns.TypeCNAME), Target: alias})
		if !within(z.domain, target) {
			return outcome{verdict: exists, answer: chain, external: alias}
		}
		name, owner = target, alias
		f = z.target(target, q.Qtype)
	}
	records := z.hosts(owner, q.Qtype, f.hits)
	if len(records) == 0 {
		return outcome{verdict: first}
	}
	return outcome{verdict: exists, answer: append(chain, records...)}
}

// target looks up where an alias leads within the domain.
func (z *Zone) target(name string, qtype uint16) found {
	if strings.HasPrefix(name, nameserver+z.domain) {
		f := found{verdict: exists}
		for _, s := range z.servers() {
			f.hits = append(f.hits, hit{addr: s.addr})
		}
		return f
	}
	return z.lookup(z.below(name))
}

func aliasOf(f found) string {
	if len(f.hits) == 0 || f.hits[0].alias == "" {
		return ""
	}
	return fqdn(f.hits[0].alias)
}

func met(chain []dns.RR, target string) bool {
	return slices.ContainsFunc(chain, func(rr dns.RR) bool {
		return strings.EqualFold(rr.(*dns.CNAME).Target, target)
	})
}

// hosts makes address records of one family, each address once, in random
// order: clients take the first.
func (z *Zone) hosts(owner string, qtype uint16, hits []hit) []dns.RR {
	slices.SortFunc(hits, func(a, b hit) int { return a.addr.Compare(b.addr) })
	records := make([]dns.RR, 0, 1) // as most have
	for i, h := range hits {
		if h.addr.Is4() == (qtype == dns.TypeA) && h.addr.IsValid() && (i == 0 || hits[i-1].addr != h.addr) {
			records = append(records, z.address(owner, h.addr))
		}
	}
	rand.Shuffle(len(records), func(i, j int) { records[i], records[j] = records[j], records[i] })
	return records
}

func (z *Zone) address(owner string, a netip.Addr) dns.RR {
	if a.Is4() {
		return &dns.A{Hdr: z.header(owner, dns.TypeA), A: a.AsSlice()}
	}
	return &dns.AAAA{Hdr: z.header(owner, dns.TypeAAAA), AAAA: a.AsSlice()}
}

// srv gives one record for each target and port, and the address of each
// target beside it. A weight is the hundredth part shared by all hits.
func (z *Zone) srv(q dns.Question, f found) outcome {
	o := outcome{verdict: f.verdict}
	type where struct {
		label string
		port  int
		addr  netip.Addr
	}
	seen := map[where]bool{}
	once := func(w where) bool { is := !seen[w]; seen[w] = true; return is }
	for _, h := range f.hits {
		if h.port < 0 || h.alias != "" {
			continue
		}
		target := z.name(h.label, f.base)
		if once(where{label: h.label, port: h.port}) {
			o.answer = append(o.answer, &dns.SRV{Hdr: z.header(q.Name, dns.TypeSRV),
				Weight: uint16(max(1, 100/len(f.hits))), Port: uint16(h.port), Target: target})
		}
		if once(where{label: h.label, addr: h.addr}) {
			o.extra = append(o.extra, z.address(target, h.addr))
		}
	}
	return o
}

func (z *Zone) name(label string, base []string) string {
	name := strings.Join(base, ".") + "." + z.domain
	if label != "" {
		name = label + "." + name
	}
	return name
}

func (z *Zone) cname(q dns.Question, f found) outcome {
	o := outcome{verdict: f.verdict}
	if alias := aliasOf(f); alias != "" {
		o.answer = []dns.RR{&dns.CNAME{Hdr: z.header(q.Name, dns.TypeCNAME), Target: alias}}
	}
	return o
}

// txt knows one record, the version of the schema. Names without records of any
// type do not exist when TXT is asked: CoreDNS says so, even of the domain.
func (z *Zone) txt(q dns.Question, f found, labels []string) outcome {
	if len(labels) == 1 && labels[0] == "dns-version" {
		return outcome{verdict: exists, answer: []dns.RR{&dns.TXT{Hdr: z.header(q.Name, dns.TypeTXT), Txt: []string{"1.1.0"}}}}
	}
	if len(f.hits) == 0 {
		return outcome{verdict: absent}
	}
	return outcome{verdict: exists}
}

// start answers SOA: no name but the domain has one, and of none is it said
// that it does not exist.
func (z *Zone) start(q dns.Question, labels []string) outcome {
	o := outcome{verdict: exists}
	if len(labels) == 0 {
		o.answer = []dns.RR{z.soa(q.Name)}
	}
	return o
}

func (z *Zone) soa(owner string) *dns.SOA {
	return &dns.SOA{Hdr: z.header(owner, dns.TypeSOA), Ns: nameserver + z.domain, Mbox: "hostmaster." + z.domain,
		Serial: z.serial, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: z.ttl}
}

const nameserver = "ns.dns."

// A server is one name and address of the cluster's DNS.
type server struct {
	name string
	addr netip.Addr
}

// servers are the Services in front of the cluster's DNS, as it sees them: all
// that publish the same endpoint.
func (z *Zone) servers() []server {
	k, ok := z.virtual[z.server]
	if !ok {
		k = key{"kube-system", "kube-dns"}
	}
	svc := z.services[k]
	if svc == nil || len(svc.Endpoints) == 0 {
		if !z.server.IsValid() {
			return nil
		}
		return []server{{nameserver + z.domain, z.server}}
	}
	var all []server
	for _, k := range z.endpoints[svc.Endpoints[0].Addr] {
		all = append(all, z.serversOf(z.services[k])...)
	}
	return all
}

func (z *Zone) serversOf(svc *service) []server {
	base := []string{svc.Name, svc.Namespace, "svc"}
	var all []server
	if !svc.Headless {
		for _, a := range svc.ClusterIPs {
			all = append(all, server{z.name("", base), a})
		}
		return all
	}
	for i := range svc.Endpoints {
		all = append(all, server{z.name(svc.labels[i], base), svc.Endpoints[i].Addr})
	}
	return all
}

// nameservers are names of Services, which not everybody may see.
func (z *Zone) nameservers(q dns.Question) outcome {
	servers := z.servers()
	if !z.all && (len(servers) == 0 || servers[0].name == nameserver+z.domain) {
		return outcome{verdict: unknown}
	}
	o := outcome{verdict: exists}
	seen := map[string]bool{}
	for _, s := range servers {
		o.extra = append(o.extra, z.address(s.name, s.addr))
		if !seen[s.name] {
			seen[s.name] = true
			o.answer = append(o.answer, &dns.NS{Hdr: z.header(q.Name, dns.TypeNS), Ns: s.name})
		}
	}
	return o
}

func (z *Zone) nameserverAddresses(q dns.Question) outcome {
	o := outcome{verdict: exists}
	if isAddress(q.Qtype) {
		o.answer = z.hosts(q.Name, q.Qtype, z.target(nameserver+z.domain, q.Qtype).hits)
	}
	return o
}

// reverse answers for an address of the cluster. The first Service that has it
// as its own wins; else every endpoint of that address is named.
func (z *Zone) reverse(a netip.Addr, q dns.Question) outcome {
	z.mu.RLock()
	defer z.mu.RUnlock()
	names := z.namesOf(a)
	switch {
	case len(names) == 0 && !z.all:
		return outcome{verdict: unknown}
	case len(names) == 0 && q.Qtype != dns.TypeSOA:
		return outcome{verdict: absent}
	case q.Qtype != dns.TypePTR:
		return outcome{verdict: exists}
	}
	o := outcome{verdict: exists}
	for _, n := range names {
		o.answer = append(o.answer, &dns.PTR{Hdr: z.header(q.Name, dns.TypePTR), Ptr: n})
	}
	return o
}

func (z *Zone) namesOf(a netip.Addr) []string {
	if k, ok := z.virtual[a]; ok {
		return []string{z.name("", []string{k.name, k.namespace, "svc"})}
	}
	var names []string
	for _, k := range z.endpoints[a] {
		svc := z.services[k]
		for i := range svc.Endpoints {
			name := z.name(svc.labels[i], []string{k.name, k.namespace, "svc"})
			if svc.Endpoints[i].Addr == a && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

func (z *Zone) header(owner string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: owner, Rrtype: rrtype, Class: dns.ClassINET, Ttl: z.ttl}
}
