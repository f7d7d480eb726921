package kube

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"testing"
)

// from dials from an address.
type from struct{ *net.Dialer }

func (from) Addrs(context.Context) ([]netip.Addr, error) { return nil, nil }
func (from) Close()                                      {}

// Where the machine still is, nothing is dropped; a connection from where it was is.
func TestMoved(t *testing.T) {
	c := apiServer(t, func(http.ResponseWriter, *http.Request) {})
	ask := func() {
		t.Helper()
		if _, err := c.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	pooled := func() int {
		c.conns.mu.Lock()
		defer c.conns.mu.Unlock()
		return len(c.conns.open)
	}
	if c.Moved(); pooled() != 1 {
		t.Errorf("%d connections", pooled())
	}
	c.conns.by = from{&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}}
	c.conns.drop()
	ask()
	if c.Moved(); pooled() != 0 {
		t.Errorf("%d connections from another address", pooled())
	}
}
