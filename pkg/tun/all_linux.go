package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// loopback is what programs take for the machine that they are on.
var loopback = &net.IPNet{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}

// TakeAll leads to the device whatever the programs of this network namespace send, be
// it to 127.0.0.0/8, and lets the answers in. It is for a namespace that is the device's
// alone, and after Configure.
//
// ::1 stays where it is: the kernel takes no such address from a device (RFC 4291,
// section 2.5.3).
func (l Link) TakeAll() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find link lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	all := []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}
	if HasIPv6() {
		all = append(all, netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	}
	if err := l.SetRoutes(all); err != nil {
		return err
	}
	return l.takeLoopback()
}

// takeLoopback has a rule before that of local addresses, which is moved behind it. Only
// what programs send "comes from lo" there (fib rules see it so); what the device brings
// finds 127.0.0.1 in the table of local addresses, as ever.
func (l Link) takeLoopback() error {
	if err := l.admitLoopback(); err != nil {
		return err
	}
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", l.Name, err)
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index, Dst: loopback, Src: net.IPv4(127, 0, 0, 1), Table: routeProtocol,
		Protocol: routeProtocol, Scope: netlink.SCOPE_LINK,
	}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add route %v to %s: %w", loopback, l.Name, err)
	}
	ours, local, first := netlink.NewRule(), netlink.NewRule(), netlink.NewRule()
	ours.Priority, ours.IifName, ours.Dst, ours.Table = 1, "lo", loopback, routeProtocol
	local.Priority, local.Table = 2, unix.RT_TABLE_LOCAL
	first.Priority, first.Table = 0, unix.RT_TABLE_LOCAL
	for _, r := range []*netlink.Rule{ours, local, first} {
		r.Family = netlink.FAMILY_V4
	}
	err = errors.Join(netlink.RuleAdd(ours), netlink.RuleAdd(local), netlink.RuleDel(first))
	if err != nil {
		return fmt.Errorf("set the rules of 127.0.0.0/8: %w", err)
	}
	return nil
}

// admitLoopback lets the device bring packets from and to 127.0.0.1 (ip-sysctl).
func (l Link) admitLoopback() error {
	for _, s := range []struct{ link, name, value string }{
		{"all", "rp_filter", "0"}, {l.Name, "rp_filter", "0"}, // the higher of the two counts
		{l.Name, "route_localnet", "1"}, {l.Name, "accept_local", "1"},
	} {
		path := filepath.Join("/proc/sys/net/ipv4/conf", s.link, s.name)
		if err := os.WriteFile(path, []byte(s.value), 0); err != nil {
			return fmt.Errorf("set %s of %s to %s: %w", s.name, s.link, s.value, err)
		}
	}
	return nil
}
