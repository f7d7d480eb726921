package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
)

// What an exchange costs: one Service in front of the same pods as it is, with
// its requests going through a router to the original, and to the laptop. Run
// it by "make bench".
func BenchmarkExchange(b *testing.B) {
	laptopApp(b, laptopName, 0)
	apply(b, another("app-bench"))
	b.Cleanup(func() { kubectl(b, "delete", "svc", "-n", namespace, "app-bench") })
	comes(b, "original", serviceIP(b, "app-bench"))
	direct := measured(b, "original", serviceIP(b, "app-bench"))
	header := exchange(b, "svc/app-bench", "--to", "8080", "--header", "x-dev: mine")
	comes(b, laptopName, "-H", "x-dev: mine", serviceIP(b, "app-bench"))
	through := measured(b, "original", serviceIP(b, "app-bench"))
	exchanged := measured(b, laptopName, serviceIP(b, "app-bench"), "-H", "x-dev: mine")
	header.stop()

	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 1, ' ', 0)
	fmt.Fprint(w, "| \t| direct\t| router to original\t| router to laptop\t|\n| ---\t| ---\t| ---\t| ---\t|\n")
	for i, m := range measures {
		a, o, l := m.of(direct[i]), m.of(through[i]), m.of(exchanged[i])
		fmt.Fprintf(w, "| %s, %s\t| %.5g\t| %.5g ×%.2f\t| %.5g ×%.2f\t|\n", m.name, m.unit, a, o, o/a, l, l/a)
		b.ReportMetric(o/a, m.metric+"-original-ratio")
		b.ReportMetric(l/a, m.metric+"-laptop-ratio")
	}
	w.Flush()
	b.Logf("**an exchange**; ×: of the Service without culvert\n%s", strings.TrimSpace(table.String()))
}

// A measure is one number of one load.
type measure struct {
	name, unit, metric string
	load               []string
	path               string
	of                 func(loadOutcome) float64
}

func perSecond(o loadOutcome) float64 { return float64(o.Requests) / o.Seconds }
func megabytes(o loadOutcome) float64 { return float64(o.Bytes) / o.Seconds / 1e6 }
func median50(o loadOutcome) float64  { return o.P50ms }
func slowest99(o loadOutcome) float64 { return o.P99ms }

var measures = []measure{
	{"GET, 1 client, p50", "ms", "get-p50", []string{"-c", "1"}, "/ready", median50},
	{"GET, 1 client, p99", "ms", "get-p99", []string{"-c", "1"}, "/ready", slowest99},
	{"GET, 16 clients", "/s", "get", []string{"-c", "16"}, "/ready", perSecond},
	{"GET, h2c, 16 clients", "/s", "h2c", []string{"-c", "16", "-h2"}, "/ready", perSecond},
	{"GET, new connections, 4 clients", "/s", "connect", []string{"-c", "4", "-close"}, "/ready", perSecond},
	{"1 MB bodies, 2 clients", "MB/s", "bodies", []string{"-c", "2"}, "/download?bytes=1000000", megabytes},
}

// measured runs every load, and wants all of it answered by one.
func measured(b *testing.B, by, ip string, flags ...string) (all []loadOutcome) {
	b.Helper()
	for _, m := range measures {
		o := kitInPod[loadOutcome](b, slices.Concat([]string{"load", "-d", "3s"}, m.load, flags, []string{"http://" + ip + m.path})...)
		if o.Failures > 0 || o.By[by] != o.Requests || o.Requests == 0 {
			b.Fatalf("%s: want all by %s: %+v", m.name, by, o)
		}
		all = append(all, o)
	}
	return all
}
