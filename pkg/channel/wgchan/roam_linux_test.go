package wgchan

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

// world is a laptop and a router in namespaces of their own; the far end is behind
// the router, in the namespace of the tests.
type world struct {
	t              testing.TB
	laptop, router netns.NsHandle
}

const (
	far4, far6 = "10.66.2.1", "fd66:2::1"
	uplink     = "cv-wg-up" // the laptop's
	toLaptop   = "cv-wg-lap"
	toFar      = "cv-wg-far"
	farLink    = "cv-wg-pod"
)

// in runs f on a thread that is in a namespace and dies with it.
func in(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t}
	for _, ns := range []*netns.NsHandle{&w.laptop, &w.router} {
		*ns = w.namespace()
		t.Cleanup(func() { ns.Close() })
	}
	for _, ns := range []netns.NsHandle{w.laptop, w.router} {
		w.must(in(ns, atOnce))
	}
	w.must(atOnce())
	w.must(in(w.laptop, func() error { return w.veth(uplink, toLaptop, w.router) }))
	w.must(w.veth(farLink, toFar, w.router))
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(farLink); err == nil {
			netlink.LinkDel(l)
		}
	})
	w.must(in(w.laptop, func() error { return w.address(uplink, "10.66.1.1/24", "fd66:1::1/64") }))
	w.must(in(w.router, func() error {
		for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+f, []byte("1"), 0o644); err != nil {
				return err
			}
		}
		if err := w.address(toLaptop, "10.66.1.254/24", "fd66:1::254/64"); err != nil {
			return err
		}
		return w.address(toFar, "10.66.2.254/24", "fd66:2::254/64")
	}))
	w.must(w.address(farLink, far4+"/24", far6+"/64"))
	w.must(in(w.laptop, func() error { return w.route(uplink, "10.66.1.254", "fd66:1::254") }))
	w.must(w.route(farLink, "10.66.2.254", "fd66:2::254"))
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) namespace() (ns netns.NsHandle) {
	w.t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		var err error
		ns, err = netns.New()
		done <- err
	}()
	if err := <-done; err != nil {
		w.t.Skip("no namespaces here:", err)
	}
	return ns
}

// atOnce has addresses of IPv6 be good as soon as they are there.
func atOnce() error {
	for _, conf := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+conf+"/accept_dad", []byte("0"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) veth(here, there string, ns netns.NsHandle) error {
	a := netlink.NewLinkAttrs()
	a.Name = here
	return netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: there, PeerNamespace: netlink.NsFd(ns)})
}

// address gives a link these addresses and no others.
func (w *world) address(link string, addresses ...string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	old, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range old {
		if err := netlink.AddrDel(l, &a); err != nil {
			return err
		}
	}
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

func (w *world) route(link string, gateways ...string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	for _, text := range gateways {
		ip := netip.MustParseAddr(text)
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Gw: ip.AsSlice()}
		if err := netlink.RouteReplace(r); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) mtu(ns netns.NsHandle, link string, mtu int) {
	w.t.Helper()
	w.must(in(ns, func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, mtu)
	}))
}

// up takes the laptop's uplink away, and brings it back.
func (w *world) up(up bool) {
	w.t.Helper()
	w.must(in(w.laptop, func() error {
		l, err := netlink.LinkByName(uplink)
		if err != nil || !up {
			return errors.Join(err, netlink.LinkSetDown(l))
		}
		return errors.Join(netlink.LinkSetUp(l), w.route(uplink, "10.66.1.254"))
	}))
}

// dial dials from the laptop.
func (w *world) dial(s *site, to ...string) *Channel {
	w.t.Helper()
	s.near.Endpoints = nil
	for _, a := range to {
		s.near.Endpoints = append(s.near.Endpoints, netip.AddrPortFrom(netip.MustParseAddr(a), s.port.Number()))
	}
	return w.dialNear(s)
}

func (w *world) dialNear(s *site) *Channel {
	w.t.Helper()
	var ch *Channel
	w.must(in(w.laptop, func() (err error) {
		ch, err = Dial(context.Background(), s.near)
		return err
	}))
	w.t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		s.End()
	})
	return ch
}

func (w *world) site() *site {
	return siteAt(w.t, wiretest.Beats{Every: 500 * time.Millisecond}, newLane(0, 0, 0), newLane(0, 0, 0), &channel.Host{})
}

// TestPaths: over either family, and over a router that carries less than the links
// at both ends, of which nobody there is told.
func TestPaths(t *testing.T) {
	for _, test := range []struct {
		name, to  string
		mtu, less int
	}{{"v4", far4, 1440, 1280}, {"v6", far6, 1408, 1280}} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			ch := w.dial(w.site(), test.to)
			e := newEchoes(t, ch)
			e.move(4 << 20)
			if got := ch.MTU(); got != test.mtu {
				t.Errorf("the MTU is %d, want %d", got, test.mtu)
			}
			w.mtu(w.router, toFar, 1400)
			e.move(4 << 20)
			until(t, "less is found", func() bool { return ch.MTU() == test.less })
			w.mtu(w.router, toFar, 1500)
			until(t, "more is found", func() bool { return ch.MTU() == test.mtu })
			e.move(4 << 20)
		})
	}
}

// TestRoam: the laptop gets another address, and what is open goes on.
func TestRoam(t *testing.T) {
	w := newWorld(t)
	ch := w.dial(w.site(), far4)
	e := newEchoes(t, ch)
	for _, a := range []string{"10.66.1.7/24", "10.66.1.8/24", "10.66.1.9/24"} {
		e.move(1 << 20)
		sent := e.send(4 << 20)
		w.must(in(w.laptop, func() error {
			if err := w.address(uplink, a); err != nil {
				return err
			}
			return w.route(uplink, "10.66.1.254")
		}))
		e.receive(sent)
	}
}

// TestAway: the network is away for a while, in the middle of a flow.
func TestAway(t *testing.T) {
	w := newWorld(t)
	ch := w.dial(w.site(), far4)
	e := newEchoes(t, ch)
	e.move(1 << 20)
	sent := e.send(4 << 20)
	w.up(false)
	time.Sleep(time.Second)
	w.up(true)
	back := time.Now()
	e.receive(sent)
	if took := time.Since(back); took > 8*time.Second { // it was 20 with RACK
		t.Errorf("gone on after %v", took)
	}
}

// TestEndpoints: of several addresses, one answers.
func TestEndpoints(t *testing.T) {
	w := newWorld(t)
	ch := w.dial(w.site(), "10.66.1.99", "fd66:9::9", far6)
	newEchoes(t, ch).move(1 << 20)
	if got := ch.Endpoint().Addr().String(); got != far6 {
		t.Errorf("answered by %s, want %s", got, far6)
	}
}
