package hub

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/resume"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
)

// Streams between a client and an agent of ours go on when a hub is lost that they go by. Hubs
// have no part in that but to pass words on: those of a dial, to who has listened for such. All
// that they permit, count and bound is one more connection to the same port.

// errPlain is what a dial of a stream that goes on meets where there are none.
var errPlain = errors.New("streams do not go on there")

// isPlain tells of that error, whoever has said it.
func isPlain(err error) bool { return strings.Contains(err.Error(), errPlain.Error()) }

// older is a wire to a hub that does not know of such streams.
type older struct{ *tlschan.Channel }

func (o older) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if _, words := channel.CutWords(network); words != "" {
		return nil, errPlain
	}
	return o.Channel.DialContext(ctx, network, address)
}

// Listen is for what that hub has: connections as they are.
func (o older) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	network, _ = channel.CutWords(network)
	return o.Channel.Listen(ctx, network, address)
}

// wordless is a network without its words, which are to be those of a dial, or of who listens.
func wordless(network string, are func(words string) bool) (plain string, err error) {
	plain, words := channel.CutWords(network)
	if words != "" && !are(words) {
		return "", net.UnknownNetworkError(plain + " with words")
	}
	return plain, nil
}

// lastWords is how long connections that are broken off have to be told so, where they would
// be held else.
const lastWords = 2 * time.Second

// A Client is the hosts of a hub for who may reach them: a Network whose wire is opened again
// when it is lost, and whose connections of "tcp" go on then where a host of ours is behind them.
type Client struct {
	*channel.Keep
	streams *resume.Client

	mu      sync.Mutex
	refused int       // times in a row that the key was not let in
	since   time.Time // the first of them
}

// A hub that is killed, or has too many strangers, hangs up as one does that lets nobody in. It
// does not do so again and again.
const (
	surelyRefused    = 4
	surelyRefusedFor = 4 * time.Second
)

// opened notes what has become of an attempt at a wire.
func (c *Client) opened(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !errors.Is(err, tlschan.ErrNotLetIn) {
		c.refused = 0
		return
	}
	if c.refused++; c.refused == 1 {
		c.since = time.Now()
	}
}

func (c *Client) isRefused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused >= surelyRefused && time.Since(c.since) >= surelyRefusedFor
}

// again is what streams are dialled by: where no key is let in, no wire is waited for.
type again struct{ *Client }

func (a again) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := a.Keep.DialContext(ctx, network, address)
	if err != nil && a.isRefused() {
		err = fmt.Errorf("%w: %w", syscall.EACCES, err)
	}
	return conn, err
}

// Run keeps a wire until ctx ends, and returns net.ErrClosed when all is gone.
func (c *Client) Run(ctx context.Context) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() {
		c.streams.Close(lastWords)
		end()
	})()
	return c.Keep.Run(life)
}

// DialContext dials a host.
func (c *Client) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "tcp" {
		return c.Keep.DialContext(ctx, network, address)
	}
	s, err := c.streams.Dial(ctx, address)
	switch {
	case err == nil:
		return s, nil
	case isPlain(err):
		return c.Keep.DialContext(ctx, network, address)
	}
	return nil, err
}
