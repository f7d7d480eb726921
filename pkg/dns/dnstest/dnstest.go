// Package dnstest compares DNS servers: it makes questions from a catalog, asks
// them, and tells answers apart the way a client of a cluster would.
package dnstest

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// A Question is all that is put into a query.
type Question struct {
	Name  string
	Full  string // what the oracle is asked where Name is a short form, else ""
	Type  uint16
	Class uint16 // IN when 0

	EDNS    uint16 // UDP size; no OPT when 0
	Version uint8  // of EDNS
	DO      bool
	TCP     bool
}

func (q Question) String() string {
	s := fmt.Sprintf("%s %s", q.Name, dns.TypeToString[q.Type])
	if q.Class != 0 {
		s += " " + dns.ClassToString[q.Class]
	}
	if q.EDNS != 0 {
		s += fmt.Sprintf(" +edns=%d +bufsize=%d do=%t", q.Version, q.EDNS, q.DO)
	}
	if q.TCP {
		s += " +tcp"
	}
	return s
}

// Oracle is the question in the form that the cluster's own DNS understands.
func (q Question) Oracle() Question {
	if q.Full != "" {
		q.Name, q.Full = q.Full, ""
	}
	return q
}

// Message is the query, with a random id.
func (q Question) Message() *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(q.Name, q.Type)
	if q.Class != 0 {
		m.Question[0].Qclass = q.Class
	}
	if q.EDNS != 0 {
		m.SetEdns0(q.EDNS, q.DO)
		m.IsEdns0().SetVersion(q.Version)
	}
	return m
}

// patience is that of a stub resolver.
const patience = 5 * time.Second

// Ask asks a server, "address:port", over the sockets that dial makes; nil is a
// plain dialer. Like a stub resolver it asks again over TCP if the answer was
// cut: where it is near the limit, its order decides whether it fits.
func Ask(ctx context.Context, dial func(ctx context.Context, network, address string) (net.Conn, error), server string, q Question) (*dns.Msg, error) {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	network := "udp"
	if q.TCP {
		network = "tcp"
	}
	conn, err := dial(ctx, network, server)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", server, err)
	}
	defer conn.Close()
	client := dns.Client{Timeout: patience}
	if end, ok := ctx.Deadline(); ok {
		client.Timeout = time.Until(end)
	}
	m, _, err := client.ExchangeWithConnContext(ctx, q.Message(), &dns.Conn{Conn: conn, UDPSize: dns.MaxMsgSize})
	if err != nil {
		return nil, fmt.Errorf("ask %s for %s: %w", server, q, err)
	}
	if m.Truncated && !q.TCP {
		q.TCP = true
		return Ask(ctx, dial, server, q)
	}
	return m, nil
}

// Diff compares an answer with the oracle's and says what differs, or "". It
// allows for what the two cannot have in common: each resolves names outside
// the cluster, and reverse names that the cluster does not know, by nameservers
// of its own.
func (q Question) Diff(domain string, oracle, got *dns.Msg) string {
	if isReverse(q.Oracle().Name) && len(below(domain, oracle.Answer)) == 0 {
		return foreign(domain, oracle, got)
	}
	oracle, got = oracle.Copy(), got.Copy()
	oracle.Answer, got.Answer = q.inside(domain, oracle.Answer), q.inside(domain, got.Answer)
	return Equal(oracle, got)
}

// foreign compares answers about an address that the cluster does not know: what
// is behind each server says NXDOMAIN, or nothing, or something of its own.
func foreign(domain string, oracle, got *dns.Msg) string {
	if names := below(domain, got.Answer); len(names) > 0 {
		return fmt.Sprintf("oracle knows nothing, got %v", names)
	}
	ok := func(m *dns.Msg) bool { return m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError }
	if ok(oracle) && !ok(got) {
		return fmt.Sprintf("rcode %s, %s", dns.RcodeToString[oracle.Rcode], dns.RcodeToString[got.Rcode])
	}
	return ""
}

func isReverse(name string) bool {
	name = strings.ToLower(name)
	return strings.HasSuffix(name, ".in-addr.arpa.") || strings.HasSuffix(name, ".ip6.arpa.")
}

func below(domain string, rrs []dns.RR) []dns.RR {
	return slices.DeleteFunc(slices.Clone(rrs), func(rr dns.RR) bool {
		ptr, ok := rr.(*dns.PTR)
		return !ok || !dns.IsSubDomain(dns.Fqdn(domain), ptr.Ptr)
	})
}

// inside leaves out records whose owner is neither asked for nor in the cluster.
func (q Question) inside(domain string, rrs []dns.RR) []dns.RR {
	return slices.DeleteFunc(slices.Clone(rrs), func(rr dns.RR) bool {
		owner := rr.Header().Name
		return !strings.EqualFold(owner, q.Name) && !strings.EqualFold(owner, q.Full) && !dns.IsSubDomain(dns.Fqdn(domain), owner)
	})
}

// Equal compares two answers and says what differs, or "": rcode, the records
// of answer and additional as sets, whether a SOA is in authority, truncation,
// and whether there is an OPT with the same DO bit. TTL, order, id, the case of
// names and EDNS options are not looked at. The name asked counts as the same
// name on both sides.
func Equal(a, b *dns.Msg) string {
	switch {
	case a.Rcode != b.Rcode:
		return fmt.Sprintf("rcode %s, %s", dns.RcodeToString[a.Rcode], dns.RcodeToString[b.Rcode])
	case a.Truncated != b.Truncated:
		return fmt.Sprintf("truncated %t, %t", a.Truncated, b.Truncated)
	case opt(a) != opt(b):
		return fmt.Sprintf("opt %q, %q", opt(a), opt(b))
	case a.Truncated:
		return ""
	}
	for _, section := range []struct {
		name string
		a, b []string
	}{
		{"answer", answers(a), answers(b)},
		{"additional", rdata(a.Extra), rdata(b.Extra)},
		{"authority", starts(a), starts(b)},
	} {
		if !slices.Equal(section.a, section.b) {
			return fmt.Sprintf("%s %q, %q", section.name, section.a, section.b)
		}
	}
	return ""
}

func opt(m *dns.Msg) string {
	o := m.IsEdns0()
	if o == nil {
		return "none"
	}
	return fmt.Sprintf("do=%t", o.Do())
}

func starts(m *dns.Msg) []string {
	for _, rr := range m.Ns {
		if rr.Header().Rrtype == dns.TypeSOA {
			return []string{"SOA"}
		}
	}
	return nil
}

// answers are the records of the answer, with the name that was asked as "@".
func answers(m *dns.Msg) []string {
	rrs := make([]dns.RR, len(m.Answer))
	for i, rr := range m.Answer {
		rrs[i] = dns.Copy(rr)
		if len(m.Question) == 1 && strings.EqualFold(rr.Header().Name, m.Question[0].Name) {
			rrs[i].Header().Name = "@"
		}
	}
	return rdata(rrs)
}

// rdata makes records comparable: lower case, no TTL, no serial, sorted.
func rdata(rrs []dns.RR) []string {
	var out []string
	for _, rr := range rrs {
		if rr.Header().Rrtype == dns.TypeOPT {
			continue
		}
		rr = dns.Copy(rr)
		rr.Header().Ttl = 0
		if soa, ok := rr.(*dns.SOA); ok {
			soa.Serial = 0
		}
		out = append(out, strings.ToLower(rr.String()))
	}
	slices.Sort(out)
	return slices.Compact(out)
}
