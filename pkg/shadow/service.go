package shadow

import (
	"context"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// A Service is what a router stands in for. Its states are package heal's.
type Service interface {
	Look(ctx context.Context) (state string, err error)
	Restore(ctx context.Context) error // nil, too, where there is nothing of ours
}

// A Workload is what a router stands in for, and was scaled to nothing.
type Workload interface {
	Restore(ctx context.Context) error // nil, too, where there is nothing of ours
}

const lookEvery = time.Second

// serviceState is what was last seen of the Service.
type serviceState struct {
	mu     sync.Mutex
	state  string
	failed bool          // to look at it, and said so
	again  chan struct{} // asks for a look at once
}

// told is what a laptop gets to hear. One that is told what it may be about to
// change, or to end for, is told the news next time.
func (v *serviceState) told() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state != heal.Ours {
		select {
		case v.again <- struct{}{}:
		default:
		}
	}
	return v.state
}

// seen notes the outcome of a look, and tells whether it is a new one.
func (v *serviceState) seen(state string, err error) (news bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		news, v.failed = !v.failed, true
		return news
	}
	news = v.failed || v.state != state
	v.failed, v.state = false, state
	return news
}

// watch looks at the Service every so often, until ctx ends.
func (s *Shadow) watch(ctx context.Context) error {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		s.look(ctx)
		s.refill(ctx)
		select {
		case <-t.C:
		case <-s.service.again:
		case <-ctx.Done():
			return nil
		}
	}
}

// look looks once. Somebody else's selector under our mark is what a deploy tool
// leaves that puts things back: it has its way, all of it.
func (s *Shadow) look(ctx context.Context) {
	state, err := s.cfg.Service.Look(ctx)
	if err == nil && state == heal.Mixed {
		s.cfg.Log.Warn("service was changed by somebody else, putting it back")
		if err = s.restore(ctx); err == nil {
			state = heal.PutBack
		}
	}
	if ctx.Err() != nil || !s.service.seen(state, err) {
		return
	}
	if err != nil {
		s.cfg.Log.Warn("service not seen, trying again", "err", err, "wait", lookEvery)
	} else {
		s.cfg.Log.Info("service", "state", state)
	}
}

// refill puts the workload back if who had it scaled to nothing is silent for too
// long, while others still hold the router: they did not ask for that.
func (s *Shadow) refill(ctx context.Context) {
	if s.cfg.Workload == nil {
		return
	}
	for _, c := range s.router.Claims() {
		if c.ID == s.cfg.For && !c.Silent {
			s.claimed.beat()
		}
	}
	if s.claimed.silence() < s.cfg.Grace {
		return
	}
	if err := s.cfg.Workload.Restore(ctx); err != nil {
		s.cfg.Log.Warn("workload not put back, trying again", "err", err, "wait", lookEvery)
		return
	}
	s.claimed.beat() // not at every look
}
