package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// neighbour makes a network of the laptop's own, with somebody in it who answers for addr.
func neighbour(t testing.TB, network, own, addr string) {
	t.Helper()
	t.Cleanup(func() { try("sh", "-c", "ip link del clash; ip netns del neighbour") })
	laptop(t, "sh", "-c", fmt.Sprintf(`
		ip netns add neighbour
		ip link add clash type veth peer name clash netns neighbour
		ip link set clash addrgenmode none; ip -n neighbour link set clash addrgenmode none
		ip addr add %s dev clash; ip link set clash up
		ip -n neighbour addr add %s dev clash; ip -n neighbour link set clash up; ip -n neighbour link set lo up`, own+network, addr+network))
	startAs(t, on(laptopHost, "ip", "netns", "exec", "neighbour", kit(t), "serve", "-name", "neighbour"))
	eventually(t, 10*time.Second, "the neighbour answers", func() error {
		_, talk, err := try("curl", "-sS", "--max-time", "1", "http://"+addr+":8080")
		if err != nil {
			return fmt.Errorf("%w: %s", err, talk)
		}
		return nil
	})
}

// The LAN has addresses of the cluster's. Both are reached, each under an
// address of its own, and names lead to the cluster's.
func TestConflictC16Map(t *testing.T) {
	web := netip.MustParseAddr(serviceIP(t, "web"))
	lan, _ := web.Prefix(24)
	own := lan.Addr().Next()
	if own == web {
		own = own.Next()
	}
	neighbour(t, "/24", own.String(), web.String())
	check := noTrace(t)
	s := connect(t)
	s.says("is this machine's " + lan.String() + " dev clash, too")
	if got := routeOf(t, web.String()); got != "clash" {
		t.Errorf("%v goes to %s", web, got)
	}
	if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web: %s", page)
	}
	shown := netip.MustParseAddr(strings.Fields(laptop(t, "getent", "ahostsv4", at("web")))[0])
	if shown == web || routeOf(t, shown.String()) != "culvert0" {
		t.Errorf("web is shown as %v", shown)
	}
	if name := laptop(t, "dig", "+short", "-x", shown.String()); name != at("web")+".svc.cluster.local." {
		t.Errorf("%v is the address of %q", shown, name)
	}
	if name := laptop(t, "dig", "+short", "-x", web.String()); strings.Contains(name, "cluster.local") {
		t.Errorf("the LAN's %v is called %q", web, name)
	}
	if page := curl(t, "http://"+web.String()+":8080"); !strings.Contains(page, "neighbour") {
		t.Errorf("the neighbour: %s", page)
	}
	refusedAtOnce(t, lastOf(shown))
	for _, state := range []string{"down", "up"} { // what programs remember stays true
		laptop(t, "ip", "link", "set", "clash", state)
		time.Sleep(time.Second) // routes have followed
		if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) || !strings.Contains(laptop(t, "getent", "ahostsv4", at("web")), shown.String()) {
			t.Errorf("with the neighbour's network %s: %s", state, page)
		}
	}
	s.stop()
	check(30 * time.Second)
}

// vpn comes up, with all of the cluster's range.
func vpn(t testing.TB) {
	t.Helper()
	t.Cleanup(func() { try("ip", "link", "del", "vpn") })
	laptop(t, "sh", "-c", `
		ip link add vpn type veth peer name vpn-peer
		ip link set vpn addrgenmode none; ip link set vpn-peer addrgenmode none; ip link set vpn up; ip link set vpn-peer up`)
	eventually(t, 5*time.Second, "the VPN is up", func() error {
		_, _, err := try("sh", "-c", "ip link show vpn | grep -q 'state UP' && ip link show vpn-peer | grep -q 'state UP'")
		return err
	})
	laptop(t, "ip", "route", "add", "10.0.0.0/8", "dev", "vpn")
}

// A VPN has all of the cluster's range, and more: what Services and pods have is the
// cluster's, all else stays the VPN's, and what is new is led to at once.
func TestConflictC16Exact(t *testing.T) {
	vpn(t)
	check := noTrace(t)
	s := connect(t)
	s.says("of it only addresses are reached that Services and their pods have")
	web := serviceIP(t, "web")
	if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) || routeOf(t, web) != "culvert0" {
		t.Errorf("web: %s", page)
	}
	pod := podIPs(t, "app=web")[0]
	if page := curl(t, "http://"+pod+":8080"); routeOf(t, pod) != "culvert0" {
		t.Errorf("pod %s: %s", pod, page)
	}
	if got := routeOf(t, "10.96.255.254"); got != "vpn" {
		t.Errorf("an address that no Service has goes to %s", got)
	}
	kubectl(t, "create", "service", "clusterip", "-n", namespace, "exact", "--tcp=80")
	t.Cleanup(func() { try("kubectl", "delete", "svc", "-n", namespace, "exact") })
	ip := serviceIP(t, "exact")
	eventually(t, 5*time.Second, "a new Service is led to", func() error {
		if got := routeOf(t, ip); got != "culvert0" {
			return fmt.Errorf("%s goes to %s", ip, got)
		}
		return nil
	})
	kubectl(t, "delete", "svc", "-n", namespace, "exact")
	eventually(t, 5*time.Second, "and no more when it is gone", func() error {
		if got := routeOf(t, ip); got != "vpn" {
			return fmt.Errorf("%s goes to %s", ip, got)
		}
		return nil
	})
	s.stop()
	check(30 * time.Second)
}

// An address for Services that none has is refused, and not lost, on any wire.
func TestVacantC20(t *testing.T) {
	check := noTrace(t)
	for _, args := range [][]string{nil, {"--endpoint=auto", "--wire=wireguard"}} {
		s := connect(t, args...)
		if args != nil {
			eventually(t, 60*time.Second, "packets go as they are", func() error {
				if w := theStatus(t).Wire; w.Kind != "wireguard" {
					return fmt.Errorf("%+v", w)
				}
				return nil
			})
		}
		refusedAtOnce(t, "10.96.255.254")
		refusedAtOnce(t, "fd00:10:96::fffe")
		s.stop()
		check(30 * time.Second)
	}
}

// lastOf is the last address of a /24 that a machine may have.
func lastOf(a netip.Addr) string {
	b := a.As4()
	b[3] = 254
	return netip.AddrFrom4(b).String()
}

// refusedAtOnce asks by TCP and by UDP.
func refusedAtOnce(t testing.TB, addr string) {
	t.Helper()
	for _, ask := range [][]string{
		{"curl", "-sS", "--max-time", "20", "http://" + netip.AddrPortFrom(netip.MustParseAddr(addr), 80).String()},
		{"dig", "+tries=1", "+time=20", "@" + addr, "web"},
	} {
		start := time.Now()
		out, talk, err := try(ask...)
		if said := out + talk; err == nil || !strings.Contains(said, "refused") && !strings.Contains(said, "Could not connect") && !strings.Contains(said, "Couldn't connect") || time.Since(start) > 5*time.Second {
			t.Errorf("%s: %v after %v: %s", ask, err, time.Since(start), said)
		}
	}
}

// A VPN comes up in the middle, with all of the cluster's range, and goes.
func TestConflictC16VPNInTheMiddle(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	web := serviceIP(t, "web")
	vpn(t)
	eventually(t, 5*time.Second, "only what is in use is led to the cluster", func() error {
		if got, other := routeOf(t, web), routeOf(t, "10.96.255.254"); got != "culvert0" || other != "vpn" {
			return fmt.Errorf("web goes to %s, another address to %s", got, other)
		}
		return nil
	})
	if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web: %s", page)
	}
	laptop(t, "ip", "link", "del", "vpn")
	eventually(t, 5*time.Second, "all of the range again", func() error {
		if got := routeOf(t, "10.96.255.254"); got != "culvert0" {
			return fmt.Errorf("an address goes to %s", got)
		}
		return nil
	})
	s.stop()
	check(30 * time.Second)
}
