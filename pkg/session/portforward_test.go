package session

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// says answers each connection to address with its name.
func says(t *testing.T, network *memchan.Network, address, name string) net.Listener {
	t.Helper()
	l, err := network.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, name)
			c.Close()
		}
	}()
	return l
}

// Each connection is dialled to a pod that is ready when it comes; one that does not
// answer is passed over, and that none does is said once.
func TestGateDialsAnew(t *testing.T) {
	defer goleak.VerifyNone(t)
	var cluster memchan.Network
	defer says(t, &cluster, "10.244.0.7:8080", "first").Close()
	var said atomic.Int32
	g := &gate{
		Mapping: Mapping{Target: kube.Target{Kind: "deployment", Name: "web"}, Port: "http", Local: "0", Network: "tcp"},
		port:    kube.PodPort("tcp", 8080), behind: &pods{}, to: &cluster, say: func(string) { said.Add(1) },
	}
	if err := g.listen(t.Context(), []string{"127.0.0.1", "::1"}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	for _, l := range g.listeners {
		go func() { ended <- relay.Forward(ctx, l, g, "tcp", "") }()
	}
	ask := func() string {
		t.Helper()
		c, err := net.Dial("tcp", g.listeners[1].Addr().String())
		if errors.Is(err, syscall.ECONNRESET) { // it was quick
			return "reset"
		} else if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		text, err := io.ReadAll(c)
		if errors.Is(err, syscall.ECONNRESET) {
			return "reset"
		}
		return string(text)
	}
	place := func(addresses ...string) (all []kube.Place) {
		for _, a := range addresses {
			all = append(all, kube.Place{Pod: "web-" + a, Addr: netip.MustParseAddr(a)})
		}
		return all
	}
	for range 2 {
		if got := ask(); got != "reset" {
			t.Errorf("without a pod: %q", got)
		}
	}
	g.behind.set(place("10.244.0.7", "10.244.0.9"))
	for range 8 {
		if got := ask(); got != "first" {
			t.Errorf("with a pod that is gone: %q", got)
		}
	}
	defer says(t, &cluster, "10.244.0.8:8080", "second").Close()
	g.behind.set(place("10.244.0.8"))
	if got := ask(); got != "second" {
		t.Errorf("after a restart: %q", got)
	}
	if n := said.Load(); n != 1 {
		t.Errorf("%d failures were said, want the first of each row", n)
	}
	stop()
	<-ended
	<-ended
}

func TestGateTellsOfATakenPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	g := &gate{Mapping: Mapping{Host: "web", Port: "80", Local: port, Network: "tcp"}}
	err = g.listen(t.Context(), []string{"127.0.0.1"})
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "as :80,") {
		t.Errorf("%v", err)
	}
}
