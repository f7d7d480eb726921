package shadow

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/router"
)

// A router that ends must not end before its last connection: after the Service
// is put back, or the pod was told to end, the cluster takes a while until it
// sends nothing here any more.
const (
	drainLimit = 30 * time.Second // for what is open then

	begun      = time.Second      // to connect, when what led here was taken away
	quiet      = 2 * time.Second  // nothing came for so long: nothing comes any more
	moveLimit  = 8 * time.Second  // for laptops to go to the next pod when this one is told to end
	wireLimit  = 5 * time.Second  // for what they are answering then
	leaveLimit = 25 * time.Second // in all; a pod has 30 s
)

// arrivals is the network of a router, that notes when a connection came last.
type arrivals struct {
	channel.Network
	pulse *pulse // of the last one
}

func (a *arrivals) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := a.Network.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &arrivalListener{l, a}, nil
}

type arrivalListener struct {
	net.Listener
	of *arrivals
}

func (l *arrivalListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.of.pulse.beat()
	}
	return c, err
}

// route runs the router.
func (s *Shadow) route(ctx context.Context) error {
	if err := s.router.Run(ctx); ctx.Err() == nil {
		return err
	}
	return nil
}

// putBack puts the Service back, and waits until nothing comes here any more. It
// gives up as heal does. A Service that was made for the router goes with it: there
// is only what is open to wait for.
func (s *Shadow) putBack(ctx context.Context) bool {
	if s.router == nil {
		return true
	}
	if s.cfg.Service == nil {
		limit, cancel := context.WithTimeout(ctx, drainLimit)
		defer cancel()
		s.cut(s.router.Drain(limit))
		return ctx.Err() == nil
	}
	s.lapsing.Store(true)
	if !s.heal(ctx, s.restore) {
		s.lapsing.Store(false)
		return false
	}
	s.outlast(ctx)
	return ctx.Err() == nil
}

// outlast goes on until nobody can mean the router any more, now that its Service is
// put back.
func (s *Shadow) outlast(ctx context.Context) {
	linger := s.linger()
	limit, cancel := context.WithTimeout(ctx, linger+heal.HeardOf+drainLimit)
	defer cancel()
	s.cut(s.drained(limit, heal.HeardOf, linger))
}

// restore gives back all that the router took, the workload first: a Service
// without pods helps nobody.
func (s *Shadow) restore(ctx context.Context) error {
	if s.cfg.Workload != nil {
		if err := s.cfg.Workload.Restore(ctx); err != nil {
			return err
		}
	}
	return s.cfg.Service.Restore(ctx)
}

// cut tells of what was not waited for any longer.
func (s *Shadow) cut(open int) {
	if open > 0 {
		s.cfg.Log.Warn("connections are still open and will be cut", "open", open)
	}
}

// drained waits for at least some time, and until nothing is open and nothing has
// come for a while, or ctx ends; it returns what is open then.
func (s *Shadow) drained(ctx context.Context, quiet, least time.Duration) (open int) {
	s.arrival.pulse.beat() // the first may just be on its way
	for end := time.Now().Add(least); ; {
		if open = s.router.Drain(ctx); open > 0 {
			return open
		}
		left := max(quiet-s.arrival.pulse.silence(), time.Until(end))
		if left <= 0 {
			return 0
		}
		if !pause(ctx, left) {
			return s.router.Drain(ctx) // what came meanwhile
		}
	}
}

// untilEnded waits for a laptop to have ended the router, which is over then when
// the laptop has heard so, and the names that led here have been forgotten.
func (s *Shadow) untilEnded(ctx context.Context) error {
	select {
	case <-s.ended:
	case <-ctx.Done():
		return nil
	}
	hung, cancel := context.WithTimeout(ctx, wireLimit)
	defer cancel()
	for s.door.wires.Load() > 0 && pause(hung, 50*time.Millisecond) {
	}
	if s.cfg.TTL != nil {
		s.outlast(ctx)
	} else {
		limit, cancel := context.WithTimeout(ctx, wireLimit)
		defer cancel()
		s.cut(s.drained(limit, begun, 0))
	}
	if !s.heal(ctx, s.cfg.Heal) {
		return nil
	}
	return errLapsed
}

// leave waits for ctx, upon which the pod is to end. Laptops see that when they look
// at their claims, and go to the next pod as soon as there is one; clients are asked
// to connect anew. Then, and until nothing comes any more, which may be the whole time
// where the cluster has no other pod, everything goes to the original.
func (s *Shadow) leave(ctx, life context.Context, hangUp func()) error {
	select {
	case <-ctx.Done():
	case <-life.Done():
		return nil
	}
	s.leaving.Store(true)
	s.cfg.Log.Info("told to end", "limit", leaveLimit)
	limit, cancel := context.WithTimeout(life, leaveLimit)
	s.router.Part()
	s.moved(limit)
	var released sync.WaitGroup
	defer released.Wait()
	defer cancel()
	released.Go(func() { s.release(limit, hangUp) })
	s.cut(s.drained(limit, quiet, 0))
	return errLeft
}

// moved waits until no laptop that lives has a claim here, but not for ever.
func (s *Shadow) moved(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, moveLimit)
	defer cancel()
	lives := func(c router.ClaimStatus) bool { return !c.Silent }
	for s.door.wires.Load() > 0 && slices.ContainsFunc(s.router.Claims(), lives) && pause(ctx, 50*time.Millisecond) {
	}
}

// release ends the wires when the laptops have answered what they had begun to:
// they go to the next pod.
func (s *Shadow) release(ctx context.Context, hangUp func()) {
	defer hangUp()
	ctx, cancel := context.WithTimeout(ctx, wireLimit)
	defer cancel()
	for s.answering() && pause(ctx, 50*time.Millisecond) {
	}
}

// answering tells whether a laptop still has something to answer.
func (s *Shadow) answering() bool {
	for _, c := range s.router.Claims() {
		if c.Open > 0 {
			return true
		}
	}
	return false
}
