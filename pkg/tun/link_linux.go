package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks the routes as ours (ip route show proto 73). Nobody else
// has it in iproute2's rt_protos.
const routeProtocol = 73

// A Link is a device as the rest of the machine sees it, known by its name.
// Every method states all that is wanted, and may be called again.
type Link struct{ Name string }

// Configure gives the device its MTU and exactly these addresses, each of them
// alone (/32, /128), and sets it up. An IPv6 address is left out where the
// kernel has IPv6 disabled: see HasIPv6.
func (l Link) Configure(mtu int, addrs ...netip.Addr) error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", l.Name, err)
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set mtu of %s to %d: %w", l.Name, mtu, err)
	}
	if !HasIPv6() {
		addrs = slices.DeleteFunc(slices.Clone(addrs), netip.Addr.Is6)
	}
	if err := setAddrs(link, addrs); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", l.Name, err)
	}
	return awaitLocal(addrs)
}

// awaitLocal waits until the kernel takes packets to the addresses. For IPv6 it
// makes the local route in a work queue of its own, even of an address without
// DAD; what arrives earlier is lost, and nothing tells when it's done but to ask.
func awaitLocal(addrs []netip.Addr) error {
	const patience, pause = 2 * time.Second, time.Millisecond
	end := time.Now().Add(patience)
	for _, a := range addrs {
		for {
			routes, err := netlink.RouteGet(a.AsSlice())
			if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(end) {
				return fmt.Errorf("address %v is not in use %v after it was set: %w", a, patience, os.ErrDeadlineExceeded)
			}
			time.Sleep(pause)
		}
	}
	return nil
}

func setAddrs(link netlink.Link, addrs []netip.Addr) error {
	old, err := ownAddrs(link)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if slices.Contains(old, a) {
			continue
		}
		// IFA_F_NODAD: nobody is there to have the address already, and an
		// address that is tentative can't be a source yet.
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %v to %s: %w", a, link.Attrs().Name, err)
		}
	}
	for _, a := range old {
		if slices.Contains(addrs, a) {
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if err := netlink.AddrDel(link, addr); err != nil {
			return fmt.Errorf("remove address %v from %s: %w", a, link.Attrs().Name, err)
		}
	}
	return nil
}

// ownAddrs returns the link's addresses but for those that the kernel gave it
// for the link's own use.
func ownAddrs(link netlink.Link) ([]netip.Addr, error) {
	list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	var addrs []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.IsLinkLocalUnicast() {
			addrs = append(addrs, ip.Unmap())
		}
	}
	return addrs, nil
}

// SetRoutes makes these the routes to the device: it adds what is missing, then
// removes what is no longer wanted. It touches no route of another device or of
// another maker, and fails where one of another maker is in the way.
func (l Link) SetRoutes(all []netip.Prefix) error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", l.Name, err)
	}
	addrs, err := ownAddrs(link)
	if err != nil {
		return err
	}
	have, taken, err := l.routes(link)
	if err != nil {
		return err
	}
	want := make(map[netip.Prefix]bool, len(all))
	for _, p := range Merge(all) {
		want[p] = true
		if taken[p] {
			return fmt.Errorf("add route %v to %s: %w", p, l.Name, unix.EEXIST)
		}
		r := l.route(link, p, addrs)
		old, ok := have[p]
		if ok && old.Src.Equal(r.Src) {
			continue
		}
		if ok { // the address changed, and with it the source
			err = netlink.RouteReplace(r)
		} else {
			err = netlink.RouteAdd(r)
		}
		if err != nil {
			return fmt.Errorf("add route %v to %s: %w", p, l.Name, err)
		}
	}
	for p, r := range have {
		if want[p] {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %v from %s: %w", p, l.Name, err)
		}
	}
	return nil
}

// route is the route to p. The source is told outright, so that what is bound
// to no address has the device's and no other. Two sessions of one cluster have
// the same routes; those of the device that came first lead, until it is gone.
func (l Link) route(link netlink.Link, p netip.Prefix, addrs []netip.Addr) *netlink.Route {
	r := &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Dst:       ipNet(p),
		Protocol:  routeProtocol,
		Scope:     netlink.SCOPE_LINK,
		Table:     unix.RT_TABLE_MAIN,
		Priority:  link.Attrs().Index,
	}
	for _, a := range addrs {
		if a.BitLen() == p.Addr().BitLen() {
			r.Src = a.AsSlice()
		}
	}
	return r
}

// routes returns the routes to the link that are ours, and where other makers'
// routes lead.
func (l Link) routes(link netlink.Link) (have map[netip.Prefix]netlink.Route, taken map[netip.Prefix]bool, err error) {
	list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, nil, fmt.Errorf("list routes: %w", err)
	}
	have, taken = map[netip.Prefix]netlink.Route{}, map[netip.Prefix]bool{}
	for _, r := range list {
		switch {
		case r.Protocol != routeProtocol:
			taken[prefix(r)] = true
		case r.LinkIndex == link.Attrs().Index:
			have[prefix(r)] = r
		}
	}
	return have, taken, nil
}

// Existing returns the machine's routes, of every table that rules ask but the one of its
// own addresses, and without those to the excepted devices.
func Existing(except ...string) ([]Route, error) {
	list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL,
		&netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	names, err := linkNames()
	if err != nil {
		return nil, err
	}
	before, err := tables()
	if err != nil {
		return nil, err
	}
	var routes []Route
	for _, r := range list {
		first, asked := before[table{r.Family, r.Table}]
		if !asked || r.Flags&unix.RTM_F_CLONED != 0 || !leads(r) {
			continue
		}
		for _, hop := range hops(r) {
			have := Route{Dst: prefix(r), Device: names[hop.LinkIndex], Gateway: gateway(hop)}
			if first {
				have.Table = r.Table
			}
			if have.Device == "" || !slices.Contains(except, have.Device) {
				routes = append(routes, have)
			}
		}
	}
	return routes, nil
}

// A table is one of a family, by number.
type table struct{ family, number int }

// tables are those that rules ask, but for that of the machine's own addresses, and
// whether that is before the main one: those of VPNs often are. The tables of VRFs are for
// who is bound to one.
func tables() (before map[table]bool, err error) {
	before = map[table]bool{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil && family == netlink.FAMILY_V4 {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		slices.SortStableFunc(rules, func(a, b netlink.Rule) int { return a.Priority - b.Priority })
		main := false
		for _, r := range rules {
			t := table{family, r.Table}
			if _, known := before[t]; !known && r.Table != unix.RT_TABLE_UNSPEC && r.Table != unix.RT_TABLE_LOCAL {
				before[t] = !main && r.Table != unix.RT_TABLE_MAIN
			}
			main = main || r.Table == unix.RT_TABLE_MAIN && r.Src == nil && r.Dst == nil && r.Mark == 0 && r.IifName == "" && r.OifName == "" && r.UIDRange == nil
		}
	}
	return before, nil
}

// leads tells whether a route decides about other machines' addresses, be it to
// refuse them. One that throws leaves it to the next table.
func leads(r netlink.Route) bool {
	switch r.Type {
	case unix.RTN_UNICAST, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT:
		return true
	case unix.RTN_THROW:
		return r.Table == unix.RT_TABLE_MAIN
	}
	return false
}

// Astray are routes to a device that packets do not take, each with the one that they
// take: a rule has another table before that of ours.
func Astray(device string, all []netip.Prefix) (found []Conflict, err error) {
	names, err := linkNames()
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		a := p.Addr()
		if !p.IsSingleIP() { // the first one has a meaning on a link
			a = a.Next()
		}
		taken, err := netlink.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
		switch {
		case err != nil: // refused, which is a route as well
			found = append(found, Conflict{p, Route{Dst: p}})
		case len(taken) > 0:
			hop := hops(taken[0])[0]
			if to := names[hop.LinkIndex]; to != device {
				found = append(found, Conflict{p, Route{Dst: prefix(taken[0]), Device: to, Gateway: gateway(hop), Table: taken[0].Table}})
			}
		}
	}
	return found, nil
}

func linkNames() (map[int]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

// hops returns where a route leads to, once for each of several ways.
func hops(r netlink.Route) []*netlink.NexthopInfo {
	if len(r.MultiPath) > 0 {
		return r.MultiPath
	}
	return []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
}

func gateway(hop *netlink.NexthopInfo) netip.Addr {
	ip := hop.Gw
	if via, ok := hop.Via.(*netlink.Via); ok && ip == nil {
		ip = via.Addr
	}
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// prefix returns where a route leads, a default route as /0.
func prefix(r netlink.Route) netip.Prefix {
	if r.Dst == nil {
		if r.Family == netlink.FAMILY_V6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(r.Dst.IP)
	ones, bits := r.Dst.Mask.Size()
	if bits == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, ones)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// HasIPv6 tells whether a new device has IPv6 on this machine.
func HasIPv6() bool {
	for _, which := range []string{"all", "default"} {
		off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + which + "/disable_ipv6")
		if err != nil || strings.TrimSpace(string(off)) != "0" {
			return false
		}
	}
	return true
}
