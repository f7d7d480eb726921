package channel

import (
	"context"
	"math/rand/v2"
	"time"
)

// betterMost is how many BetterEvery there are at most between two attempts, and how
// long a better wire has to live not to count as a failed one.
const betterMost = 10

// seek tries to open a better wire than w until ctx ends. What it finds too late it
// closes.
func (k *Keep) seek(ctx context.Context, w *keptWire) <-chan Channel {
	if k.cfg.Better == nil || w.from == better {
		return nil
	}
	k.forgive()
	found := make(chan Channel)
	k.wg.Go(func() {
		for {
			if wait(ctx, k.nextSeek()); ctx.Err() != nil {
				return
			}
			k.seekLater()
			ch, err := k.open(ctx, k.cfg.BetterTimeout, k.cfg.Better)
			if err != nil {
				k.noBetter(ctx, err)
				continue
			}
			select {
			case found <- ch:
			case <-ctx.Done():
				ch.Close()
				ch.Wait()
			}
			return
		}
	})
	return found
}

// forgive forgets the attempts in vain before a better wire that was a good one.
func (k *Keep) forgive() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.found.IsZero() && time.Since(k.found) > betterMost*k.cfg.BetterEvery {
		k.sought, k.seekAt = 0, time.Time{}
	}
	k.found = time.Time{}
}

func (k *Keep) nextSeek() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return time.Until(k.seekAt)
}

func (k *Keep) seekLater() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.seekAt = time.Now().Add(backoff(k.sought, k.cfg.BetterEvery, betterMost*k.cfg.BetterEvery, rand.Float64()))
	k.sought++
}

// noBetter notes why there is no better wire.
func (k *Keep) noBetter(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // the present one is gone
	}
	k.mu.Lock()
	k.state.NoBetter = err
	k.mu.Unlock()
	k.cfg.Log.Debug("no better wire", "err", err)
}
