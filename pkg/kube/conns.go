package kube

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// conns are the open connections to the API server. The transports below
// client-go do not all let go of theirs when asked: a credential plugin's hides
// what it wraps, and a watch that was just stopped is not idle yet.
type conns struct {
	mu     sync.Mutex
	closed bool
	open   map[*conn]bool
}

// conn is one that is forgotten when it is closed.
type conn struct {
	net.Conn
	all    *conns
	pooled bool
}

// dial is for the pool of an HTTP client.
func (c *conns) dial(ctx context.Context, network, address string) (net.Conn, error) {
	return c.begin(ctx, network, address, true)
}

// dialApart is for a connection that has one user, who notices himself when it
// is dead.
func (c *conns) dialApart(ctx context.Context, network, address string) (net.Conn, error) {
	return c.begin(ctx, network, address, false)
}

func (c *conns) begin(ctx context.Context, network, address string, pooled bool) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	if !pooled {
		dialer.Control = channel.Congestion
	}
	raw, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		raw.Close()
		return nil, net.ErrClosed
	}
	one := &conn{Conn: raw, all: c, pooled: pooled}
	if c.open == nil {
		c.open = map[*conn]bool{}
	}
	c.open[one] = true
	return one, nil
}

func (c *conn) Close() error {
	c.all.mu.Lock()
	delete(c.all.open, c)
	c.all.mu.Unlock()
	return c.Conn.Close()
}

// drop ends those of the pool; the next request begins another. The pool itself
// notices a dead connection only after some 45 seconds.
func (c *conns) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for one := range c.open {
		if one.pooled {
			one.Conn.Close()
			delete(c.open, one)
		}
	}
}

// close ends all of them, and lets no other begin.
func (c *conns) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for one := range c.open {
		one.Conn.Close()
	}
	c.open = nil
}
