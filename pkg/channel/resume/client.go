package resume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Dialer is what leads to a Host: a channel.Network that carries words.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// A Client dials streams that go on when what they go by is lost.
type Client struct {
	to     Dialer
	budget *budget
	hold   time.Duration
	pause  time.Duration // the first between attempts

	mu      sync.Mutex
	streams map[*Stream]bool
}

// NewClient starts nothing. notice is how long a wire may be lost before that is known.
func NewClient(to Dialer, notice time.Duration) *Client {
	return &Client{to: to, budget: newBudget(), hold: holdFor(notice), pause: leastAgain, streams: map[*Stream]bool{}}
}

// Close breaks off what is open. Hosts have so long to hear of it.
func (c *Client) Close(limit time.Duration) {
	c.mu.Lock()
	all := slices.Collect(maps.Keys(c.streams))
	c.mu.Unlock()
	end(all, limit)
}

// keep knows a stream until it has ended.
func (c *Client) keep(s *Stream) {
	c.mu.Lock()
	c.streams[s] = true
	c.mu.Unlock()
	go func() {
		<-s.ended
		c.mu.Lock()
		delete(c.streams, s)
		c.mu.Unlock()
	}()
}

// Dial opens a stream of "tcp" to a Host's listener. When its connection is lost, it is dialled
// again, at once and then ever less often, for as long as a Host holds it; unless a hub has ended
// it, that is not permitted any more, the host has forgotten it, or there is nothing left to dial
// by (net.ErrClosed). Then the stream fails with that. An error of the first dial is given as it is.
func (c *Client) Dial(ctx context.Context, address string) (*Stream, error) {
	d := &dialled{Client: c, address: address, token: newToken()}
	conn, err := c.to.DialContext(ctx, call{token: d.token}.network(), address)
	if err != nil {
		return nil, err
	}
	s := newStream(true, conn.LocalAddr(), conn.RemoteAddr(), c.budget, d.lost)
	c.keep(s)
	s.attach(conn)
	return s, nil
}

// dialled is what it takes to dial a stream again. One loss follows another.
type dialled struct {
	*Client
	address  string
	token    token
	since    time.Time // it is lost
	failures int
}

const (
	againLimit = 5 * time.Second // for one attempt
	leastAgain = 50 * time.Millisecond
	doublings  = 4 // of the pause
)

// lost: of which too much waits at a hub, it would wait there again. Of one that is not permitted
// any more, the answer to another dial says why.
func (d *dialled) lost(s *Stream, lasted bool, err error) {
	if errors.Is(err, syscall.ENOBUFS) {
		s.finish(err)
		return
	}
	go d.again(s, lasted)
}

// again dials until there is a connection, or none is to be had. One that has not lasted is
// as none.
func (d *dialled) again(s *Stream, lasted bool) {
	if lasted || d.since.IsZero() {
		d.since, d.failures = time.Now(), 0
	}
	ctx, cancel := context.WithDeadline(context.Background(), d.since.Add(d.hold))
	defer cancel()
	go func() {
		select {
		case <-s.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		d.rest(ctx)
		conn, err := d.once(ctx)
		if err == nil {
			s.attach(conn)
			return
		}
		if isFinal(err) || ctx.Err() != nil {
			s.finish(fmt.Errorf("the connection was lost, and there is no other: %w", err))
			return
		}
	}
}

func (d *dialled) once(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, againLimit)
	defer cancel()
	return d.to.DialContext(ctx, call{d.token, true}.network(), d.address)
}

// rest waits before all attempts but the first.
func (d *dialled) rest(ctx context.Context) {
	if d.failures++; d.failures == 1 {
		return
	}
	wait := d.pause << min(d.failures-2, doublings)
	t := time.NewTimer(wait/2 + rand.N(wait/2))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// isFinal tells of an error that will not pass.
func isFinal(err error) bool {
	return errors.Is(err, syscall.EACCES) || errors.Is(err, net.ErrClosed) || strings.Contains(err.Error(), ErrForgotten.Error())
}
