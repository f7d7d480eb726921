package dns

import (
	"context"

	"github.com/miekg/dns"
)

// Expand gives the whole name under which the cluster's DNS knows a host, by the search
// list of the namespace: "" for one that is not the cluster's. It is for who has names
// resolved in the cluster; the answer is made as that to a question for an address.
func (s *Server) Expand(ctx context.Context, host string) (full string, err error) {
	q := dns.Question{Name: fqdn(host), Qtype: dns.TypeA, Qclass: dns.ClassINET}
	if _, is := dns.IsDomainName(q.Name); !is {
		return "", nil
	}
	switch r := s.split(q, dns.OpcodeQuery); r.to {
	case zones, clusters:
		return r.full, nil
	case perhaps:
		got, err := s.cluster.ask(ctx, r.full, q.Qtype)
		if err != nil || got.Rcode == dns.RcodeNameError {
			return "", err
		}
		return r.full, nil
	}
	return "", nil
}
