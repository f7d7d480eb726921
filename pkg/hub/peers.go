package hub

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/channel/resume"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
)

// Peers are the other hubs that hosts may be attached to. There is nothing that hubs agree
// on, and nothing kept: one that lacks a host asks the others, who answer of their own hosts
// alone, so that no question goes round. They know each other by having one host key.
type peers struct {
	hub  *Hub
	find func(ctx context.Context) ([]string, error) // their addresses, perhaps with our own
	each time.Duration                               // that they are looked for

	claim time.Duration // that they have to answer who wants a name, or a list

	blind atomic.Bool // they have not been looked for, or in vain the last time

	mu    sync.Mutex
	known map[string]*peer
	last  map[string]*peer // who had a host, to be asked first
}

type peer struct {
	address string
	keep    *channel.Keep
	end     context.CancelFunc
	self    atomic.Bool          // it is this hub
	info    atomic.Pointer[Info] // what it said last; nil: nothing yet
	unasked atomic.Bool          // of a name
}

const (
	findEvery  = 5 * time.Second
	findLimit  = 5 * time.Second
	peerTurn   = 500 * time.Millisecond // for one to answer, before the next is asked as well
	peerBeat   = time.Second
	maxLast    = 10_000
	peerReopen = 2 * time.Second // at most, between attempts to reach one
)

// run keeps wires to the peers until ctx ends. begun is called when they have been looked for.
func (p *peers) run(ctx context.Context, begun func()) {
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all.Go(func() { p.compareAll(ctx) })
	for ctx.Err() == nil {
		look, done := context.WithTimeout(ctx, findLimit)
		found, err := p.find(look)
		done()
		if err == nil {
			p.set(ctx, found, &all)
		} else if ctx.Err() == nil {
			p.hub.cfg.Log.Warn("peers not found", "err", err)
		}
		p.blind.Store(err != nil)
		begun()
		select {
		case <-ctx.Done():
		case <-time.After(p.each):
		}
	}
}

// set has a wire to each of the addresses, and to no other.
func (p *peers) set(ctx context.Context, found []string, all *sync.WaitGroup) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for address, one := range p.known {
		if !slices.Contains(found, address) && !one.keep.State().Up { // it may only be about to go
			one.end()
			delete(p.known, address)
		}
	}
	for _, address := range found {
		if p.known[address] == nil {
			p.known[address] = p.begin(ctx, address, all)
		}
	}
}

func (p *peers) begin(ctx context.Context, address string, all *sync.WaitGroup) *peer {
	ctx, cancel := context.WithCancel(ctx)
	one := &peer{address: address, end: cancel}
	one.keep = channel.NewKeep(channel.KeepConfig{
		Open: func(ctx context.Context) (channel.Channel, error) {
			c, info, err := p.hub.dialPeer(ctx, address)
			one.info.Store(&info)
			if errors.Is(err, errSelf) {
				one.self.Store(true)
				cancel()
			}
			return c, err
		},
		OnState:    func(channel.KeepState) { one.unasked.Store(true) },
		MaxBackoff: peerReopen, Log: p.hub.cfg.Log.With("peer", address),
	})
	all.Go(func() {
		if err := one.keep.Run(ctx); !errors.Is(err, net.ErrClosed) {
			p.hub.cfg.Log.Warn("peer", "address", address, "err", err)
		}
	})
	return one
}

// errSelf is a hub that has found itself among its peers.
var errSelf = errors.New("that is this hub")

func (h *Hub) dialPeer(ctx context.Context, address string) (c channel.Channel, info Info, err error) {
	d := net.Dialer{Timeout: helloLimit}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, info, err
	}
	wire, err := tlschan.Dial(ctx, conn, tlschan.Config{Identity: tlschan.Identity{Key: h.cfg.HostKey, Peer: h.cfg.HostKey.Public()}, Beat: min(peerBeat, h.cfg.Beat)})
	if err != nil {
		return nil, info, err
	}
	c = wire
	info, err = Ask(ctx, c)
	if !info.Resumes {
		c = older{wire}
	}
	if err == nil && info.ID == h.id {
		err = errSelf
	}
	if err != nil {
		c.Close()
		return nil, info, err
	}
	return c, info, nil
}

// up are those that can be asked, who had the host last first.
func (p *peers) up(name string) (all []*peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, one := range p.known {
		if state := one.keep.State(); state.Up && state.Silent == 0 {
			all = append(all, one)
		}
	}
	if last := p.last[name]; last != nil {
		slices.SortStableFunc(all, func(a, b *peer) int {
			switch {
			case a == last && b != last:
				return -1
			case b == last && a != last:
				return 1
			}
			return 0
		})
	}
	return all
}

// addresses are where agents may dial those that are up.
func (p *peers) addresses() (all []string) {
	for _, one := range p.up("") {
		if info := one.info.Load(); info != nil && info.Address != "" && len(all) < maxOthers {
			all = append(all, info.Address)
		}
	}
	return all
}

// maxOthers bounds what an agent is told: two hubs are enough for it.
const maxOthers = 16

func (p *peers) had(name string, one *peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.last) >= maxLast || p.last == nil {
		p.last = map[string]*peer{}
	}
	p.last[name] = one
}

// count is how many hubs there are to be, this one among them.
func (p *peers) count() int { return 1 + len(p.others()) }

// others are all that there are to be, but this one.
func (p *peers) others() (all []*peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, one := range p.known {
		if !one.self.Load() {
			all = append(all, one)
		}
	}
	return all
}

// A candidate may have a host.
type candidate func(ctx context.Context) (net.Conn, error)

// candidates are the peers as such.
func (p *peers) candidates(network, name, port string) (all []candidate) {
	for _, one := range p.up(name) {
		all = append(all, func(ctx context.Context) (net.Conn, error) {
			c, err := one.keep.DialContext(ctx, network, net.JoinHostPort(name, port))
			if err == nil {
				p.had(name, one)
			} else if strings.Contains(err.Error(), errNotMine.Error()) {
				err = errNotMine
			}
			return c, err
		})
	}
	return all
}

// race asks one after the other, and the next one already when one takes its time. The first
// connection is taken; the errors are all that there were.
func race(ctx context.Context, turn time.Duration, waiting []candidate) (net.Conn, []error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		conn net.Conn
		err  error
	}
	answers, asked, heard := make(chan answer), 0, 0
	ask := func() {
		next := waiting[0]
		waiting = waiting[1:]
		asked++
		go func() {
			c, err := next(ctx)
			select {
			case answers <- answer{c, err}:
			case <-ctx.Done():
				if err == nil {
					c.Close()
				}
			}
		}()
	}
	var errs []error
	for len(waiting) > 0 || heard < asked {
		if heard == asked {
			ask()
		}
		var slow <-chan time.Time
		if len(waiting) > 0 {
			slow = time.After(turn)
		}
		select {
		case a := <-answers:
			heard++
			if a.err == nil {
				return a.conn, nil
			}
			errs = append(errs, a.err)
		case <-slow:
			ask()
		case <-ctx.Done():
			return nil, append(errs, ctx.Err())
		}
	}
	return nil, errs
}

// worst is the error that says most: nobody having the host is what is said last.
func worst(errs []error) error {
	for _, err := range errs {
		if !isElsewhere(err) && !errors.Is(err, errNotMine) {
			return err
		}
	}
	for _, err := range errs {
		if isElsewhere(err) {
			return err
		}
	}
	return errors.Join(errs...)
}

// errNotMine is what a hub says to another that asks for a host it lacks.
var errNotMine = errors.New("no host of this hub")

// A hop is the hub as its peers may use it: a host of its own is reached, for what may be
// was seen to by who asks. It goes no further.
type hop struct {
	hub  *Hub
	from net.Addr
}

var _ channel.Network = (*hop)(nil)

func (h *hop) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if address == controlAddress {
		return h.hub.control.DialContext(memchan.From(ctx, caller{Addr: h.from, hub: true}), network, address)
	}
	plain, err := wordless(network, resume.IsDial)
	if err != nil {
		return nil, err
	}
	name, port, err := split(plain, address)
	if err != nil {
		return nil, err
	}
	c, err := h.hub.registry.dial(ctx, h.from, network, name, port)
	if isElsewhere(err) {
		err = errNotMine
	}
	return c, err
}

func (h *hop) Listen(_ context.Context, network, address string) (net.Listener, error) {
	return nil, &forbiddenError{"for a hub to be " + address}
}

// Addresses is a find for peers that are named: each HOST:PORT, or, with the prefix "dns:",
// all that a name leads to now, as that of a headless Service does.
func Addresses(named []string) func(ctx context.Context) ([]string, error) {
	return func(ctx context.Context) (all []string, err error) {
		for _, n := range named {
			if len(n) < 4 || n[:4] != "dns:" {
				all = append(all, n)
				continue
			}
			host, port, err := net.SplitHostPort(n[4:])
			if err != nil {
				return nil, err
			}
			addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
			if err != nil {
				return nil, fmt.Errorf("find peers: %w", err)
			}
			for _, a := range addrs {
				all = append(all, net.JoinHostPort(a.Unmap().String(), port))
			}
		}
		return all, nil
	}
}
