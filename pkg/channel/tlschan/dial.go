package tlschan

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// Channel is the near end. It is a channel.Silent.
type Channel struct {
	w *wire

	mu        sync.Mutex
	listeners map[uint32]*listener
	last      uint32 // number of a listener
	leaving   map[*listener]bool
}

var _ channel.Silent = (*Channel)(nil)

// Dial makes a channel of conn, to the end that serves there, and takes conn
// over. ctx bounds the handshake only.
func Dial(ctx context.Context, conn net.Conn, cfg Config) (*Channel, error) {
	c := &Channel{listeners: make(map[uint32]*listener), leaving: make(map[*listener]bool)}
	_, err := handshake(ctx, conn, cfg.withDefaults(), nearEnd, func(w *wire) { c.w = w }, c.open)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Wait blocks until the wire is gone and says why.
func (c *Channel) Wait() error { return c.w.Wait() }

// Close ends the wire.
func (c *Channel) Close() error { return c.w.Close() }

// RTT is the round trip of the last sign of life; zero before the first.
func (c *Channel) RTT() time.Duration { return time.Duration(c.w.rtt.Load()) }

// Silence is how long nothing was read from the wire.
func (c *Channel) Silence() time.Duration { return c.w.Silence() }

// Retire closes the wire when the last connection over it is closed.
func (c *Channel) Retire() { c.w.Retire() }

// DialContext has the far end dial. The name is resolved there.
func (c *Channel) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	s, err := c.dial(ctx, network, address)
	if err != nil {
		return nil, opError("dial", network, address, err)
	}
	local := wiring.Addr{Net: network, Text: c.w.conn.LocalAddr().String()}
	return newConn(c.w, s, network, local, wiring.ParseAddr(network, address)), nil
}

func opError(op, network, address string, err error) error {
	return &net.OpError{Op: op, Net: network, Addr: wiring.Addr{Net: network, Text: address}, Err: err}
}

func (c *Channel) dial(ctx context.Context, network, address string) (*yamux.Stream, error) {
	switch network {
	case "tcp", "udp", "ping":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	s, err := c.w.begin(ctx, message{kind: msgDial, a: network, b: address})
	if err == nil {
		_, err = c.w.answered(ctx, s, address)
	}
	return s, err
}
