package channel

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func congestionOf(t *testing.T, c *net.TCPConn) (name string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	}); err != nil {
		t.Fatal(err)
	}
	return strings.TrimRight(name, "\x00")
}

// Both ends use BBR where there is one, whatever the others use.
func TestCongestion(t *testing.T) {
	list := "allowed"
	if os.Geteuid() == 0 {
		list = "available"
	}
	available, err := os.ReadFile("/proc/sys/net/ipv4/tcp_" + list + "_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	standard, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
	want := strings.TrimSpace(string(standard))
	if strings.Contains(string(available), "bbr") {
		want = "bbr"
	}
	l, err := (&net.ListenConfig{Control: Congestion}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := (&net.Dialer{Control: Congestion}).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if got := CongestionName(); got != want {
		t.Errorf("told %q, want %s", got, want)
	}
	for _, c := range []net.Conn{near, far} {
		if got := congestionOf(t, c.(*net.TCPConn)); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
