package hub

import (
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// balanced has haproxy in front of the hubs, which always chooses the first that there is.
func (y *yard) balanced(server string) (address string) {
	y.t.Helper()
	y.tool("haproxy")
	l := must(net.Listen("tcp", "127.0.0.1:0"))(y.t)
	address = l.Addr().String()
	l.Close()
	cfg := fmt.Sprintf("defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 1m\n  timeout server 1m\n  option redispatch 1\n  retries 3\nlisten hubs\n  bind %s\n  balance first\n", address)
	for i, port := range y.ports {
		cfg += fmt.Sprintf("  server h%d 127.0.0.1:%s id %d %s\n", i, port, i+1, server)
	}
	y.write("haproxy.cfg", cfg)
	y.background(exec.Command("haproxy", "-db", "-f", y.path("haproxy.cfg")), "")
	y.await("haproxy is there", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return address
}

// outOfReach is an address that does not answer, as behind a NAT.
func outOfReach(t *testing.T) string {
	t.Helper()
	fd := must(syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0))(t)
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	at := must(syscall.Getsockname(fd))(t).(*syscall.SockaddrInet4)
	address := fmt.Sprintf("127.0.0.1:%d", at.Port)
	for { // until nothing more is taken
		c, err := net.DialTimeout("tcp", address, 300*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { c.Close() })
	}
}

// Each hub tells where the others are: a balancer that always leads to the same one does not
// keep an agent from two, nor does an address that is out of its reach.
func TestToldAtLogin(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-*:*"`})
	nowhere := outOfReach(t)
	hubs := []*Hub{y.hub}
	told := []string{nowhere}
	y.advertise = func(address string) string {
		if len(told) == 0 {
			return address
		}
		defer func() { told = told[1:] }()
		return told[0]
	}
	hubs = append(hubs, y.oneMore(), y.oneMore(), y.oneMore()) // none is told of the first, and nothing good of the second
	holders := func() (all []int) {
		for i, h := range hubs {
			if h.registry.missing("tcp", "db-01", "22") == nil {
				all = append(all, i)
			}
		}
		return all
	}
	y.await("hubs know each other", func() bool {
		return !slices.ContainsFunc(hubs, func(h *Hub) bool { return len(h.peers.up("")) < 3 })
	})
	front := y.balanced("check inter 1s fastinter 200")
	began := time.Now()
	said := y.agent("one", "db-01", Reach(front), "22="+y.sshd)
	y.await("two hubs have it", func() bool { return len(holders()) == 2 })
	t.Logf("at %v after %v", holders(), time.Since(began).Round(time.Millisecond))
	if got := holders(); got[0] != 0 || got[1] == 1 {
		t.Errorf("it is at %v", got)
	}
	for _, i := range []int{holders()[1], 0} {
		y.ends[i]() // and its port refuses
		began = time.Now()
		y.await("two hubs have it again", func() bool { return len(holders()) == 2 && !slices.Contains(holders(), i) })
		t.Logf("at %v %v after hub %d went", holders(), time.Since(began).Round(time.Millisecond), i)
		_, y.port, _ = net.SplitHostPort(front)
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	}
	if n := strings.Count(said.String(), nowhere+": i/o timeout"); n > 2 { // once, or once a leg at one time
		t.Errorf("%d attempts at what is out of reach", n)
	}
}
