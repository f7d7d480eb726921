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
	by Through // nil: this machine's own sockets

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
	raw, err := c.connect(ctx, network, address, pooled)
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

func (c *conns) connect(ctx context.Context, network, address string, pooled bool) (net.Conn, error) {
	if c.by != nil {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		return c.by.DialContext(ctx, network, address)
	}
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	if !pooled {
		dialer.Control = channel.Congestion
	}
	return dialer.DialContext(ctx, network, address)
}

func (c *conn) Close() error {
	c.all.mu.Lock()
	delete(c.all.open, c)
	c.all.mu.Unlock()
	return c.Conn.Close()
}

// drop ends those of the pool; the next request begins another. The pool itself
// notices a dead connection only after some 45 seconds.
func (c *conns) drop() { c.dropIf(func(net.Conn) bool { return true }) }

// dropIf ends those that it is told so of.
func (c *conns) dropIf(lost func(net.Conn) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for one := range c.open {
		if one.pooled && lost(one.Conn) {
			one.Conn.Close()
			delete(c.open, one)
		}
	}
}

// Moved ends what is pooled and would begin at another address of this machine now: it has
// moved to another network, where nobody answers to that one.
func (c *Cluster) Moved() {
	c.conns.dropIf(func(conn net.Conn) bool {
		from, ok := conn.LocalAddr().(*net.TCPAddr)
		if !ok {
			return false
		}
		now, err := net.Dial("udp", conn.RemoteAddr().String()) // which sends nothing
		if err != nil {
			return false // it may come back
		}
		defer now.Close()
		return !now.LocalAddr().(*net.UDPAddr).IP.Equal(from.IP)
	})
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
