// Package router stands where a Service's pods stood, and hands what comes for
// them to who claims it: a process on somebody's laptop, or the original pods.
//
// One rule decides its shape: the team must not notice it. What no claim takes,
// what is not understood, and what a laptop does not answer for in time goes to the
// original, untouched.
//
// Where the Service is put back, nobody is cut off: clients are asked to connect
// anew, each in the words of its protocol, and reach the original by themselves.
//
// # The way of a connection
//
//	router.go   a listener for each route; what is asked of the router from outside
//	client.go   the connection, as far as both HTTP and the rest need it
//	look.go     the first bytes: HTTP/1, HTTP/2, or nothing that we read
//	claims.go   who takes it: pure decisions over a table of claims, and match.go
//	raw.go      bytes of a connection nobody looks into, and datagrams
//	http.go     requests, one by one
//	mirror.go   copies that nobody waits for
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// ErrClosing answers a claim that comes while the Service is being put back.
var ErrClosing = errors.New("the router is closing: its service is being put back")

// A HeldError answers a claim whose match another holder has already.
type HeldError struct {
	Holder string
	Since  time.Time
	Match  Match
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("%s is held by %s since %s", e.Match, e.Holder, e.Since.Local().Format(time.DateTime))
}

// A Route is one port of the Service.
type Route struct {
	Network  string // "tcp" or "udp"
	Port     int    // the Service's port: claims name a route "tcp/80"
	Listen   string // where its connections arrive, ":8080"
	Original string // where they went before, "10.96.3.4:80"; empty: nowhere, and what no claim takes is refused
	Protocol string // empty: told by the first bytes; "http": likewise, but the client speaks first; "tcp": never looked into
}

// A Claim asks for the traffic of some routes, or for what of it matches.
type Claim struct {
	ID     string    `json:"id"`
	Holder string    `json:"holder"`
	Since  time.Time `json:"since"`
	Match  Match     `json:"match"`
	Mirror bool      `json:"mirror,omitempty"` // a copy only; answers are dropped
	Routes []string  `json:"routes"`           // "tcp/80"
}

// A ClaimStatus is a Claim and what became of it.
type ClaimStatus struct {
	Claim
	Silent      bool   `json:"silent"`      // not seen lately: the original answers for it
	Requests    uint64 `json:"requests"`    // HTTP requests that it took
	Connections uint64 `json:"connections"` // raw connections and flows that it took
	Open        int    `json:"open"`        // requests and connections that it has now
}

// Config is what a Router is made of.
type Config struct {
	Routes  []Route
	Network channel.Network // listens, and dials the originals
	Grace   time.Duration   // a claim that is not seen for so long is dropped; zero: none is

	// SpareProbes sends what a kubelet asks to the original, whoever claims it:
	// where this is a pod's own traffic, its life hangs on the answers.
	SpareProbes bool

	Log *slog.Logger
}

// name is how claims call a route.
func (r *Route) name() string { return r.Network + "/" + strconv.Itoa(r.Port) }

// service is how laptops call it: they are dialled for a port of the Service.
func (r *Route) service() string { return ":" + strconv.Itoa(r.Port) }

// A Router serves the routes of one Service.
type Router struct {
	config  Config
	claims  *claims
	streams crowd // connections that are open, but for flows of datagrams
	copies  copies
	buffers buffers
}

// New returns a Router that serves nothing yet; it may be claimed already.
func New(c Config) *Router {
	return &Router{config: c, claims: newClaims(c.Routes, c.Grace)}
}

// Put makes a claim, or makes the one of that ID anew: its laptop is reached
// through to from now on, what it has taken goes on and is counted on.
// to.DialContext(ctx, "tcp", ":80") dials the laptop for port 80 of the Service,
// with a ctx of memchan.From that tells the client's address;
// where to is nil the original answers. The error is a *HeldError where another
// claim has the same Match on one of the routes, unless take drops that one.
func (r *Router) Put(c Claim, to relay.Dialer, take bool) error { return r.claims.put(c, to, take) }

// Seen notes that a claim's laptop is alive, and tells how the claim is doing.
func (r *Router) Seen(id string) (ClaimStatus, bool) { return r.claims.see(id) }

// Drop ends a claim; what its laptop has taken it may finish. If it was the last
// one the router is closing: it can be claimed no more, the original answers, and
// clients are asked to connect anew, because the Service is about to be put back.
func (r *Router) Drop(id string) (last, ok bool) { return r.claims.drop(id) }

// Claims lists the claims, the oldest first.
func (r *Router) Claims() []ClaimStatus { return r.claims.list() }

// Part asks clients to connect anew, because another router is about to take their
// Service; until then all goes on.
func (r *Router) Part() { r.claims.part() }

// Drain closes the router as the last Drop does, and waits until no connection is
// open or ctx has ended; it tells how many are. New ones are served by the
// original meanwhile. Flows of datagrams are not waited for: they have no end.
// Where ctx has ended already the router is closed, and nothing waited for.
func (r *Router) Drain(ctx context.Context) (open int) {
	r.claims.close()
	return r.streams.wait(ctx)
}

// Run listens and serves until ctx ends, or a listener fails for good.
func (r *Router) Run(ctx context.Context) error {
	listeners, err := r.listen(ctx)
	if err != nil {
		return err
	}
	all, ctx := errgroup.WithContext(ctx)
	for i, l := range listeners {
		all.Go(func() error { return r.accept(ctx, l, &r.config.Routes[i]) })
	}
	all.Go(func() error { return r.claims.watch(ctx) })
	err = all.Wait()
	r.copies.all.Wait()
	r.claims.forget()
	return err
}

func (r *Router) listen(ctx context.Context) (all []net.Listener, err error) {
	for _, route := range r.config.Routes {
		l, err := r.config.Network.Listen(ctx, route.Network, route.Listen)
		if err != nil {
			for _, l := range all {
				l.Close()
			}
			return nil, fmt.Errorf("listen for %s on %s: %w", route.name(), route.Listen, err)
		}
		all = append(all, l)
	}
	return all, nil
}

// accept serves what comes by one route; it returns when that is gone.
func (r *Router) accept(ctx context.Context, l net.Listener, route *Route) error {
	var all sync.WaitGroup
	defer all.Wait()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		switch {
		case err == nil && route.Network == "udp":
			all.Go(func() { r.flow(ctx, c, route) })
		case err == nil:
			all.Go(func() { r.stream(ctx, c, route) })
		case ctx.Err() != nil:
			return nil
		case !passing(err):
			return fmt.Errorf("accept for %s: %w", route.name(), err)
		default:
			wait(ctx, 100*time.Millisecond)
		}
	}
}

// passing tells of an error of Accept after which the next one may succeed.
func passing(err error) bool {
	return slices.ContainsFunc([]error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM},
		func(e error) bool { return errors.Is(err, e) })
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// A crowd counts who is here, and can be waited for to have gone.
type crowd struct {
	mu   sync.Mutex
	n    int
	gone chan struct{} // closed when n is 0 again
}

func (c *crowd) enter() (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == 0 {
		c.gone = make(chan struct{})
	}
	c.n++
	return c.leave
}

func (c *crowd) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n--; c.n == 0 {
		close(c.gone)
	}
}

func (c *crowd) here() (int, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n, c.gone
}

func (c *crowd) wait(ctx context.Context) int {
	n, gone := c.here()
	if n == 0 {
		return 0
	}
	select {
	case <-gone:
		return 0
	case <-ctx.Done():
	}
	n, _ = c.here()
	return n
}
