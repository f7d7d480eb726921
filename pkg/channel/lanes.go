package channel

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// A Lane is a wire that can be one of several.
type Lane interface {
	Silent

	// RTT is the round trip of the last sign of life; zero before the first.
	RTT() time.Duration

	// Flows is how many connections are open.
	Flows() int
}

const (
	mostLanes = 8

	// farAway is the round trip from which on a connection carries less than the
	// machine could: the send buffer of a kernel, 4 MiB, is the most that it has on its
	// way, and much less is where packets are lost. On a shorter path it is the
	// processor that has no more to give, and lanes would only cost.
	farAway = 5 * time.Millisecond

	laneLimit   = 10 * time.Second // for opening one
	laneSilence = 3 * time.Second  // after it, flows go elsewhere
	laneIdle    = time.Minute      // so long, or twice, nothing is open on one that is closed

	leastLaneBackoff, mostLaneBackoff = time.Second, time.Minute
)

// Spread makes one Channel of a wire and of others that another opens to the same
// far end: lanes, each with its own connection, and so with its own share of a long
// path. Where that is long, and several flows are open, there is one lane more than
// flows, up to a bound: it is opened in the background, and no flow can move. Lanes
// that are not used are closed.
//
// A new flow goes to the lane with the fewest. A hash would leave three of eight lanes
// empty with eight flows, and have others carry two or three. Which of them will
// transfer much is not known beforehand: a lane to itself is the best for either kind.
//
// The first wire is the one that listens; its silence, round trip and end are those
// of the whole. Another that ends takes its own flows along, and no more.
func Spread(first Lane, another func(context.Context) (Lane, error)) Lane {
	s := &spread{Lane: first, another: another, lanes: []*lane{{Lane: first}}, done: make(chan struct{})}
	s.ctx, s.stop = context.WithCancel(context.Background())
	go s.live()
	return s
}

type spread struct {
	Lane    // the first
	another func(context.Context) (Lane, error)
	ctx     context.Context // ends when there are to be no more lanes
	stop    context.CancelFunc
	wg      sync.WaitGroup // for the other lanes
	done    chan struct{}  // closed when all are gone
	err     error          // of the first; after done

	mu        sync.Mutex
	lanes     []*lane // the first is always there
	retired   bool
	rtt       time.Duration // the shortest so far
	opening   int
	failures  int // since a lane lived for long
	notBefore time.Time
}

type lane struct {
	Lane
	dialling int
	used     bool // lately
	left     bool // to its last flow, or dead: it is given none
}

// A lane that is silent, or left, is as full as no other.
const (
	silent = 1 << 20
	left   = 1 << 30
)

// load is how many flows are open there, or will be.
func (l *lane) load() int {
	n := l.Flows() + l.dialling
	if l.Silence() >= laneSilence {
		n += silent
	}
	if l.left {
		n += left
	}
	return n
}

// live waits for the first wire, and for the others, which end with it unless they
// are only to end with their flows.
func (s *spread) live() {
	defer close(s.done)
	s.err = s.Lane.Wait()
	s.stop()
	if all, retired := s.all(); !retired {
		closeAll(all)
	}
	s.wg.Wait()
}

// all are the lanes; after stop there will be no more.
func (s *spread) all() (all []*lane, retired bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lanes), s.retired
}

func closeAll(lanes []*lane) {
	for _, l := range lanes {
		l.Close()
	}
}

// Wait blocks until all wires are gone, and says why the first is.
func (s *spread) Wait() error {
	<-s.done
	return s.err
}

func (s *spread) Close() error {
	s.stop()
	all, _ := s.all()
	closeAll(all)
	return nil
}

// Retire has each lane end with its own last flow.
func (s *spread) Retire() {
	s.mu.Lock()
	s.retired = true
	s.mu.Unlock()
	s.stop()
	all, _ := s.all()
	for _, l := range all {
		l.Retire()
	}
}

// Flows is how many connections are open on all lanes.
func (s *spread) Flows() (n int) {
	all, _ := s.all()
	for _, l := range all {
		n += l.Flows()
	}
	return n
}

// DialContext dials on a lane, and on another if that has ended meanwhile.
func (s *spread) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	for {
		l := s.choose()
		conn, err := l.DialContext(ctx, network, address)
		last := l.Lane == s.Lane || !errors.Is(err, net.ErrClosed)
		s.mu.Lock()
		l.dialling--
		l.left = l.left || !last
		s.mu.Unlock()
		if last {
			return conn, err
		}
	}
}

// choose is where the next flow goes.
func (s *spread) choose() *lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	best := s.lanes[0]
	if s.ctx.Err() == nil {
		best = slices.MinFunc(s.lanes, func(a, b *lane) int { return cmp.Compare(a.load(), b.load()) })
	}
	best.dialling++
	best.used = true
	if best.load() < silent && s.few() {
		s.opening++
		s.wg.Go(s.open)
	}
	return best
}

// few tells whether there should be one more lane. mu is held.
func (s *spread) few() bool {
	if rtt := s.RTT(); s.rtt == 0 || rtt > 0 && rtt < s.rtt { // under load a sign of life takes longer
		s.rtt = rtt
	}
	flows, lanes := 0, len(s.lanes)+s.opening
	for _, l := range s.lanes {
		flows += l.Flows() + l.dialling
	}
	if s.failures > 0 && (s.opening > 0 || time.Now().Before(s.notBefore)) || s.ctx.Err() != nil {
		return false
	}
	return s.rtt >= farAway && flows > 1 && flows >= lanes && lanes < mostLanes
}

// open opens a lane, and follows it to its end. What comes too late it closes.
func (s *spread) open() {
	wire, err := s.attempt()
	l := s.opened(wire, err)
	switch {
	case err != nil:
	case l == nil:
		wire.Close()
		wire.Wait()
	default:
		began := time.Now()
		s.follow(l)
		s.ended(l, time.Since(began))
	}
}

func (s *spread) attempt() (Lane, error) {
	ctx, cancel := context.WithTimeout(s.ctx, laneLimit)
	defer cancel()
	return s.another(ctx)
}

func (s *spread) opened(wire Lane, err error) *lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opening--
	if err != nil {
		s.failed()
	}
	if err != nil || s.ctx.Err() != nil {
		return nil
	}
	l := &lane{Lane: wire}
	s.lanes = append(s.lanes, l)
	return l
}

// follow waits for the end of a lane, and retires it when nobody uses it.
func (s *spread) follow(l *lane) {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		l.Wait()
	}()
	t := time.NewTicker(laneIdle)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if s.unused(l) {
				l.Retire()
			}
		case <-gone:
			return
		}
	}
}

func (s *spread) unused(l *lane) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	unused := !l.used && l.dialling == 0 && l.Flows() == 0
	l.used = false
	l.left = l.left || unused
	return unused
}

func (s *spread) ended(l *lane, lived time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lanes = slices.DeleteFunc(s.lanes, func(other *lane) bool { return other == l })
	if lived > mostLaneBackoff {
		s.failures = 0
	}
	if !errors.Is(l.Wait(), net.ErrClosed) {
		s.failed()
	}
}

// failed puts the next attempt off; those that fail together do so once. mu is held.
func (s *spread) failed() {
	if now := time.Now(); now.After(s.notBefore) {
		s.notBefore = now.Add(backoff(s.failures, leastLaneBackoff, mostLaneBackoff, rand.Float64()))
		s.failures++
	}
}
