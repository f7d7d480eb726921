//go:build !race

package tlschan

import (
	"context"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

// ended is a Network whose connections have ended when they are there.
type ended struct{ channel.Host }

func (ended) DialContext(context.Context, string, string) (net.Conn, error) {
	a, b := net.Pipe()
	b.Close()
	return a, nil
}

// TestComeAndGone: 100,000 flows leave nothing behind, at either end. Under the race
// detector, where that takes a minute and memory is no measure, churn has to do.
func TestComeAndGone(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
	e := ends(t, wiretest.Beats{})
	a, b := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- e.Serve(t.Context(), b, &ended{}) }()
	ch, err := e.Dial(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	comeAndGo(t, ch, 10_000) // pools are filled, and what grows by doubling has grown
	goroutines, before := atRest(t, ch)
	comeAndGo(t, ch, 100_000)
	left, after := atRest(t, ch)
	if left > goroutines || after > before+1<<20 {
		t.Errorf("%d goroutines before, %d after; %d KiB, %d after", goroutines, left, before>>10, after>>10)
	}
	t.Logf("%d KiB before, %d after", before>>10, after>>10)
	ch.Close()
	ch.Wait()
	<-served
}

// comeAndGo opens and closes flows, many at once.
func comeAndGo(t *testing.T, ch channel.Channel, flows int) {
	const atOnce = 64
	var all sync.WaitGroup
	for range atOnce {
		all.Go(func() {
			for range flows / atOnce {
				c, err := ch.DialContext(t.Context(), "tcp", "web:80")
				if err != nil {
					t.Error(err)
					return
				}
				c.Close()
			}
		})
	}
	all.Wait()
}

// atRest is what there is when the ends of all flows have crossed the wire: memory
// in use, and goroutines.
func atRest(t *testing.T, ch channel.Channel) (goroutines int, memory uint64) {
	t.Helper()
	comeAndGo(t, ch, 64)
	for last := -1; goroutines != last; time.Sleep(100 * time.Millisecond) {
		last = goroutines
		runtime.GC()
		goroutines = runtime.NumGoroutine()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return goroutines, m.HeapAlloc + m.StackInuse
}
