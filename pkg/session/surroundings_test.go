package session

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
)

type silence struct{ Reporter }

// surroundingsOf is what a command sees whose cluster has 10.96.0.0/12 and does not answer.
func surroundingsOf(t *testing.T, only bool) *surroundings {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	r := NewRun(RunConfig{TunnelConfig: TunnelConfig{Reporter: silence{}, Log: log}, Only: only})
	r.life = t.Context()
	r.keep = channel.NewKeep(channel.KeepConfig{})
	r.keep.Close()
	r.routes = []RouteStatus{{Prefix: netip.MustParsePrefix("10.96.0.0/12")}}
	r.names, r.server = dns.New(dns.Config{}), netip.MustParseAddr("198.18.0.2")
	r.outer = func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort("192.168.1.1:53")} }
	return &surroundings{Run: r}
}

// Whose an address is decides who is dialled.
func TestSurroundings(t *testing.T) {
	port := func(address string) string {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() { l.Close() })
		return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
	}
	here, six := port("127.0.0.1:0"), port("[::1]:0")
	for _, c := range []struct {
		network, address string
		all, only        error // of the dial
	}{
		{"tcp", "10.97.1.1:80", net.ErrClosed, net.ErrClosed},
		{"udp", "10.96.0.10:53", net.ErrClosed, net.ErrClosed},
		{"ping", "10.96.0.10", net.ErrClosed, net.ErrClosed},
		{"tcp", "127.0.0.1:" + here, nil, syscall.ECONNREFUSED},
		{"tcp", "127.0.0.1:" + six, nil, syscall.ECONNREFUSED},
		{"tcp", "127.0.0.2:" + six, syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{"udp", "198.18.0.2:53", nil, nil},
		{"tcp", "198.18.0.2:53", nil, nil},
		{"udp", "192.168.1.1:53", nil, nil},
		{"udp", "127.0.0.53:53", nil, nil},
		{"ping", "127.0.0.1", errAny, syscall.ECONNREFUSED},
		{"tcp", "192.168.1.1:80", errAny, syscall.ENETUNREACH},
	} {
		for only, want := range map[bool]error{false: c.all, true: c.only} {
			if want == errAny {
				continue
			}
			conn, err := surroundingsOf(t, only).DialContext(t.Context(), c.network, c.address)
			if !errors.Is(err, want) {
				t.Errorf("%s %s, only %v: %v, want %v", c.network, c.address, only, err, want)
			}
			if err == nil {
				conn.Close()
			}
		}
	}
}

// errAny is the machine's own affair.
var errAny = errors.New("any")
