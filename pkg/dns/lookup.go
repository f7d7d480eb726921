package dns

import (
	"net/netip"
	"strings"

	"github.com/culvert-dev/culvert/pkg/catalog"
)

// A verdict says what is known of a name.
type verdict int

const (
	absent  verdict = iota // it does not exist
	exists                 // it does, with or without records
	unknown                // the zone may not know: ask the cluster's DNS
)

// A hit is one thing behind a name: an address with a port, or an alias.
type hit struct {
	addr  netip.Addr
	port  int    // -1: none
	label string // of an endpoint, else ""
	alias string // the target of an ExternalName, as it is written
}

// found is the outcome of a look-up. base is the Service or pod a hit belongs
// to, as the labels below the domain.
type found struct {
	verdict
	hits []hit
	base []string
}

// lookup goes from labels below the cluster domain, in lower case, to what
// stands behind them:
//
//	service.namespace.svc
//	endpoint.service.namespace.svc
//	_port._protocol.service.namespace.svc
//	1-2-3-4.namespace.pod
//
// As in CoreDNS, the first two labels need no underscore, a bare one stands for
// anything, and whatever stands before a pod's name is not looked at.
func (z *Zone) lookup(labels []string) found {
	n := len(labels)
	switch {
	case z.blank() && !z.certain(labels):
		return found{verdict: unknown}
	case n == 0:
		return found{verdict: exists}
	case labels[n-1] != "svc" && labels[n-1] != "pod", n > 5:
		return found{verdict: absent}
	case n == 1:
		return found{verdict: exists}
	}
	namespace := labels[n-2]
	f := z.inside(namespace, labels)
	if f.verdict == absent && !z.holds(namespace) {
		f.verdict = unknown
	}
	return f
}

// certain are names that are answered even by a zone that holds nothing whole:
// those of Services that were put in it.
func (z *Zone) certain(labels []string) bool {
	n := len(labels)
	return n > 2 && labels[n-1] == "svc" && z.services[key{labels[n-2], labels[n-3]}] != nil
}

func (z *Zone) inside(namespace string, labels []string) found {
	n := len(labels)
	switch {
	case !z.exists(namespace):
		return found{verdict: absent}
	case n == 2:
		return found{verdict: exists}
	case labels[n-1] == "pod":
		return pod(labels)
	}
	svc := z.services[key{namespace, labels[n-3]}]
	if svc == nil {
		return found{verdict: absent}
	}
	hits := svc.hits(labels[:n-3])
	if len(hits) == 0 {
		return found{verdict: absent}
	}
	return found{exists, hits, labels[n-3:]}
}

// pod reads an address out of a name, as "pods insecure" does: that the
// namespace exists is all that is asked for.
func pod(labels []string) found {
	name := labels[len(labels)-3]
	ip := strings.ReplaceAll(name, "-", ":")
	if strings.Count(name, "-") == 3 && !strings.Contains(name, "--") {
		ip = strings.ReplaceAll(name, "-", ".")
	}
	addr, err := netip.ParseAddr(ip)
	if err != nil || addr.Zone() != "" {
		return found{verdict: absent}
	}
	return found{exists, []hit{{addr: addr.Unmap()}}, labels[len(labels)-3:]}
}

// hits are what a Service has for the labels before its own.
func (s *service) hits(before []string) []hit {
	switch {
	case s.ExternalName != "":
		return s.external(before)
	case s.Headless || len(before) == 1:
		return s.published(before)
	}
	port, protocol := asked(before)
	hits := make([]hit, 0, len(s.ClusterIPs)*max(1, len(s.Ports)))
	for _, p := range ports(s.Ports) {
		if !matches(p, port, protocol) {
			continue
		}
		for _, a := range s.ClusterIPs {
			hits = append(hits, hit{addr: a, port: number(p)})
		}
	}
	return hits
}

// external is the alias, unless the target is an address, for which there is
// no record.
func (s *service) external(before []string) []hit {
	if _, err := netip.ParseAddr(s.ExternalName); err == nil || len(before) > 0 {
		return nil
	}
	return []hit{{alias: s.ExternalName, port: -1}}
}

func (s *service) published(before []string) []hit {
	port, protocol := asked(before)
	hits := make([]hit, 0, len(s.Endpoints))
	for i := range s.Endpoints {
		if len(before) == 1 && before[0] != s.labels[i] {
			continue
		}
		for _, p := range ports(s.Endpoints[i].Ports) {
			if matches(p, port, protocol) {
				hits = append(hits, hit{addr: s.Endpoints[i].Addr, port: number(p), label: s.labels[i]})
			}
		}
	}
	return hits
}

// asked takes port and protocol from two labels; "" stands for any.
func asked(before []string) (port, protocol string) {
	if len(before) != 2 {
		return "", ""
	}
	return strings.TrimPrefix(before[0], "_"), strings.TrimPrefix(before[1], "_")
}

// ports stands in where no port is declared: there is an address, but no SRV.
func ports(declared []catalog.Port) []catalog.Port {
	if len(declared) == 0 {
		return []catalog.Port{{}}
	}
	return declared
}

func matches(p catalog.Port, name, protocol string) bool {
	return (name == "" || strings.EqualFold(name, p.Name)) && (protocol == "" || strings.EqualFold(protocol, p.Protocol))
}

func number(p catalog.Port) int {
	if p.Port == 0 {
		return -1
	}
	return int(p.Port)
}
