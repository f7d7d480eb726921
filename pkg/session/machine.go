package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// A machine is what a session changes of this one: a device, routes to it, and where
// names are asked for. All of that is done by root's child.
type machine struct {
	of      *course
	stderr  io.Writer // for what the child says
	unnamed bool      // no names are answered

	child  *privileged.Child
	device *privileged.Device
	stack  *netstack.Stack
	server netip.Addr // where names are answered: the device's, or one that only leads to it
	spare  netip.Addr // the latter

	packets *net.UDPConn // port 53 of the device's; nil: not to be had
	streams net.Listener

	asking sync.Mutex
	apart  *dns.Server   // is asked at spare. Guarded by asking
	mode   resolver.Mode // how the OS was told of names; none before that. Guarded by asking
	passed bool          // and does not ask us any more. Guarded by asking
}

// deviceMTU is that of a device which is only ever between the kernel and this
// process: nothing is fragmented there, and large packets are cheap.
const deviceMTU = 65535

func (m *machine) startChild(ctx context.Context) (string, error) {
	if plan := resolver.New(resolver.Config{Log: m.of.log}).Preview(ctx); plan.Mode == resolver.ModeNone && !m.unnamed {
		return "", fmt.Errorf("names cannot be asked through this machine's resolver: %s", plan.Why)
	}
	m.of.reporter.Asks()
	child, err := privileged.Start(ctx, privileged.Config{Stderr: m.stderr})
	if err != nil {
		return "", err
	}
	m.child = child
	m.of.undo.add("end the privileged child", func(context.Context) error { return child.Close() })
	m.of.background("privileged child", func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-child.Done():
			return errors.New("it was killed, and with it went routes and resolver settings")
		}
	})
	return "privileged child ready", nil
}

// openTUN makes the device, of which every flow is dialled on network. routes are what
// will lead there, routed tells of what does.
func (m *machine) openTUN(ctx context.Context, routes []netip.Prefix, network channel.Network, routed func(netip.Addr) bool) error {
	addrs, err := freeAddrs(routes)
	if err != nil {
		return err
	}
	device, err := m.child.OpenTUN(ctx, privileged.TUN{MTU: deviceMTU, Addrs: addrs})
	if err != nil {
		return err
	}
	m.device, m.server = device, addrs[0]
	m.of.undo.add("restore this machine", func(context.Context) error {
		return errors.Join(m.child.Close(), device.Close())
	})
	if !m.unnamed {
		err = m.listenDNS(ctx, routes)
	}
	if err != nil {
		return err
	}
	m.stack, err = netstack.New(netstack.Config{Device: device, MTU: deviceMTU, Network: besides{network, m}, Behind: routed, Log: m.of.log})
	if err != nil {
		return err
	}
	m.of.background("network stack", m.stack.Run)
	return nil
}

// leadHere sets the routes, and says where packets go another way all the same.
func (m *machine) leadHere(ctx context.Context, all []netip.Prefix) error {
	if m.server == m.spare {
		all = append(slices.Clone(all), single([]netip.Addr{m.spare})...)
	}
	if err := m.child.SetRoutes(ctx, all); err != nil {
		return err
	}
	astray, err := tun.Astray(m.device.Name(), all)
	if err != nil { // links come and go, and this is only to tell
		m.of.log.Info("rules not looked at", "error", err)
		return nil
	}
	told := map[string]bool{}
	for _, c := range astray {
		// Another session's to the same cluster leads there as well.
		if to := c.Existing.String(); !strings.HasPrefix(c.Existing.Device, "culvert") && !told[to] {
			told[to] = true
			m.of.warn(fmt.Sprintf("%v is not reached: a rule of this machine (ip rule) has packets go by %s before they come to the route to %s", c.Wanted, to, m.device.Name()))
		}
	}
	return nil
}

var errNoAddress = errors.New("no address is free for the device: every range that could be used is routed elsewhere")

// freeAddrs are addresses for the device: always one of IPv4, for the DNS
// server, and one of IPv6 where that is routed.
func freeAddrs(routes []netip.Prefix) ([]netip.Addr, error) {
	inUse, err := usedPrefixes()
	if err != nil {
		return nil, err
	}
	v4, v6 := tun.FreeAddrs(slices.Concat(routes, inUse))
	if !v4.IsValid() {
		return nil, errNoAddress
	}
	if v6.IsValid() && has6(routes) && tun.HasIPv6() {
		return []netip.Addr{v4, v6}, nil
	}
	return []netip.Addr{v4}, nil
}

// usedPrefixes are those that this machine has routes to, and its own addresses:
// to that of another session's device there is no route.
func usedPrefixes() ([]netip.Prefix, error) {
	existing, err := tun.Existing()
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, r := range existing {
		all = append(all, r.Dst)
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range own {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		all = append(all, p)
	}
	return all, nil
}

// nameservers are this machine's own.
func (m *machine) nameservers() (all []netip.Addr, err error) {
	found, err := resolver.New(resolver.Config{Log: m.of.log}).Nameservers(m.server)
	for _, s := range found {
		all = append(all, s.Addr())
	}
	return all, err
}

// listenDNS listens at the device's own address. Where somebody has port 53 of all
// addresses (dnsmasq as it comes, a container), it is another one, of nobody's: what is
// sent there comes out of the device.
func (m *machine) listenDNS(ctx context.Context, routes []netip.Prefix) (err error) {
	m.packets, m.streams, err = m.child.ListenDNS(ctx, m.device.Addrs[0])
	if !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	other, err := freeAddrs(routes)
	if err == nil {
		m.spare, m.server = other[0], other[0]
	}
	return err
}

// answerNames answers where listenDNS said.
func (m *machine) answerNames(names *dns.Server) string {
	if m.packets == nil {
		m.asking.Lock()
		m.apart = names
		m.asking.Unlock()
		return fmt.Sprintf("names answered at %s, for port 53 of this machine's own addresses is taken", m.server)
	}
	m.of.background("DNS server", func(ctx context.Context) error { return names.Run(ctx, m.packets, m.streams) })
	return fmt.Sprintf("names answered at %s", m.server)
}

// A besides is a Network, but for the address where names are answered.
type besides struct {
	channel.Network
	*machine
}

func (b besides) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := destination(network, address)
	if err != nil || to.Addr() != b.spare {
		return b.Network.DialContext(ctx, network, address)
	}
	b.asking.Lock()
	names := b.apart
	b.asking.Unlock()
	if names == nil || to.Port() != 53 {
		return nil, syscall.ECONNREFUSED
	}
	return b.of.ask(names, network), nil
}

// Packets go by, but to that address.
func (b besides) Packets(to netip.Addr) channel.Packets {
	carrier, ok := b.Network.(channel.Carrier)
	if !ok || to == b.spare {
		return nil
	}
	return carrier.Packets(to)
}

// tellResolver tells the OS of our server. Without a result it could not be told, for lack
// of root.
func (m *machine) tellResolver(ctx context.Context, told resolver.Settings) (string, error) {
	plan, err := m.child.SetDNS(ctx, told)
	if errors.Is(err, os.ErrPermission) && !m.child.Root() {
		m.of.warn(fmt.Sprintf("without root this machine's resolver can't be told of names: they are found only where %s is asked for them", told.Server))
		return "", nil
	}
	if err != nil {
		return "", err
	}
	m.asking.Lock()
	m.mode = plan.Mode
	m.asking.Unlock()
	if plan.Mode == resolver.ModeFile {
		stop := m.of.alongside(func(ctx context.Context) { m.watchResolver(ctx, plan) })
		m.of.undo.add("end the watch of resolv.conf", func(context.Context) error { stop(); return nil })
	}
	return fmt.Sprintf("names asked through %s", plan.Mode), nil
}

// watchResolver says when resolv.conf is left to somebody who writes it at every turn.
func (m *machine) watchResolver(ctx context.Context, plan resolver.Plan) {
	server, writer := m.server, cmp.Or(plan.Manager, "something else")
	err := resolver.New(resolver.Config{Log: m.of.log}).Watch(ctx, server, func(asked bool) {
		m.asking.Lock()
		m.passed = !asked
		m.asking.Unlock()
		if asked {
			m.of.reporter.Say("names are found again")
		} else {
			m.of.reporter.Say(fmt.Sprintf("%s writes /etc/resolv.conf again and again, and it is left to that: names of the other network are not found, unless %s is asked for them", writer, server))
		}
	})
	if err != nil {
		m.of.log.Warn("resolv.conf is not watched", "error", err)
	}
}

// fill tells of the device, and of what goes through it.
func (m *machine) fill(s *Status) {
	s.Flows = flowStatus(m.stack.Stats())
	s.Device = &DeviceStatus{Name: m.device.Name(), Addresses: m.device.Addrs, MTU: deviceMTU, Offload: m.device.Offload()}
	m.asking.Lock()
	defer m.asking.Unlock()
	s.DNS = &DNSStatus{Mode: string(m.mode), Server: m.server, Passed: m.passed}
}
