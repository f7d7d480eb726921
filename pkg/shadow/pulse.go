package shadow

import (
	"context"
	"sync/atomic"
	"time"
)

// A pulse is how long ago the laptop last showed that it lives: by its wire, or
// by a claim where the shadow is a router. Who only looks at one has a wire, too.
type pulse struct {
	began time.Time
	last  atomic.Int64 // nanoseconds since began, by the monotonic clock
}

func newPulse() *pulse { return &pulse{began: time.Now()} }

func (p *pulse) age() time.Duration { return time.Since(p.began) }

func (p *pulse) beat() { p.last.Store(int64(p.age())) }

func (p *pulse) silence() time.Duration { return p.age() - time.Duration(p.last.Load()) }

// stops waits for a silence of that length. It tells false when ctx ended first.
func (p *pulse) stops(ctx context.Context, grace time.Duration) bool {
	for {
		left := grace - p.silence()
		if left <= 0 {
			return ctx.Err() == nil
		}
		if !pause(ctx, left) {
			return false
		}
	}
}
