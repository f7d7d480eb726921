package dns

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/miekg/dns"
)

// A Zone holds the names of a cluster. It is a catalog.Sink: what is put in it
// is answered from then on.
type Zone struct {
	domain string // "cluster.local.", lower case
	ttl    uint32
	server netip.Addr // the cluster's DNS, which the NS record names

	mu         sync.RWMutex
	services   map[key]*service
	counts     map[string]int // Services in each namespace
	virtual    map[netip.Addr]key
	endpoints  map[netip.Addr][]key
	namespaces map[string]bool
	whole      map[string]bool // namespaces held whole, where not all are
	all        bool
	prefixes   []netip.Prefix
	serial     uint32
}

var _ catalog.Sink = (*Zone)(nil)

type key struct{ namespace, name string }

// A service is a catalog.Service with the label of each endpoint beside it.
type service struct {
	catalog.Service
	labels []string
}

const defaultTTL = 5

func newZone(cfg Config) *Zone {
	domain := lower(cfg.ClusterDomain)
	if domain == "" {
		domain = "cluster.local"
	}
	ttl := uint32(cfg.TTL / time.Second)
	if ttl == 0 {
		ttl = defaultTTL
	}
	return &Zone{
		domain:     fqdn(domain),
		ttl:        ttl,
		server:     cfg.ClusterDNS.Addr().Unmap(),
		services:   map[key]*service{},
		counts:     map[string]int{},
		virtual:    map[netip.Addr]key{},
		endpoints:  map[netip.Addr][]key{},
		namespaces: map[string]bool{},
		whole:      map[string]bool{},
		serial:     uint32(time.Now().Unix()),
	}
}

// PutService adds or replaces a Service.
func (z *Zone) PutService(s catalog.Service) {
	k, svc := key{s.Namespace, s.Name}, newService(s)
	z.mu.Lock()
	defer z.mu.Unlock()
	z.drop(k)
	z.services[k] = svc
	z.counts[k.namespace]++
	for _, a := range s.ClusterIPs {
		z.virtual[a] = k
	}
	for i := range svc.Endpoints {
		a := svc.Endpoints[i].Addr
		if !slices.Contains(z.endpoints[a], k) {
			z.endpoints[a] = append(z.endpoints[a], k)
		}
	}
	z.touch()
}

// DropService forgets a Service.
func (z *Zone) DropService(namespace, name string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.drop(key{namespace, name})
	z.touch()
}

// SetNamespaces gives the names of all namespaces, as far as they are known.
func (z *Zone) SetNamespaces(names []string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.namespaces = set(names)
	z.touch()
}

// SetScope tells what is held whole: what is not found there does not exist.
func (z *Zone) SetScope(s catalog.Scope) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.all, z.whole = s.All, set(s.Namespaces)
	z.touch()
}

// SetPrefixes gives the addresses of Services and pods. Reverse names inside
// them are the cluster's even where nothing has the address.
func (z *Zone) SetPrefixes(prefixes []netip.Prefix) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.prefixes = slices.Clone(prefixes)
}

func (z *Zone) drop(k key) {
	old := z.services[k]
	if old == nil {
		return
	}
	delete(z.services, k)
	if z.counts[k.namespace]--; z.counts[k.namespace] == 0 {
		delete(z.counts, k.namespace)
	}
	for _, a := range old.ClusterIPs {
		if z.virtual[a] == k {
			delete(z.virtual, a)
		}
	}
	for i := range old.Endpoints {
		z.unlink(old.Endpoints[i].Addr, k)
	}
}

func (z *Zone) unlink(a netip.Addr, k key) {
	left := slices.DeleteFunc(z.endpoints[a], func(other key) bool { return other == k })
	if len(left) == 0 {
		delete(z.endpoints, a)
		return
	}
	z.endpoints[a] = left
}

// touch moves the serial of the zone, as CoreDNS does, to the time of change.
func (z *Zone) touch() { z.serial = max(z.serial+1, uint32(time.Now().Unix())) }

func (z *Zone) size() int {
	z.mu.RLock()
	defer z.mu.RUnlock()
	return len(z.services)
}

// routed tells whether an address is one of Services or pods.
func (z *Zone) routed(a netip.Addr) bool {
	z.mu.RLock()
	defer z.mu.RUnlock()
	return z.covers(a)
}

// Virtual tells whether an address is a Service's own.
func (z *Zone) Virtual(a netip.Addr) bool {
	z.mu.RLock()
	defer z.mu.RUnlock()
	_, is := z.virtual[a.Unmap()]
	return is
}

// Addresses are those in prefixes that Services and their endpoints have, in order.
func (z *Zone) Addresses(in []netip.Prefix) []netip.Addr {
	z.mu.RLock()
	defer z.mu.RUnlock()
	var all []netip.Addr
	keep := func(a netip.Addr) {
		if slices.ContainsFunc(in, func(p netip.Prefix) bool { return p.Contains(a) }) {
			all = append(all, a)
		}
	}
	for a := range z.virtual {
		keep(a)
	}
	for a := range z.endpoints {
		keep(a)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

func (z *Zone) covers(a netip.Addr) bool {
	return slices.ContainsFunc(z.prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// exists tells whether a namespace does. A Service proves it, even where the
// list of namespaces is behind or may not be read.
func (z *Zone) exists(namespace string) bool {
	return z.namespaces[namespace] || z.counts[namespace] > 0 || z.whole[namespace]
}

// holds tells whether what is not found in a namespace does not exist.
func (z *Zone) holds(namespace string) bool { return z.all || z.whole[namespace] }

// blank is a zone that holds nothing whole, as before the first list.
func (z *Zone) blank() bool { return !z.all && len(z.whole) == 0 }

// newService has the label ready that each endpoint has below the Service.
func newService(s catalog.Service) *service {
	svc := &service{Service: s, labels: make([]string, len(s.Endpoints))}
	for i, e := range s.Endpoints {
		svc.labels[i] = lower(e.Hostname)
		if e.Hostname == "" {
			svc.labels[i] = dashed(e.Addr)
		}
	}
	return svc
}

// dashed is the label of an endpoint without a hostname. A label may not end in
// a dash, so fd00:: gets a zero.
func dashed(a netip.Addr) string {
	if a.Is4() {
		return strings.ReplaceAll(a.String(), ".", "-")
	}
	label := strings.ReplaceAll(a.String(), ":", "-")
	if strings.HasSuffix(label, "-") {
		label += "0"
	}
	return label
}

func set(names []string) map[string]bool {
	m := make(map[string]bool, len(names))
	for _, n := range names {
		m[n] = true
	}
	return m
}

func lower(s string) string { return strings.ToLower(s) }

func fqdn(s string) string { return dns.Fqdn(s) }
