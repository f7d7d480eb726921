package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// stream serves one connection of a client.
func (r *Router) stream(ctx context.Context, conn net.Conn, route *Route) {
	defer r.streams.enter()()
	c := newClient(conn)
	defer c.Close()
	defer context.AfterFunc(ctx, func() {
		relay.Abort(conn, net.ErrClosed)
		c.Close()
	})()
	from := memchan.From(ctx, conn.RemoteAddr())
	spoken, far, err := r.listenTo(from, c, route)
	switch {
	case err != nil:
		relay.Abort(conn, err)
	case spoken == raw:
		r.raw(from, c, route, far)
	default:
		newWeb(ctx, r, route, c, spoken == http2).serve()
	}
}

// A beginning is a raw connection that was opened before it was clear that
// there would be one, and what its server said first.
type beginning struct {
	net.Conn
	claim *claim
	said  []byte
}

// listenTo tells what a connection speaks. A client that says nothing may be
// waiting for the server to begin, as with MySQL or SMTP: then it is raw, and
// already opened.
func (r *Router) listenTo(ctx context.Context, c *client, route *Route) (kind, *beginning, error) {
	switch route.Protocol {
	case "tcp":
		return raw, nil, nil
	case "http":
		k, err := c.look(0)
		return k, nil, err
	}
	k, err := c.look(hush)
	if k != unsure || err != nil {
		return k, nil, err
	}
	far, claim, err := r.reach(ctx, route, r.claims.choose(route.name(), nil))
	if err != nil { // nobody is there to begin
		k, err := c.look(0)
		return k, nil, err
	}
	return c.lookBoth(&beginning{Conn: far, claim: claim})
}

// lookBoth waits for who speaks first. If it is the client, and it speaks HTTP,
// the server is not needed.
func (c *client) lookBoth(far *beginning) (kind, *beginning, error) {
	buf, spoke := make([]byte, 4<<10), make(chan error, 1)
	go func() {
		n, err := far.Read(buf)
		far.said = buf[:n]
		if !timedOut(err) {
			c.SetReadDeadline(time.Unix(1, 0)) // ends look
		}
		spoke <- err
	}()
	k, err := c.look(0)
	far.SetReadDeadline(time.Unix(1, 0))
	ferr := <-spoke
	c.SetReadDeadline(time.Time{})
	far.SetReadDeadline(time.Time{})
	switch {
	case err != nil:
		far.Close()
		return raw, nil, err
	case k == unsure || len(far.said) > 0:
		k = raw
	case k != raw:
		far.Close()
		return k, nil, nil
	}
	if ferr != nil && !timedOut(ferr) && !ended(ferr) {
		far.Close()
		return raw, nil, ferr
	}
	return k, far, nil
}

// reach opens a connection to who is to take it, and to the original where a
// laptop does not.
func (r *Router) reach(ctx context.Context, route *Route, to choice) (net.Conn, *claim, error) {
	if to.claim != nil {
		c, err := laptop{r.claims, to.claim}.DialContext(ctx, route.Network, route.service())
		if err == nil {
			return c, to.claim, nil
		}
	}
	c, err := r.original(ctx, route)
	return c, nil, err
}

// reachLate waits for a laptop that is away where there is no original, which err
// says.
func (r *Router) reachLate(ctx context.Context, changed *<-chan struct{}, route *Route, err error) (net.Conn, *claim, error) {
	wait, cancel := context.WithTimeout(ctx, hold)
	defer cancel()
	for {
		to, back := r.claims.await(wait, changed, route.name(), nil)
		if !back {
			return nil, nil, err
		}
		if c, claim, again := r.reach(ctx, route, to); again == nil {
			return c, claim, nil
		}
	}
}

func (r *Router) original(ctx context.Context, route *Route) (net.Conn, error) {
	if route.Original == "" {
		return nil, fmt.Errorf("dial the original of %s: there is none: %w", route.name(), syscall.ECONNREFUSED)
	}
	if r.claims.away(route.name()) { // it may not run: its workload is scaled down
		limited, cancel := context.WithTimeout(ctx, dialPatience)
		defer cancel()
		ctx = limited
	}
	return r.config.Network.DialContext(ctx, route.Network, route.Original)
}

// raw hands bytes on and back that nobody looks into.
func (r *Router) raw(ctx context.Context, c *client, route *Route, far *beginning) {
	if far == nil {
		changed := r.claims.changes()
		to := r.claims.choose(route.name(), nil)
		conn, claim, err := r.reach(ctx, route, to)
		if err != nil && r.claims.left(to) {
			conn, claim, err = r.reachLate(ctx, &changed, route, err)
		}
		if err != nil {
			relay.Abort(c.Conn, err)
			return
		}
		far = &beginning{Conn: conn, claim: claim}
	}
	defer far.Close()
	defer context.AfterFunc(ctx, func() { relay.Abort(far.Conn, net.ErrClosed) })()
	if far.claim != nil {
		defer r.claims.begin(far.claim, &far.claim.connections)(true)
	}
	near, done := r.copies.tee(ctx, c.Conn, route, r.claims.choose(route.name(), nil).mirrors, c.first)
	defer done()
	if err := openingWords(c, far); err != nil {
		relay.Abort(c.Conn, err)
		relay.Abort(far.Conn, err)
		return
	}
	relay.Join(near, far.Conn)
}

// openingWords passes on what was read while it was not clear what would be spoken.
func openingWords(c *client, far *beginning) error {
	if _, err := c.Conn.Write(far.said); len(far.said) > 0 && err != nil {
		return err
	}
	if len(c.first) == 0 {
		return nil
	}
	_, err := far.Write(c.first)
	c.first, far.said = nil, nil
	return err
}

// flow serves the datagrams of one client address, until another is chosen to
// take them: the next datagram is a new flow then.
func (r *Router) flow(ctx context.Context, near net.Conn, route *Route) {
	ctx = memchan.From(ctx, near.RemoteAddr())
	changed := r.claims.changes()
	to := r.claims.choose(route.name(), nil)
	far, claim, err := r.reach(ctx, route, to)
	if err != nil {
		relay.Abort(near, err)
		return
	}
	to.claim = claim
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() {
		near.Close()
		far.Close()
	})()
	if claim != nil {
		defer r.claims.begin(claim, &claim.connections)(true)
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		r.untilChosenAnew(ctx, route, to, changed)
		cancel()
	}()
	from, done := r.copies.tee(ctx, near, route, to.mirrors, nil)
	relay.Datagrams(from, far, relay.DefaultIdle)
	done()
	cancel()
	<-gone
}

// untilChosenAnew returns when ctx ends, or another choice is made for a route.
func (r *Router) untilChosenAnew(ctx context.Context, route *Route, was choice, changed <-chan struct{}) {
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		changed = r.claims.changes()
		if !r.claims.choose(route.name(), nil).same(was) {
			return
		}
	}
}

// refusal is an error that tells that nothing was sent: another may be asked.
type refusal struct{ err error }

func (e *refusal) Error() string { return e.err.Error() }
func (e *refusal) Unwrap() error { return e.err }

func refused(err error) bool {
	var e *refusal
	return errors.As(err, &e)
}
