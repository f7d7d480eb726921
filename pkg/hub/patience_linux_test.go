package hub

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel gives a wire up when its beats do.
func TestPatience(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`})
	dialled := make(chan net.Conn, 8)
	said := y.agent("one", "db-01", func(ctx context.Context) (net.Conn, error) {
		c, err := Reach("127.0.0.1:" + y.port)(ctx)
		if err == nil {
			dialled <- c
		}
		return c, err
	}, "22="+y.sshd)
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01") })
	raw := must((<-dialled).(*net.TCPConn).SyscallConn())(t)
	var limit int
	err := raw.Control(func(fd uintptr) { limit, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT) })
	if want := lostAfter * y.beat; err != nil || time.Duration(limit)*time.Millisecond != want {
		t.Errorf("%d ms, %v: want %s", limit, err, want)
	}
}
