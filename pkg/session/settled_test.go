package session

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// What changes all the time is followed all the same, and a failure again.
func TestSettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		changed, ended := make(chan struct{}, 1), make(chan error)
		var followed atomic.Int32
		var fails atomic.Bool
		go func() { ended <- settled(ctx, changed, func() bool { followed.Add(1); return !fails.Load() }) }()
		tell := func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		for range 100 {
			tell()
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		if n := followed.Load(); n < 4 || n > 5 {
			t.Errorf("followed %d times in a second of changes", n)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		was := followed.Load()
		fails.Store(true)
		tell()
		time.Sleep(settleTime + settleAgain + time.Millisecond)
		synctest.Wait()
		if n := followed.Load() - was; n != 2 {
			t.Errorf("followed %d times after a failure, want 2", n)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
