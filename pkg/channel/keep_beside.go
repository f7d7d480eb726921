package channel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"
)

// Silent is a Channel that notices when nothing comes any more.
type Silent interface {
	Channel

	// Silence is how long nothing came from the other end, which shows that it
	// lives more often than that.
	Silence() time.Duration

	// Retire closes the wire as soon as nothing is open on it.
	Retire()
}

// successor waits until w is gone, or was silent or is to be renewed and another wire
// is open beside it, or a better one is. The error says that w leads nowhere any more.
func (k *Keep) successor(ctx context.Context, w *keptWire) (Channel, origin, error) {
	s, ok := w.Channel.(Silent)
	if !ok {
		return nil, opened, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	found := k.seek(ctx, w)
	old := k.tooOld(w, k.cfg.Age)
	for {
		var silent <-chan time.Time
		var aged <-chan struct{}
		if k.cfg.Beside != nil {
			silent, aged = time.After(k.cfg.Silence-s.Silence()), w.aging.Done()
		}
		select {
		case ch := <-found:
			return ch, better, nil
		case <-old: // one attempt, and another much later: nothing is wrong yet
			if ch, err := k.open(ctx, k.cfg.BesideTimeout, k.cfg.Beside); err == nil {
				return ch, renewed, nil
			}
			old = k.tooOld(w, k.cfg.Age/20)
			continue
		case <-silent:
		case <-aged:
		case <-w.gone:
			return nil, opened, nil
		}
		if !k.wanting(w, s) {
			continue
		}
		if ch, from, err := k.attempts(ctx, w, s, found); ch != nil || err != nil {
			return ch, from, err
		}
	}
}

// tooOld fires when w is, which is after so long; never where that is not wanted.
func (k *Keep) tooOld(w *keptWire, after time.Duration) <-chan time.Time {
	if after <= 0 || k.cfg.Beside == nil || w.from == better {
		return nil
	}
	return time.After(after)
}

// wanting tells whether another wire is wanted beside w.
func (k *Keep) wanting(w *keptWire, s Silent) bool {
	return w.aging.Err() != nil || s.Silence() >= k.cfg.Silence
}

// attempts tries to open another wire until w is heard again, or gone, or a better one
// is found.
func (k *Keep) attempts(ctx context.Context, w *keptWire, s Silent, found <-chan Channel) (Channel, origin, error) {
	if w.aging.Err() == nil {
		k.fell(fmt.Errorf("no sign of life for %v", k.cfg.Silence))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var one Channel
	looking := make(chan struct{})
	k.wg.Go(func() {
		defer close(looking)
		defer cancel()
		for ctx.Err() == nil && k.wanting(w, s) {
			select {
			case one = <-found:
				return
			case <-time.After(k.cfg.Silence / 30):
			case <-w.gone:
				return
			case <-ctx.Done():
			}
		}
	})
	ch, err := k.openBeside(ctx, s)
	cancel()
	<-looking
	if one == nil {
		return ch, opened, err
	}
	if ch != nil {
		ch.Close()
		ch.Wait()
	}
	return one, better, nil
}

// openBeside tries until ctx ends, or nothing is there any more where s leads to in
// silence, which it tells. No attempt lasts: what TCP has said in vain it says again later
// and later.
func (k *Keep) openBeside(ctx context.Context, s Silent) (Channel, error) {
	for ctx.Err() == nil {
		ch, err := k.open(ctx, k.cfg.BesideTimeout, k.cfg.Beside)
		if err == nil {
			return ch, nil
		}
		if errors.Is(err, net.ErrClosed) && ctx.Err() == nil && s.Silence() >= k.cfg.Silence {
			return nil, err
		}
		k.cfg.Log.Debug("no wire beside the silent one", "err", err)
		wait(ctx, backoff(0, k.cfg.MinBackoff, k.cfg.MaxBackoff, rand.Float64()))
	}
	return nil, nil
}

// fell notes that the present wire is silent.
func (k *Keep) fell(err error) {
	k.mu.Lock()
	k.state.Err = err
	k.mu.Unlock()
	k.cfg.Log.Warn("wire silent", "err", err)
}
