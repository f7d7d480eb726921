package channel

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// brief is a wire to this very machine.
type brief struct {
	Host
	once sync.Once
	gone chan struct{}
}

func (b *brief) Wait() error { <-b.gone; return net.ErrClosed }

func (b *brief) Close() error {
	b.once.Do(func() { close(b.gone) })
	return nil
}

// TestOnState: it hears of changes, not of attempts.
func TestOnState(t *testing.T) {
	defer goleak.VerifyNone(t)
	attempts := 0
	states := make(chan KeepState, 100)
	k := NewKeep(KeepConfig{
		MinBackoff: time.Microsecond, MaxBackoff: time.Microsecond,
		OnState: func(s KeepState) { states <- s },
		Open: func(context.Context) (Channel, error) {
			if attempts++; attempts%5 != 0 {
				return nil, errors.New("not yet")
			}
			w := &brief{gone: make(chan struct{})}
			if attempts < 15 {
				w.Close()
			}
			return w, nil
		},
	})
	go k.Run(context.Background())
	for i := range 5 {
		if s := <-states; s.Up != (i%2 == 0) || s.Reopened != i/2 {
			t.Errorf("state %d is %+v", i, s)
		}
	}
	k.Close()
	k.Wait()
	if len(states) > 0 {
		t.Errorf("after Close %+v", <-states)
	}
}

func TestBackoff(t *testing.T) {
	const least, most = 200 * time.Millisecond, 5 * time.Second
	for failures, want := range map[int]time.Duration{
		0: least, 1: 2 * least, 4: 16 * least, 5: most, 29: most, 1000: most,
	} {
		if d := backoff(failures, least, most, 0); d != want/2 {
			t.Errorf("after %d failures at least %v, want %v", failures, d, want/2)
		}
		if d := backoff(failures, least, most, 1); d != want {
			t.Errorf("after %d failures at most %v, want %v", failures, d, want)
		}
	}
}
