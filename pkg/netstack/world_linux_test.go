package netstack_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// The far end's addresses. Behind deaf nobody answers.
const (
	web4, web6   = "10.96.0.10", "fd00:10:96::10"
	deaf4, deaf6 = "10.97.0.10", "fd00:10:97::10"
	noHost4      = "10.98.0.10"
	noHost6      = "fd00:10:98::10"
	forbid4      = "10.99.0.10"
	forbid6      = "fd00:10:99::10"
	own4, own6   = "198.18.0.1", "fd63:756c:7665:7274::1"
	routes4      = "10.96.0.0/14"
	routes6      = "fd00:10:90::/44"
)

// A farEnd is channel.Host in a network namespace of its own: real sockets, a
// real kernel's errors, and nothing in between.
type farEnd struct {
	channel.Host
	ns   netns.NsHandle
	deaf *tun.Device
}

// in runs f on a thread that is in the far end's namespace and dies with it.
func (e *farEnd) in(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		if err := netns.Set(e.ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func (e *farEnd) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	e.in(func() error {
		c, err = e.Host.DialContext(ctx, network, address)
		return nil
	})
	return c, err
}

func (e *farEnd) Listen(ctx context.Context, network, address string) (l net.Listener, err error) {
	e.in(func() error {
		l, err = e.Host.Listen(ctx, network, address)
		return nil
	})
	return l, err
}

func newFarEnd(t testing.TB) *farEnd {
	t.Helper()
	e := &farEnd{ns: -1}
	made := make(chan error)
	go func() {
		runtime.LockOSThread()
		var err error
		e.ns, err = netns.New()
		made <- err
	}()
	must(t, <-made)
	must(t, e.in(e.furnish))
	t.Cleanup(func() {
		e.deaf.Close()
		e.ns.Close()
	})
	return e
}

func (e *farEnd) furnish() error {
	for knob, v := range map[string]string{
		"net/ipv4/ping_group_range":                  "0 0",
		"net/ipv6/conf/all/disable_ipv6":             "0",
		"net/ipv6/conf/default/accept_dad":           "0",
		"net/ipv4/icmp_ratelimit":                    "0",
		"net/ipv4/tcp_syn_retries":                   "2",
		"net/ipv4/ip_local_port_range":               "10000 65000",
		"net/ipv4/conf/default/rp_filter":            "0",
		"net/ipv6/icmp/ratelimit":                    "0",
		"net/ipv6/conf/default/autoconf":             "0",
		"net/ipv6/conf/default/router_solicitations": "0",
	} {
		// This is the calling thread's namespace, not the process's.
		if err := os.WriteFile("/proc/sys/"+knob, []byte(v), 0); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, a := range []string{web4 + "/32", web6 + "/128"} {
		addr, _ := netlink.ParseAddr(a)
		addr.Flags = unix.IFA_F_NODAD // or it can't be bound yet
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return err
		}
	}
	// Deaf is a device whose packets nobody reads.
	if e.deaf, err = tun.Open("deaf0"); err != nil {
		return err
	}
	if err := (tun.Link{Name: "deaf0"}).Configure(65535); err != nil {
		return err
	}
	deaf, err := netlink.LinkByName("deaf0")
	if err != nil {
		return err
	}
	for dst, kind := range map[string]int{
		"10.97.0.0/16": 1, "fd00:10:97::/48": 1, // unicast
		"10.98.0.0/16": 7, "fd00:10:98::/48": 7, // unreachable
		"10.99.0.0/16": 8, "fd00:10:99::/48": 8, // prohibit
	} {
		r := &netlink.Route{Type: kind}
		_, r.Dst, _ = net.ParseCIDR(dst)
		if kind == 1 {
			r.LinkIndex = deaf.Attrs().Index
		}
		if err := netlink.RouteAdd(r); err != nil {
			return err
		}
	}
	return nil
}

// plain hides the virtio-net header, for a device that has none.
type plain struct{ *tun.Device }

func (p plain) HeaderLen() int { return 0 }

func (p plain) Readv(bufs [][]byte) (int, error) {
	n, err := p.Device.Readv(append([][]byte{make([]byte, 10)}, bufs...))
	return max(n-10, 0), err
}

func (p plain) Writev(bufs [][]byte) (int, error) {
	return p.Device.Writev(append([][]byte{make([]byte, 10)}, bufs...))
}

// prepare makes a Stack between a TUN in this namespace and the network.
func prepare(t testing.TB, mtu int, network channel.Network, opts ...func(*netstack.Config)) (*tun.Device, *netstack.Stack) {
	t.Helper()
	d, err := tun.Open("")
	must(t, err)
	link := tun.Link{Name: d.Name()}
	must(t, link.Configure(mtu, netip.MustParseAddr(own4), netip.MustParseAddr(own6)))
	must(t, link.SetRoutes([]netip.Prefix{netip.MustParsePrefix(routes4), netip.MustParsePrefix(routes6)}))
	cfg := netstack.Config{Device: d, MTU: mtu, Network: network}
	for _, o := range opts {
		o(&cfg)
	}
	s, err := netstack.New(cfg)
	must(t, err)
	return d, s
}

// start runs a Stack until the test ends, and looks for what it leaves behind.
func start(t testing.TB, mtu int, network channel.Network, opts ...func(*netstack.Config)) *netstack.Stack {
	t.Helper()
	before := goleak.IgnoreCurrent()
	_, s := prepare(t, mtu, network, opts...)
	stop := run(s)
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if open := s.Stats(); open.TCP.Open+open.UDP.Open+open.Ping.Open != 0 {
			t.Errorf("Run left %+v", open)
		}
		goleak.VerifyNone(t, before)
	})
	return s
}

// run returns what stops the Stack.
func run(s *netstack.Stack) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	return func() error {
		cancel()
		return <-ended
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
