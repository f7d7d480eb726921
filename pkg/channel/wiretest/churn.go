package wiretest

import (
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// testChurn: 10,000 flows come and go, ended in every way, and leave nothing.
func testChurn(t *testing.T, sites NewSite) {
	const flows, atOnce = 10_000, 64
	network := &memchan.Network{}
	l, err := network.Listen(t.Context(), "tcp", echoAt)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go echoAll(l)
	wire := reach(t, sites, Beats{}, Way{}, network)
	churn := func(n int) {
		var workers sync.WaitGroup
		for w := range atOnce {
			workers.Go(func() {
				for i := w; i < n && !t.Failed(); i += atOnce {
					c := dialEcho(t, wire)
					end(c, i)
				}
			})
		}
		workers.Wait()
	}
	churn(flows / 10) // buffers that stay are made
	goroutines, heap := settled()
	churn(flows)
	after, grown := settled()
	for end := time.Now().Add(10 * time.Second); grown > heap+8<<20 && time.Now().Before(end); after, grown = settled() {
		time.Sleep(500 * time.Millisecond) // TCP remembers what is closed for a while
	}
	if after > goroutines+atOnce || grown > heap+8<<20 {
		t.Errorf("%d goroutines before, %d after; %d KiB, %d after", goroutines, after, heap>>10, grown>>10)
	}
}

// end ends a flow in one way of several.
func end(c net.Conn, how int) {
	switch how % 3 {
	case 0:
		relay.Abort(c, syscall.ECONNRESET)
	case 1:
		c.(interface{ CloseWrite() error }).CloseWrite()
	}
	c.Close()
}

// settled is what there is when the ends of flows have crossed the wire.
func settled() (goroutines int, heap uint64) {
	for last := 0; ; time.Sleep(100 * time.Millisecond) {
		runtime.GC()
		if goroutines = runtime.NumGoroutine(); goroutines == last {
			break
		}
		last = goroutines
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return goroutines, m.HeapAlloc
}
