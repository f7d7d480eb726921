package tlschan

import (
	"context"
	"net"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
)

// Channel is the near end. It is a channel.Lane.
type Channel struct {
	w    *wire
	asks *signalling.Near
}

var _ channel.Lane = (*Channel)(nil)

// Dial makes a channel of conn, to the end that serves there, and takes conn
// over. ctx bounds the handshake only.
func Dial(ctx context.Context, conn net.Conn, cfg Config) (*Channel, error) {
	c := &Channel{}
	made := func(w *wire) { c.w, c.asks = w, signalling.NewNear(w) }
	_, err := handshake(ctx, conn, cfg.withDefaults(), nearEnd, cfg.Identity.isPeer, made, func(s signalling.Stream) { c.asks.Open(s) })
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
func (c *Channel) RTT() time.Duration { return c.w.mux.RTT() }

// Silence is how long nothing was read from the wire.
func (c *Channel) Silence() time.Duration { return c.w.Silence() }

// Retire closes the wire when the last connection over it is closed.
func (c *Channel) Retire() { c.w.Retire() }

// Flows is how many connections are open.
func (c *Channel) Flows() int { return c.w.Flows() }

// DialContext has the far end dial. The name is resolved there.
func (c *Channel) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return c.asks.DialContext(ctx, network, address)
}

// Listen has the far end listen. The address is taken there as it is: for a
// Network of names, a name.
func (c *Channel) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return c.asks.Listen(ctx, network, address)
}
