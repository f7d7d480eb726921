package session

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// A ConflictError says that routes that are wanted are taken on this machine.
type ConflictError struct {
	Conflicts []tun.Conflict
	Sources   []string // of the wanted prefixes, in words
}

func (e *ConflictError) Error() string {
	var lines []string
	for i, c := range e.Conflicts {
		lines = append(lines, fmt.Sprintf("%v (%s) overlaps this machine's route %v", c.Wanted, e.Sources[i], c.Existing))
	}
	return strings.Join(lines, "; ")
}

// routePlan is which routes are wanted, and why.
type routePlan struct {
	include, exclude []netip.Prefix
	pinned           []netip.Addr
	noIPv6           bool // this machine has none
}

const includeSource = "--include"

// routes are those that lead to the cluster, with the source of each.
func (p routePlan) routes(found []kube.Route) []RouteStatus {
	var wanted []netip.Prefix
	for _, r := range found {
		wanted = append(wanted, r.Prefix)
	}
	wanted = append(wanted, p.include...)
	var routes []RouteStatus
	for _, r := range tun.Plan(wanted, p.exclude, p.pinned) {
		if p.noIPv6 && r.Addr().Is6() {
			continue
		}
		routes = append(routes, RouteStatus{Prefix: r, Source: p.source(r, found)})
	}
	return routes
}

func (p routePlan) source(route netip.Prefix, found []kube.Route) string {
	var sources []string
	add := func(s string) {
		if !slices.Contains(sources, s) {
			sources = append(sources, s)
		}
	}
	for _, r := range found {
		if r.Prefix.Overlaps(route) {
			add(r.Source)
		}
	}
	for _, i := range p.include {
		if i.Overlaps(route) {
			add(includeSource)
		}
	}
	return strings.Join(sources, ", ")
}

// conflicts is an error that names every route of the machine that is in the
// way, nil where there is none.
func conflicts(routes []RouteStatus, existing []tun.Route) error {
	var e ConflictError
	for _, r := range routes {
		for _, c := range tun.Conflicts([]netip.Prefix{r.Prefix}, existing) {
			e.Conflicts = append(e.Conflicts, c)
			e.Sources = append(e.Sources, r.Source)
		}
	}
	if len(e.Conflicts) == 0 {
		return nil
	}
	return &e
}

func prefixes(routes []RouteStatus) []netip.Prefix {
	var ps []netip.Prefix
	for _, r := range routes {
		ps = append(ps, r.Prefix)
	}
	return ps
}

func has6(ps []netip.Prefix) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// naming is how the OS is told of the cluster's names.
type naming struct {
	device     string
	index      int
	server     netip.Addr
	namespace  string
	domain     string
	suffix     string // --as
	probe      string
	namespaces []string
	prefixes   []netip.Prefix
}

// settings are what pods of the namespace have in their resolv.conf, and the
// zones whose names only the cluster knows. A namespace is a zone of its own,
// so that "web.shop" is asked of us where the OS routes questions by name.
//
// A resolver takes only so many zones: what matters most comes first.
func (n naming) settings() resolver.Settings {
	zones := []string{n.domain, "svc", n.namespace}
	if n.probe != "" {
		zones = append(zones, n.probe)
	}
	if n.suffix != "" {
		zones = append(zones, n.suffix)
	}
	for _, p := range n.prefixes {
		zones = append(zones, reverseZones(p)...)
	}
	for _, namespace := range slices.Sorted(slices.Values(n.namespaces)) {
		if namespace != n.namespace {
			zones = append(zones, namespace)
		}
	}
	return resolver.Settings{
		Link: n.device, LinkIndex: n.index, Server: n.server,
		Search: n.search(), Zones: zones[:min(len(zones), maxZones)],
	}
}

// maxZones is what systemd-resolved takes for a link, less what is searched.
const maxZones = 256 - 3

func (n naming) search() []string {
	return []string{n.namespace + ".svc." + n.domain, "svc." + n.domain, n.domain}
}

// reverseZones are the zones of in-addr.arpa and ip6.arpa that hold p. Where p
// does not end at a label the zones may hold more than p: the server passes on
// what is not the cluster's.
func reverseZones(p netip.Prefix) []string {
	const most = 16 // zones for one prefix, before a wider one is taken
	step, suffix := 8, "in-addr.arpa"
	if p.Addr().Is6() {
		step, suffix = 4, "ip6.arpa"
	}
	bits := (p.Bits() + step - 1) / step * step
	if 1<<(bits-p.Bits()) > most {
		bits -= step
	}
	var zones []string
	z, err := p.Masked().Addr().Prefix(bits)
	for err == nil && (p.Overlaps(z)) && bits > 0 {
		zones = append(zones, reverseLabels(z, step)+suffix)
		next := following(z)
		if !next.IsValid() {
			break
		}
		z, err = next.Prefix(bits)
	}
	return zones
}

// following is the first address after p, invalid where there is none.
func following(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits() - 1; i >= 0; i-- {
		bit := byte(1) << (7 - i%8)
		b[i/8] ^= bit
		if b[i/8]&bit != 0 {
			a, _ := netip.AddrFromSlice(b)
			return a
		}
	}
	return netip.Addr{}
}

func reverseLabels(p netip.Prefix, step int) string {
	var out string
	for i := 0; i < p.Bits(); i += step {
		b := p.Addr().AsSlice()[i/8]
		label := strconv.Itoa(int(b))
		if step == 4 {
			label = strconv.FormatUint(uint64(b>>(4-i%8)&0xf), 16)
		}
		out = label + "." + out
	}
	return out
}
