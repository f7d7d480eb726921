package tun_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/tun"
)

func open(t *testing.T, name string) *tun.Device {
	t.Helper()
	needNetns(t)
	d, err := tun.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	own4 = netip.MustParseAddr("198.18.0.1")
	own6 = netip.MustParseAddr("fd63:756c:7665:7274::1")
)

func TestOpenCountsNames(t *testing.T) {
	a, b := open(t, ""), open(t, "")
	if a.Name() != "culvert0" || b.Name() != "culvert1" {
		t.Errorf("names are %s and %s", a.Name(), b.Name())
	}
	if !a.Offload() || a.HeaderLen() != 10 {
		t.Errorf("offload %v, header of %d bytes", a.Offload(), a.HeaderLen())
	}
	must(t, a.Close())
	if c := open(t, ""); c.Name() != "culvert0" {
		t.Errorf("the name of a device that is gone is not free: %s", c.Name())
	}
	if _, err := tun.Open(b.Name()); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "make tun culvert1") {
		t.Errorf("a taken name: %v", err)
	}
	if _, err := tun.Open("a-name-that-is-too-long"); err == nil {
		t.Error("a name that is too long is taken")
	}
}

// TestPacketsBothWays sends a datagram out of the kernel, turns it round, and
// lets the kernel receive it, all on a descriptor that has been handed over.
func TestPacketsBothWays(t *testing.T) {
	needNetns(t)
	defer goleak.VerifyNone(t)
	first := open(t, "")
	d := handOver(t, first)
	must(t, first.Close()) // the device lives on the other descriptor
	must(t, tun.Link{Name: d.Name()}.Configure(1500, own4))
	must(t, tun.Link{Name: d.Name()}.SetRoutes(prefixes("10.96.0.0/16")))

	app, err := net.Dial("udp4", "10.96.0.7:9")
	must(t, err)
	defer app.Close()
	if got := app.LocalAddr().(*net.UDPAddr).AddrPort().Addr(); got != own4 {
		t.Errorf("the source is %v", got)
	}
	_, err = app.Write([]byte("hello"))
	must(t, err)

	hdr, a, b := make([]byte, 10), make([]byte, 30), make([]byte, 2000)
	var n int
	for { // the kernel has things to say of its own on a new IPv6 link
		n, err = d.Readv([][]byte{hdr, a, b})
		must(t, err)
		if a[0]>>4 == 4 {
			break
		}
	}
	if want := 10 + 28 + 5; n != want {
		t.Fatalf("read %d bytes, want %d", n, want)
	}
	packet := append(slices.Clone(a), b[:3]...)
	if string(packet[28:33]) != "hello" {
		t.Errorf("read %q", packet)
	}
	if hdr[0]&1 == 0 {
		t.Error("the sum was made, which the device offered to do without")
	}
	var back []byte
	back = append(back, packet[:12]...)
	back = append(append(back, packet[16:20]...), packet[12:16]...)
	back = append(append(back, packet[22:24]...), packet[20:22]...)
	back = append(back, packet[24:]...)
	_, err = d.Writev([][]byte{hdr, back[:20], back[20:]}) // needs a sum, still
	must(t, err)
	app.SetReadDeadline(time.Now().Add(5 * time.Second))
	got := make([]byte, 100)
	n, err = app.Read(got)
	must(t, err)
	if string(got[:n]) != "hello" {
		t.Errorf("back comes %q", got[:n])
	}
}

// handOver passes the descriptor through a socket, as another process would.
func handOver(t *testing.T, d *tun.Device) *tun.Device {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	raw, err := d.File().SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		err = unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(int(fd)), nil, 0)
	}))
	must(t, err)
	oob := make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(pair[1], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	must(t, err)
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	must(t, err)
	fds, err := unix.ParseUnixRights(&msgs[0])
	must(t, err)
	got, err := tun.FromFile(os.NewFile(uintptr(fds[0]), "tun"))
	must(t, err)
	t.Cleanup(func() { got.Close() })
	if got.Name() != d.Name() || !got.Offload() {
		t.Errorf("handed over: %s, offload %v", got.Name(), got.Offload())
	}
	return got
}

func TestFromFileRefusesOthers(t *testing.T) {
	f, err := os.Open(os.DevNull)
	must(t, err)
	if _, err := tun.FromFile(f); err == nil {
		t.Error("/dev/null is a tun")
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file is still open: %v", err)
	}
}

func TestCloseEndsReaders(t *testing.T) {
	needNetns(t)
	defer goleak.VerifyNone(t)
	d := open(t, "")
	errs := make(chan error, 3)
	var started sync.WaitGroup
	for range cap(errs) {
		started.Add(1)
		go func() {
			started.Done()
			_, err := d.Readv([][]byte{make([]byte, 100)})
			errs <- err
		}()
	}
	started.Wait()
	must(t, d.Close())
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("read of a closed device: %v", err)
		}
	}
	if _, err := d.Writev([][]byte{make([]byte, 40)}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write to a closed device: %v", err)
	}
	must(t, d.Close())
}

func TestDeletedUnderTheReader(t *testing.T) {
	needNetns(t)
	defer goleak.VerifyNone(t)
	d := open(t, "")
	errs := make(chan error, 1)
	go func() {
		for {
			if _, err := d.Readv([][]byte{make([]byte, 100)}); err != nil {
				errs <- err
				return
			}
		}
	}()
	link, err := netlink.LinkByName(d.Name())
	must(t, err)
	must(t, netlink.LinkDel(link))
	select {
	case err := <-errs:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("read of a deleted device: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the reader does not notice that the device was deleted")
	}
}

func TestConfigure(t *testing.T) {
	d := open(t, "")
	l := tun.Link{Name: d.Name()}
	other := netip.MustParseAddr("198.18.0.9")
	for _, want := range [][]netip.Addr{{own4, own6}, {own4, own6}, {other}, {own4}} {
		must(t, l.Configure(9000, want...))
		link, err := netlink.LinkByName(l.Name)
		must(t, err)
		if link.Attrs().MTU != 9000 || link.Attrs().Flags&net.FlagUp == 0 {
			t.Errorf("mtu %d, flags %v", link.Attrs().MTU, link.Attrs().Flags)
		}
		list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		must(t, err)
		var got []netip.Addr
		for _, a := range list {
			if ip, _ := netip.AddrFromSlice(a.IP); !ip.IsLinkLocalUnicast() {
				got = append(got, ip.Unmap())
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("addresses %v, want %v", got, want)
		}
		for _, a := range want { // at once, not soon
			r, err := netlink.RouteGet(a.AsSlice())
			if err != nil || r[0].Type != unix.RTN_LOCAL {
				t.Errorf("%v is not taken in: %v, %v", a, r, err)
			}
		}
	}
	if err := (tun.Link{Name: "none0"}).Configure(1500); err == nil || !strings.Contains(err.Error(), "none0") {
		t.Errorf("a link that is not there: %v", err)
	}
}

func TestConfigureWithoutIPv6(t *testing.T) {
	d := open(t, "")
	const knob = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
	must(t, os.WriteFile(knob, []byte("1"), 0))
	defer os.WriteFile(knob, []byte("0"), 0)
	if tun.HasIPv6() {
		t.Error("IPv6 is disabled, and yet there")
	}
	must(t, tun.Link{Name: d.Name()}.Configure(1500, own4, own6))
}

// routesOf lists the routes that ours are among.
func routesOf(t *testing.T, dev string) (ps []netip.Prefix) {
	t.Helper()
	all, err := tun.Existing()
	must(t, err)
	for _, r := range all {
		if r.Device == dev && !r.Dst.Addr().IsLinkLocalUnicast() && r.Dst.Bits() != 128 {
			ps = append(ps, r.Dst)
		}
	}
	return tun.Merge(ps)
}

func TestSetRoutes(t *testing.T) {
	d := open(t, "")
	l := tun.Link{Name: d.Name()}
	must(t, l.Configure(1500, own4, own6))

	// One that somebody else put there is theirs.
	link, err := netlink.LinkByName(l.Name)
	must(t, err)
	_, foreign, _ := net.ParseCIDR("10.200.0.0/16")
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: foreign, Protocol: unix.RTPROT_STATIC}))

	for _, want := range []string{
		"10.96.0.0/16",
		"10.96.0.0/16 10.244.0.0/24 10.244.1.0/24 fd00:10:96::/112",
		"10.96.0.0/16 10.244.0.0/24 10.244.1.0/24 fd00:10:96::/112", // again
		"10.96.0.0/17 fd00:10:97::/112",
		"",
		"10.96.0.0/16 fd00:10:96::/112",
	} {
		must(t, l.SetRoutes(prefixes(want)))
		got := routesOf(t, l.Name)
		if want := tun.Merge(prefixes(want + " 10.200.0.0/16")); !slices.Equal(got, want) {
			t.Errorf("routes %v, want %v", got, want)
		}
	}
	for to, src := range map[string]netip.Addr{"10.96.3.4": own4, "fd00:10:96::5": own6} {
		got, err := netlink.RouteGet(net.ParseIP(to))
		must(t, err)
		if !got[0].Src.Equal(src.AsSlice()) || got[0].LinkIndex != link.Attrs().Index {
			t.Errorf("route to %s is %v", to, got[0])
		}
	}

	// Another address, and so another source.
	other := netip.MustParseAddr("198.18.0.9")
	must(t, l.Configure(1500, other, own6))
	must(t, l.SetRoutes(prefixes("10.96.0.0/16")))
	if got, err := netlink.RouteGet(net.ParseIP("10.96.3.4")); err != nil || !got[0].Src.Equal(other.AsSlice()) {
		t.Errorf("route after a change of address is %v, %v", got, err)
	}

	// Gone with the device.
	must(t, d.Close())
	if got := routesOf(t, l.Name); len(got) != 0 {
		t.Errorf("routes %v outlive the device", got)
	}
}

// Two sessions of one cluster: the first leads, and the second when it is gone.
func TestSetRoutesBeside(t *testing.T) {
	a, b := open(t, ""), open(t, "")
	both := prefixes("10.96.0.0/16 fd00:10:96::/112")
	for i, d := range []*tun.Device{a, b} {
		l := tun.Link{Name: d.Name()}
		must(t, l.Configure(1500, []netip.Addr{own4, own4.Next()}[i], []netip.Addr{own6, own6.Next()}[i]))
		must(t, l.SetRoutes(both))
		must(t, l.SetRoutes(both))
	}
	leads := func(name string) {
		t.Helper()
		for _, to := range []string{"10.96.3.4", "fd00:10:96::5"} {
			link, err := netlink.LinkByName(name)
			must(t, err)
			if got, err := netlink.RouteGet(net.ParseIP(to)); err != nil || got[0].LinkIndex != link.Attrs().Index {
				t.Errorf("route to %s is %v, %v; want %s", to, got, err, name)
			}
		}
	}
	leads(a.Name())
	must(t, tun.Link{Name: b.Name()}.SetRoutes(nil))
	must(t, tun.Link{Name: b.Name()}.SetRoutes(both))
	must(t, a.Close())
	leads(b.Name())
}

func TestSetRoutesInTheWay(t *testing.T) {
	a, b := open(t, ""), open(t, "")
	must(t, tun.Link{Name: a.Name()}.Configure(1500, own4))
	must(t, tun.Link{Name: b.Name()}.Configure(1500, own4.Next()))
	link, err := netlink.LinkByName(a.Name())
	must(t, err)
	_, dst, _ := net.ParseCIDR("10.96.0.0/16")
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst}))
	err = tun.Link{Name: b.Name()}.SetRoutes(prefixes("10.96.0.0/16"))
	if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "10.96.0.0/16") {
		t.Errorf("a route that is taken: %v", err)
	}
	if got := routesOf(t, a.Name()); !slices.Equal(got, prefixes("10.96.0.0/16")) {
		t.Errorf("the other's routes are %v", got)
	}
}

func TestExisting(t *testing.T) {
	d, e := open(t, ""), open(t, "")
	must(t, tun.Link{Name: d.Name()}.Configure(1500, own4))
	must(t, tun.Link{Name: e.Name()}.Configure(1500, own4.Next()))
	must(t, tun.Link{Name: e.Name()}.SetRoutes(prefixes("10.97.0.0/16")))
	link, err := netlink.LinkByName(d.Name())
	must(t, err)
	add := func(dst, via string, table, kind int) {
		r := &netlink.Route{Table: table, Type: kind}
		_, r.Dst, _ = net.ParseCIDR(dst)
		if kind == unix.RTN_UNICAST {
			r.LinkIndex, r.Gw = link.Attrs().Index, net.ParseIP(via)
		}
		if via != "" {
			r.Flags = int(netlink.FLAG_ONLINK)
		}
		must(t, netlink.RouteAdd(r))
	}
	add("0.0.0.0/0", "192.0.2.1", unix.RT_TABLE_MAIN, unix.RTN_UNICAST)
	add("10.0.0.0/8", "192.0.2.1", unix.RT_TABLE_MAIN, unix.RTN_UNICAST)
	add("100.100.0.0/16", "", 52, unix.RTN_UNICAST) // as Tailscale does it
	rule(t, "pref", "5270", "table", "52")
	add("10.66.0.0/16", "", unix.RT_TABLE_MAIN, unix.RTN_BLACKHOLE)
	defer netlink.RouteDel(&netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: &net.IPNet{IP: net.IP{10, 66, 0, 0}, Mask: net.CIDRMask(16, 32)}})

	all, err := tun.Existing(e.Name())
	must(t, err)
	have := map[string]bool{}
	for _, r := range all {
		have[r.String()] = true
	}
	for _, want := range []string{
		"0.0.0.0/0 via 192.0.2.1 dev " + d.Name(), "10.0.0.0/8 via 192.0.2.1 dev " + d.Name(),
		"100.100.0.0/16 dev " + d.Name() + " table 52", "10.66.0.0/16",
	} {
		if !have[want] {
			t.Errorf("no route %q in %v", want, all)
		}
	}
	for _, r := range all {
		if r.Device == e.Name() || r.Dst.Addr() == own4 {
			t.Errorf("%v is listed", r)
		}
	}
	if got := len(tun.Conflicts(prefixes("10.66.0.0/24 100.100.3.0/24"), all)); got != 3 {
		t.Errorf("%d conflicts, want 3", got)
	}
}

func rule(t *testing.T, args ...string) {
	t.Helper()
	ip(t, append([]string{"rule", "add"}, args...)...)
	t.Cleanup(func() { ip(t, append([]string{"rule", "del"}, args...)...) })
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

// TestTablesC16: routes of other tables count where a rule asks them, and are told apart
// where that is before the main table, in which ours are.
func TestTablesC16(t *testing.T) {
	vpn, ours := open(t, "vpn0"), open(t, "")
	must(t, tun.Link{Name: vpn.Name()}.Configure(1500, own4.Next()))
	must(t, tun.Link{Name: ours.Name()}.Configure(1500, own4))
	for table, dst := range map[string]string{"52": "10.96.0.0/12", "51820": "default", "77": "10.7.0.0/16", "253": "10.8.0.0/16", "99": "10.9.0.0/16"} {
		ip(t, "route", "add", dst, "dev", vpn.Name(), "table", table)
	}
	ip(t, "route", "add", "throw", "10.100.0.0/16", "table", "52")
	t.Cleanup(func() { ip(t, "route", "flush", "table", "52") })
	rule(t, "pref", "5210", "fwmark", "0x80000/0xff0000", "table", "main") // Tailscale, its own packets
	rule(t, "pref", "5270", "table", "52")                                 // and all others
	rule(t, "pref", "6000", "table", "main", "suppress_prefixlength", "0") // wg-quick
	rule(t, "pref", "6001", "not", "fwmark", "0xca6c", "table", "51820")
	rule(t, "pref", "6002", "table", "77") // behind the main one by then

	existing, err := tun.Existing()
	must(t, err)
	found := map[string]int{}
	for _, r := range existing {
		found[r.Dst.String()] = r.Table
	}
	for dst, table := range map[string]int{"10.96.0.0/12": 52, "0.0.0.0/0": 0, "10.7.0.0/16": 0, "10.8.0.0/16": 0} {
		if got, ok := found[dst]; !ok || got != table {
			t.Errorf("%s: %v, table %d, want %d", dst, ok, got, table)
		}
	}
	for _, none := range []string{"10.9.0.0/16", "10.100.0.0/16"} { // nobody asks; on to the next
		if _, ok := found[none]; ok {
			t.Errorf("%s is in the way", none)
		}
	}
	wanted := prefixes("10.96.0.0/16 10.7.3.0/24")
	must(t, tun.Link{Name: ours.Name()}.SetRoutes(wanted))
	astray, err := tun.Astray(ours.Name(), wanted)
	must(t, err)
	if len(astray) != 1 || astray[0].Wanted != wanted[0] || astray[0].Existing.Device != vpn.Name() || astray[0].Existing.String() != "10.96.0.0/12 dev vpn0 table 52" {
		t.Errorf("astray: %v", astray)
	}
	w := tun.Around(wanted[0], tun.Conflicts(wanted[:1], existing), nil, tun.Either)
	if !slices.Equal(w.Mapped, wanted[:1]) || w.Exact != nil || w.Whole != nil {
		t.Errorf("ways %+v", w)
	}
	w = tun.Around(wanted[1], tun.Conflicts(wanted[1:], existing), nil, tun.Either)
	if !slices.Equal(w.Exact, wanted[1:]) {
		t.Errorf("ways %+v", w)
	}
}

// TestUnsegmented shows that the kernel hands over TCP in pieces larger than
// the MTU, which is what the offloads are for.
func TestUnsegmented(t *testing.T) {
	d := open(t, "")
	hdr, b := make([]byte, 10), make([]byte, 65535)
	// A segment of 3,000 bytes to be cut to 1,000 goes in ...
	must(t, tun.Link{Name: d.Name()}.Configure(1500, own4))
	must(t, os.WriteFile("/proc/sys/net/ipv4/conf/all/forwarding", []byte("1"), 0))
	defer os.WriteFile("/proc/sys/net/ipv4/conf/all/forwarding", []byte("0"), 0)
	must(t, tun.Link{Name: d.Name()}.SetRoutes(prefixes("10.96.0.0/16 10.97.0.0/16")))
	p := make([]byte, 40+3000)
	p[0], p[8], p[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], []byte{10, 97, 0, 1, 10, 96, 0, 1})
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum>>16+sum))
	p[32] = 5 << 4
	copy(hdr, []byte{1, 1})
	for i, v := range []uint16{40, 1000, 20, 16} {
		binary.NativeEndian.PutUint16(hdr[2+2*i:], v)
	}
	_, err := d.Writev([][]byte{hdr, p})
	must(t, err)
	// ... and comes out again whole.
	for {
		n, err := d.Readv([][]byte{hdr, b})
		must(t, err)
		if b[0]>>4 != 4 || b[9] != 6 {
			continue // a redirect, among others
		}
		if n != 10+len(p) || hdr[1] != 1 || binary.NativeEndian.Uint16(hdr[4:]) != 1000 {
			t.Errorf("read %d bytes behind % x", n, hdr)
		}
		return
	}
}
