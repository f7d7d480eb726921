package wgchan

import (
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

// BenchmarkWire relays only where there is a delay.
func BenchmarkWire(b *testing.B) {
	wiretest.BenchSites(b, func(t testing.TB, beats wiretest.Beats, w wiretest.Way, n channel.Network) wiretest.Site {
		if w.Delay == 0 {
			return direct(t, n)
		}
		return newSite(t, beats, w, n)
	})
}
