package e2e

import (
	"errors"
	"net"
	"runtime"
	"testing"
	"time"
)

// takePort53 has it on all addresses of the laptop, as a dnsmasq or a container's has.
func takePort53(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	back, err := enterNetwork("/run/netns/culvert-" + laptopHost)
	if err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenPacket("udp", ":53")
	tcp, tcpErr := net.Listen("tcp", ":53")
	if err := errors.Join(err, tcpErr, back()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close(); tcp.Close() })
}

// Where port 53 of all addresses is somebody else's, names are answered at an address
// that only leads to the device.
func TestPort53Taken(t *testing.T) {
	takePort53(t)
	check := noTrace(t)
	first, second := connect(t), connect(t, "-n", "other")
	first.says("port 53 of this machine's own addresses is taken")
	found(t, "web.shop", "web.other", "db-0.db.shop.svc.cluster.local", "intranet.corp.example", "www.example.com")
	if got := laptop(t, "dig", "+tcp", "+short", "web.shop.svc.cluster.local"); got != serviceIPs(t, "web")[0] {
		t.Errorf("by TCP web.shop is %s", got)
	}
	for _, st := range statuses(t) {
		if got := routeOf(t, st.DNS.Server); got != st.Device.Name {
			t.Errorf("%s, where names of %s are answered, leads to %s", st.DNS.Server, st.Device.Name, got)
		}
	}
	second.stop()
	found(t, "web.shop", "intranet.corp.example")
	first.stop()
	check(30 * time.Second)
}
