package router

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// silence is how long a claim may go unseen before the original answers for it:
// two heartbeats.
const silence = 4 * time.Second

// A claim is one Put of a Claim; it is not changed after that. What outlives
// the next Put of the same ID is its life.
type claim struct {
	Claim
	matches test
	to      relay.Dialer
	copies  *copiers        // of a mirror
	gone    context.Context // ends when it is dropped, or made anew
	leave   context.CancelFunc
	*life
}

// life is what became of a claim; the table's lock guards it.
type life struct {
	seen        time.Time
	quiet       context.Context // ends when it goes unseen for too long
	hush        context.CancelFunc
	told        bool // that it is silent, to who waits for changes
	tired       bool // it did not answer a dial in time, and was not seen since
	lost        bool // it had no wire, and was not seen since
	requests    uint64
	connections uint64
	open        int
}

// silent tells whether the original answers for a claim.
func (c *claim) silent(now time.Time) bool {
	return c.to == nil || c.tired || now.Sub(c.seen) > silence
}

// away tells whether it is, though its wire may just be opened again.
func (c *claim) away(now time.Time) bool { return c.lost || c.silent(now) }

// heard is for a sign of life of its laptop.
func (l *life) heard(now time.Time) {
	l.seen, l.tired, l.lost = now, false, false
	if l.quiet == nil || l.quiet.Err() != nil {
		l.quiet, l.hush = context.WithCancel(context.Background())
	}
}

// takes tells whether a claim is for a request of a route; nil is what is no HTTP.
func (c *claim) takes(route string, req *http.Request) bool {
	switch {
	case !slices.Contains(c.Routes, route):
		return false
	case req == nil:
		return c.Match.conditions() == 0
	}
	return c.matches(req)
}

func (c *claim) status(now time.Time) ClaimStatus {
	return ClaimStatus{
		Claim: c.Claim, Silent: c.silent(now),
		Requests: c.requests, Connections: c.connections, Open: c.open,
	}
}

// A choice is who takes a request or a connection.
type choice struct {
	claim   *claim // nil: the original
	away    bool   // for whom it is, because that one is silent
	mirrors []*claim
}

func (to choice) same(other choice) bool {
	return to.claim == other.claim && slices.Equal(to.mirrors, other.mirrors)
}

// choose is the decision: of the claims that match the one with the most
// conditions, of those the oldest; the original where that one is silent.
func choose(claims []*claim, now time.Time, route string, req *http.Request) (to choice) {
	for _, c := range claims {
		switch {
		case !c.takes(route, req):
		case !c.Mirror:
			if to.claim == nil || meant(c, to.claim) < 0 {
				to.claim = c
			}
		case !c.silent(now):
			to.mirrors = append(to.mirrors, c)
		}
	}
	if to.claim != nil && to.claim.silent(now) {
		to.claim, to.away = nil, true
	}
	return to
}

// hold is how long a client waits where nobody is: the laptop, which may be back
// soon, is silent, and there is no original, or it does not run.
const hold = 5 * time.Second

// await waits for a laptop that is away to be back, after a choice has changed since
// the last look.
func (t *claims) await(ctx context.Context, changed *<-chan struct{}, route string, req *http.Request) (to choice, back bool) {
	for {
		select {
		case <-*changed:
		case <-ctx.Done():
			return to, false
		}
		*changed = t.changes()
		if to = t.choose(route, req); !t.left(to) {
			return to, to.claim != nil
		}
	}
}

// left tells whether the laptop of a choice is away, by now.
func (t *claims) left(to choice) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return to.away || to.claim != nil && to.claim.away(time.Now())
}

// away tells whether a claim of a route is silent.
func (t *claims) away(route string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	return slices.ContainsFunc(t.all, func(c *claim) bool { return !c.Mirror && slices.Contains(c.Routes, route) && c.away(now) })
}

func meant(a, b *claim) int {
	return cmp.Or(cmp.Compare(b.Match.conditions(), a.Match.conditions()), older(a, b))
}

// older orders claims of one weight.
func older(a, b *claim) int {
	return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.ID, b.ID))
}

// held are the claims that stand in the way of a new one.
func held(claims []*claim, c Claim) (by []*claim) {
	for _, o := range claims {
		if o.ID != c.ID && !o.Mirror && !c.Mirror && overlap(o.Routes, c.Routes) && o.Match.String() == c.Match.String() {
			by = append(by, o)
		}
	}
	return by
}

func overlap(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
}

// claims is the table of who claims what.
type claims struct {
	routes []string
	grace  time.Duration

	mu      sync.Mutex
	all     []*claim
	changed chan struct{} // closed, and another made, when a choice may be another one

	parting context.Context // ends when clients are to connect anew
	part    context.CancelFunc
	closing context.Context // ends after that, when nothing can be claimed any more
	shut    context.CancelFunc
}

func newClaims(routes []Route, grace time.Duration) *claims {
	t := &claims{grace: grace, changed: make(chan struct{})}
	t.parting, t.part = context.WithCancel(context.Background())
	t.closing, t.shut = context.WithCancel(context.Background())
	context.AfterFunc(t.closing, t.part)
	for _, r := range routes {
		t.routes = append(t.routes, r.name())
	}
	return t
}

func (t *claims) choose(route string, req *http.Request) choice {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed() {
		return choice{}
	}
	return choose(t.all, time.Now(), route, req)
}

func (t *claims) put(c Claim, to relay.Dialer, take bool) error {
	made, err := t.check(c, to)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed() {
		return ErrClosing
	}
	by := held(t.all, made.Claim)
	if len(by) > 0 && !take {
		return &HeldError{Holder: by[0].Holder, Since: by[0].Since, Match: by[0].Match}
	}
	for _, o := range by {
		t.remove(o)
	}
	if old := t.find(c.ID); old != nil {
		made.life = old.life
		t.remove(old)
	}
	made.heard(time.Now())
	t.all = append(t.all, made)
	t.change()
	return nil
}

// check makes a claim of what was asked for.
func (t *claims) check(c Claim, to relay.Dialer) (*claim, error) {
	if c.ID == "" || len(c.Routes) == 0 {
		return nil, errors.New("a claim needs an ID and routes")
	}
	for _, r := range c.Routes {
		if !slices.Contains(t.routes, r) {
			return nil, fmt.Errorf("the service has no port %s: %v", r, t.routes)
		}
	}
	matches, err := c.Match.test()
	if err != nil {
		return nil, err
	}
	if c.Since.IsZero() {
		c.Since = time.Now()
	}
	made := &claim{Claim: c, matches: matches, to: to, life: &life{}}
	made.gone, made.leave = context.WithCancel(context.Background())
	if c.Mirror && to != nil {
		made.copies = newCopiers(laptop{t, made})
	}
	return made, nil
}

func (t *claims) see(id string) (ClaimStatus, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.find(id)
	if c == nil {
		return ClaimStatus{}, false
	}
	now := time.Now()
	was := c.away(now)
	c.heard(now)
	if was {
		t.change()
	}
	return c.status(now), true
}

func (t *claims) drop(id string) (last, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.find(id)
	if c == nil {
		return false, false
	}
	t.remove(c)
	if last = len(t.all) == 0; last {
		t.shut()
	}
	t.change()
	return last, true
}

func (t *claims) list() []ClaimStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	all, now := []ClaimStatus{}, time.Now()
	for _, c := range slices.SortedFunc(slices.Values(t.all), older) {
		all = append(all, c.status(now))
	}
	return all
}

// close is for when the Service is being put back, whoever still claims what.
func (t *claims) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shut()
	t.change()
}

// look drops who was not seen for the grace time, and has the choices made
// again that silence may have changed.
func (t *claims) look() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, again := time.Now(), false
	for _, c := range slices.Clone(t.all) {
		if t.grace > 0 && now.Sub(c.seen) > t.grace {
			t.remove(c)
			again = true
		}
		if now.Sub(c.seen) > silence {
			c.hush()
		}
		if silent := c.silent(now); silent != c.told {
			c.told, again = silent, true
		}
	}
	if again {
		t.change()
	}
}

// tire notes that a laptop did not answer in time: nobody else waits for it.
func (t *claims) tire(c *claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !c.tired && t.lives(c) {
		c.tired = true
		t.change()
	}
}

// lose notes that a laptop has no wire.
func (t *claims) lose(c *claim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.lost = true
}

// begin counts what a claim is given, in one of the counters of its life; end
// tells whether it took it.
func (t *claims) begin(c *claim, count *uint64) (end func(took bool)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*count++
	c.open++
	return func(took bool) {
		t.mu.Lock()
		defer t.mu.Unlock()
		c.open--
		if !took {
			*count--
		}
	}
}

// quiet is over when a claim goes unseen, which it is not yet.
func (t *claims) quiet(c *claim) context.Context {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.quiet
}

// changes is closed when a choice that is made after this may be another one
// than before.
func (t *claims) changes() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changed
}

// What follows is called with the lock held.

func (t *claims) find(id string) *claim {
	i := slices.IndexFunc(t.all, func(c *claim) bool { return c.ID == id })
	if i < 0 {
		return nil
	}
	return t.all[i]
}

func (t *claims) lives(c *claim) bool { return slices.Contains(t.all, c) }

func (t *claims) remove(c *claim) {
	t.all = slices.DeleteFunc(t.all, func(o *claim) bool { return o == c })
	c.leave()
	if c.copies != nil {
		c.copies.close()
	}
}

func (t *claims) change() {
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *claims) closed() bool { return t.closing.Err() != nil }

func (t *claims) parts() bool { return t.parting.Err() != nil || t.closed() }

// watch looks at the claims as time goes by.
func (t *claims) watch(ctx context.Context) error {
	tick := time.NewTicker(silence / 16)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			t.look()
		case <-ctx.Done():
			return nil
		}
	}
}

// forget closes what is kept open for the claims.
func (t *claims) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range slices.Clone(t.all) {
		t.remove(c)
	}
}

// dialPatience is how long a client waits for a laptop that does not answer.
const dialPatience = 2 * time.Second

// A laptop is dialled for ports of the Service, with patience.
type laptop struct {
	t *claims
	c *claim
}

func (l laptop) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	limited, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	conn, err := l.c.to.DialContext(limited, network, address)
	switch {
	case err == nil || ctx.Err() != nil:
	case limited.Err() != nil:
		l.t.tire(l.c)
	case errors.Is(err, memchan.ErrNobody):
		l.t.lose(l.c)
	}
	return conn, err
}
