package session

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// An around is the ways past addresses that this machine's network has, too. What was
// mapped once stays so: programs remember.
type around struct {
	how     tun.Avoid
	partial bool // not all addresses in use are seen, but those of some namespaces

	mu       sync.Mutex
	mappings []mapping
	exact    []netip.Prefix
	pinned   []netip.Prefix // what the tunnel itself needs
}

type mapping struct {
	tun.Mapping
	source string
}

// routes are those that lead there, with the addresses in use of what is routed exactly.
// say is told of each that is not reached as it is; once it is up, also of what is left
// out because there is no way.
func (a *around) routes(wanted []RouteStatus, existing []tun.Route, up bool, inUse func([]netip.Prefix) []netip.Addr, say func(string)) ([]RouteStatus, error) {
	own, err := ownNetworks()
	if err != nil {
		return nil, err
	}
	for _, r := range existing {
		if strings.HasPrefix(r.Device, "culvert") { // another cluster's, exactly
			own = append(own, r.Dst)
		}
	}
	var all, exact []RouteStatus
	for _, r := range wanted {
		whole, some, err := a.one(r, wanted, existing, own, say)
		if err != nil && !up {
			return nil, err
		}
		if err != nil {
			say("left out: " + err.Error())
		}
		all, exact = append(all, whole...), append(exact, some...)
	}
	used, err := a.used(exact, inUse, slices.Concat(prefixes(wanted), own), say)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.mappings {
		all = append(all, RouteStatus{Prefix: m.As, Source: m.source, Real: m.Real})
	}
	return append(all, used...), nil
}

// used are the routes to what is routed exactly, if there are not too many for that.
func (a *around) used(exact []RouteStatus, inUse func([]netip.Prefix) []netip.Addr, taken []netip.Prefix, say func(string)) (all []RouteStatus, err error) {
	if len(exact) > 0 {
		for _, p := range tun.Merge(single(inUse(prefixes(exact)))) {
			all = append(all, RouteStatus{Prefix: p, Source: inUseSource})
		}
	}
	if len(all) > mostExact {
		for _, r := range exact {
			as, err := a.mapTo(r.Prefix, r.Source, taken)
			if err != nil {
				return nil, fmt.Errorf("%v has too many addresses in use to lead to each of them: %w", r.Prefix, err)
			}
			say(fmt.Sprintf("%v (%s) has too many addresses in use to lead to each of them: it's reached as %v, and names lead there", r.Prefix, r.Source, as))
		}
		all, exact = nil, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.exact = prefixes(exact)
	return all, nil
}

// inUseSource is that of a route to no more than is in use.
const inUseSource = "in use"

// around tells of a route that is there because this machine's network has the range, too.
func (r RouteStatus) around() bool { return r.Real.IsValid() || r.Source == inUseSource }

// mostExact leaves room for all other routes.
const mostExact = privileged.MaxRoutes * 3 / 4

// one is the ways to one range: what is routed as it is, and what exactly.
func (a *around) one(r RouteStatus, wanted []RouteStatus, existing []tun.Route, own []netip.Prefix, say func(string)) (whole, exact []RouteStatus, err error) {
	if a.how == tun.Refuse {
		if err := conflicts([]RouteStatus{r}, existing); err != nil {
			return nil, nil, err
		}
	}
	how := a.how
	if how == tun.Either && a.partial {
		how = tun.Map
	}
	found := tun.Conflicts([]netip.Prefix{r.Prefix}, existing)
	w := tun.Around(r.Prefix, found, own, how)
	for _, p := range a.unmapped(w.Mapped) {
		as, err := a.mapTo(p, r.Source, slices.Concat(prefixes(wanted), own))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", conflicts([]RouteStatus{r}, existing), err)
		}
		say(fmt.Sprintf("%v (%s) is this machine's %v, too: it's reached as %v, and names lead there", p, r.Source, found[0].Existing, as))
	}
	for _, p := range a.unmapped(w.Whole) {
		whole = append(whole, RouteStatus{Prefix: p, Source: r.Source})
	}
	for _, p := range a.unmapped(w.Exact) {
		exact = append(exact, RouteStatus{Prefix: p, Source: r.Source})
		seen := ""
		if a.partial {
			seen = ", in the namespaces that you may read"
		}
		say(fmt.Sprintf("%v (%s) is this machine's %v, too: of it only addresses are reached that Services and their pods have%s", p, r.Source, found[0].Existing, seen))
	}
	return whole, exact, nil
}

// ranges are all that routes lead to, with ranges where they lead there exactly.
func (a *around) ranges(routes []RouteStatus) []netip.Prefix {
	a.mu.Lock()
	defer a.mu.Unlock()
	alone := func(p netip.Prefix) bool { return tun.Contains(a.exact, p.Addr()) }
	return append(slices.DeleteFunc(prefixes(routes), alone), a.exact...)
}

// unmapped are the addresses that are not mapped: what was stays so.
func (a *around) unmapped(all []netip.Prefix) []netip.Prefix {
	a.mu.Lock()
	defer a.mu.Unlock()
	var mapped []netip.Prefix
	for _, m := range a.mappings {
		mapped = append(mapped, m.Real)
	}
	return tun.Subtract(all, mapped)
}

// mapTo gives a prefix another one, that nobody has on this machine.
func (a *around) mapTo(real netip.Prefix, source string, taken []netip.Prefix) (as netip.Prefix, err error) {
	existing, err := tun.Existing()
	if err != nil {
		return as, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range existing {
		taken = append(taken, r.Dst)
	}
	for _, m := range a.mappings {
		taken = append(taken, m.As)
	}
	if as, err = tun.FreePrefix(real, append(taken, a.pinned...)); err == nil {
		a.mappings = append(a.mappings, mapping{tun.Mapping{Real: real, As: as}, source})
	}
	return as, err
}

// pin keeps addresses from being given to others.
func (a *around) pin(all []netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pinned = single(all)
}

func single(all []netip.Addr) (ps []netip.Prefix) {
	for _, a := range all {
		ps = append(ps, netip.PrefixFrom(a, a.BitLen()))
	}
	return ps
}

// shown and real are as dns.Config has them.
func (a *around) shown(addr netip.Addr) netip.Addr { return a.translate(addr, tun.Mapping.Shown) }
func (a *around) real(addr netip.Addr) netip.Addr  { return a.translate(addr, tun.Mapping.Meant) }

func (a *around) translate(addr netip.Addr, by func(tun.Mapping, netip.Addr) (netip.Addr, bool)) netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.mappings {
		if to, ok := by(m.Mapping, addr); ok {
			return to
		}
	}
	return addr
}

func (a *around) exactly() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.exact) > 0
}

// ownNetworks are those that this machine has addresses in.
func ownNetworks() ([]netip.Prefix, error) {
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var all []netip.Prefix
	for _, a := range own {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		all = append(all, p.Masked())
	}
	return all, nil
}

// A reached is the cluster's network as it is reached from this machine: under other
// addresses, some of it, and at once refused where no Service has the address. To either
// packets do not go as they are.
type reached struct {
	*channel.Keep
	around *around
	vacant func(netip.Addr) bool
}

func (r reached) Packets(to netip.Addr) channel.Packets {
	packets := r.Keep.Packets(to)
	if packets == nil || !r.asIs(to) {
		return nil
	}
	return packets
}

func (r reached) asIs(to netip.Addr) bool { return r.around.real(to) == to && !r.vacant(to) }

func (r reached) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	host := to.Addr()
	if err != nil { // to be pinged
		if host, err = netip.ParseAddr(address); err != nil {
			return r.Keep.DialContext(ctx, network, address)
		}
	}
	if r.vacant(r.around.real(host)) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	}
	if real := r.around.real(host); real != host {
		address = real.String()
		if to.IsValid() {
			address = netip.AddrPortFrom(real, to.Port()).String()
		}
	}
	return r.Keep.DialContext(ctx, network, address)
}

// vacant tells of addresses for Services that none has: packets to them would be lost, or
// lead out of the cluster, and nobody would say so.
func (t *tunnel) vacant(a netip.Addr) bool {
	t.mu.Lock()
	service := slices.ContainsFunc(t.found, func(r kube.Route) bool { return r.Kind == kube.ServiceRange && r.Prefix.Contains(a) })
	whole := t.seen.scope.All
	var names *dns.Server
	if service && whole {
		names = t.names
	}
	t.mu.Unlock()
	return names != nil && !names.Zone().Virtual(a)
}
