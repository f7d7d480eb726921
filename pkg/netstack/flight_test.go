package netstack

import (
	"testing"
	"time"
)

// A path is filled, and what is on its way beyond that stays below what its ends take.
func TestFlight(t *testing.T) {
	for _, path := range []struct {
		rtt   time.Duration
		rate  float64 // bytes/s
		flows int
	}{
		{0, 400e6, 1}, {0, 400e6, 8}, {20 * time.Millisecond, 100e6, 1}, {20 * time.Millisecond, 100e6, 8},
		{80 * time.Millisecond, 40e6, 1}, {80 * time.Millisecond, 100e6, 8}, {200 * time.Millisecond, 1e6, 3},
	} {
		f := newFlight()
		f.writing.Store(int64(path.flows))
		rtt := max(path.rtt, leastRTT)
		var now time.Duration
		var all int64
		for now < 20*time.Second {
			all = f.share(now, path.rtt) * int64(path.flows)
			// What is acknowledged is as much as the path takes, if so much is on its way.
			epoch := time.Duration(f.ends.Load()) - now
			f.bytes.Add(int64(min(path.rate, float64(all)/rtt.Seconds()) * epoch.Seconds()))
			now += epoch
		}
		holds := path.rate * rtt.Seconds()
		if float64(all) < holds || float64(all) > flightGain*holds+2.5*flightSlack {
			t.Errorf("%+v: %.1f MB on their way, the path holds %.1f", path, float64(all)/1e6, holds/1e6)
		}
	}
}

// Who waits for the path shares it with others who do, and a round trip that isn't known
// yet is none.
func TestFlightShares(t *testing.T) {
	f := newFlight()
	f.share(0, 0)
	if got := f.share(time.Second, 100*time.Millisecond); f.rtt != 100*time.Millisecond || got != flightSlack {
		t.Errorf("%v, %d", f.rtt, got)
	}
	f.writing.Store(4)
	if got := f.share(time.Second, 0); got != flightSlack/4 {
		t.Errorf("one of four has %d", got)
	}
	f.writing.Store(1000)
	if got := f.share(time.Second, 0); got != leastSend {
		t.Errorf("one of many has %d", got)
	}
}
