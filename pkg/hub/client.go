package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/resume"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// NewClient is a Client that its Run has a wire for. A Name and Offers are not for it.
func NewClient(cfg AgentConfig) *Client {
	cfg = cfg.withDefaults()
	hosts := &Client{}
	open := func(ctx context.Context) (channel.Channel, error) {
		c, _, err := cfg.open(ctx, cfg.Dial)
		hosts.opened(err)
		return c, err
	}
	hosts.Keep = channel.NewKeep(channel.KeepConfig{
		Open: open, OpenTimeout: wireLimit, Beside: open, BesideTimeout: wireLimit, Silence: cfg.silence(),
		MinBackoff: leastBackoff, MaxBackoff: clientBackoff, Log: cfg.Log,
	})
	hosts.streams = resume.NewClient(again{hosts}, cfg.notice())
	return hosts
}

const (
	hubLimit  = 10 * time.Second          // for a wire to a hub, while somebody waits
	hostLimit = dialLimit + 5*time.Second // for a host behind it
)

// Talk joins in and out to a stream of a host's, until the host has ended it or both sides
// have said all. Should a hub be lost, it goes on by another one, if there is an agent of ours
// behind it; else, and if the host has forgotten it, it dials again unless the host has said
// anything before.
func Talk(ctx context.Context, cfg AgentConfig, address string, in io.Reader, out io.WriteCloser) error {
	ctx, cancel := context.WithCancel(ctx)
	hosts := NewClient(cfg)
	var running sync.WaitGroup
	running.Go(func() { _ = hosts.Run(ctx) })
	defer running.Wait()
	defer cancel()
	c, err := persist(func() (net.Conn, error) { return dialBehind(ctx, hosts, address) })
	if err != nil {
		return fmt.Errorf("dial %s by way of the hub %s: %w", address, cfg.Hub, err)
	}
	if err := converse(c, in, out); err != nil {
		c.Abort(err)
		return err
	}
	c.Close()
	c.arrived(ctx)
	return nil
}

func dialBehind(ctx context.Context, hosts *Client, address string) (net.Conn, error) {
	ready, cancel := context.WithTimeout(ctx, hubLimit)
	defer cancel()
	if err := hosts.Ready(ready); err != nil {
		return nil, err
	}
	ctx, end := context.WithTimeout(ctx, hostLimit)
	defer end()
	return hosts.DialContext(ctx, "tcp", address)
}

func converse(c *persistent, in io.Reader, out io.WriteCloser) error {
	said := make(chan error, 1)
	go func() {
		_, err := relay.Copy(c, in)
		if err == nil {
			err = c.CloseWrite()
		}
		said <- err
	}()
	if _, err := relay.Copy(out, c); err != nil {
		return err
	}
	out.Close()
	if err := <-said; err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// clientBackoff is the longest wait between attempts to reach a hub, for who waits for it.
const clientBackoff = 2 * time.Second

const (
	attempts = 3        // at a stream that breaks before anything is heard
	maxSaid  = 64 << 10 // that is kept to be said again
)

// persist dials a stream, and again when it breaks before the other side has said anything:
// until then nothing is lost by that, for what was written is written again.
func persist(dial func() (net.Conn, error)) (*persistent, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	return &persistent{Conn: c, left: attempts - 1, dial: dial}, nil
}

type persistent struct {
	dial func() (net.Conn, error)

	mu sync.Mutex
	net.Conn
	said  []byte
	ended bool // by CloseWrite
	left  int  // attempts
}

func (p *persistent) Read(b []byte) (int, error) {
	for {
		p.mu.Lock()
		c := p.Conn
		p.mu.Unlock()
		n, err := c.Read(b)
		if n > 0 {
			p.settle()
		}
		if n > 0 || err == nil || errors.Is(err, io.EOF) || p.replace(c) != nil {
			return n, err
		}
	}
}

// settle is for when it was heard, or there is no going back for another reason.
func (p *persistent) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.said, p.left = nil, 0
}

func (p *persistent) Write(b []byte) (int, error) {
	p.mu.Lock()
	c := p.Conn
	if len(p.said)+len(b) > maxSaid {
		p.said, p.left = nil, 0
	}
	if p.left > 0 {
		p.said = append(p.said, b...)
	}
	p.mu.Unlock()
	n, err := c.Write(b)
	if err != nil && p.replace(c) == nil {
		return len(b), nil // with all that was said before
	}
	return n, err
}

var errFinal = errors.New("there is no other attempt")

// replace puts another stream in the place of a broken one, unless that was done meanwhile.
func (p *persistent) replace(broken net.Conn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.Conn == broken {
		if p.left == 0 {
			return errFinal
		}
		p.left--
		c, err := p.dial()
		if err != nil {
			p.left = 0
			return err
		}
		broken.Close()
		p.Conn = c
		if _, err = c.Write(p.said); err == nil && p.ended {
			err = c.(channel.CloseWriter).CloseWrite()
		}
		if err != nil {
			broken = c
		}
	}
	return nil
}

func (p *persistent) CloseWrite() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	return p.Conn.(channel.CloseWriter).CloseWrite()
}

// arrived waits until the host has all that was written.
func (p *persistent) arrived(ctx context.Context) {
	if s, ok := p.Conn.(*resume.Stream); ok {
		select {
		case <-s.Ended():
		case <-ctx.Done():
		}
	}
}

// Abort has the host see that it was not all.
func (p *persistent) Abort(reason error) {
	p.settle()
	relay.Abort(p.Conn, reason)
}

func (p *persistent) Close() error {
	p.settle()
	return p.Conn.Close()
}
