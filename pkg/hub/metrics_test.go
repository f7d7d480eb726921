//go:build unix

package hub

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// scraped is what Prometheus is told, by name and labels.
func (y *yard) scraped(h *Hub) map[string]float64 {
	y.t.Helper()
	w := httptest.NewRecorder()
	h.Metrics().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	all := map[string]float64{}
	for line := range strings.Lines(w.Body.String()) {
		if m := regexp.MustCompile(`^(culvert_hub_\S+) (\S+)\n$`).FindStringSubmatch(line); m != nil {
			all[strings.TrimPrefix(m[1], "culvert_hub_")] = must(strconv.ParseFloat(m[2], 64))(y.t)
		}
	}
	return all
}

// What goes on at a hub is what Prometheus is told of it, and no name is among it.
func TestMetrics(t *testing.T) {
	y := newYard(t, map[string]string{
		"one": `permitlisten="db-01:22"`, "two": `permitlisten="db-0*:22"`, "ci": `permitopen="db-*:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:22",permitopen="db-09:22"`,
	})
	first := y.hub
	y.oneMore()
	y.hub = first
	wants := func(what string, want map[string]float64) {
		t.Helper()
		var missing string
		defer func() {
			if t.Failed() {
				t.Log(missing)
			}
		}()
		y.await(what, func() bool {
			got := y.scraped(y.hub)
			for name, n := range want {
				if got[name] != n {
					missing = fmt.Sprintf("%s: %s is %v, want %v", what, name, got[name], n)
					return false
				}
			}
			return true
		})
	}
	attached := y.attach("one", "x", "db-01:22:127.0.0.1:"+y.sshd)
	var turn atomic.Int64
	said := y.agent("two", "db-02", func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+y.ports[turn.Add(1)%2])
	}, "22="+y.sshd)
	y.await("an agent, too", func() bool { return strings.Contains(said.String(), "offered as db-02") })
	wants("who is there", map[string]float64{
		`wires{kind="ssh"}`: 1, `wires{kind="tls"}`: 1, `wires{kind="peer"}`: 1, "hosts": 2, "streams": 0, "peers": 1, "peers_up": 1, "rights_good": 1,
		`events_total{event="attach",verdict="attached"}`: 2,
	})
	y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	y.fails(y.proxied("nc -X connect -x HUB %h %p", "db-02"), "403")
	y.fails(y.proxied("nc -X connect -x HUB %h %p", "db-09"), "404")
	y.fails(y.ssh("-N", "-i", y.path("two"), "-R", "db-01:22:127.0.0.1:1", "x@hub"), "remote port forwarding failed")
	y.fails(y.ssh("-i", y.path("login"), "-N", "hub"), "Permission denied")
	wants("what came of it", map[string]float64{
		`events_total{event="open",verdict="opened"}`: 1, `events_total{event="open",verdict="forbidden"}`: 1, `events_total{event="open",verdict="away"}`: 1,
		`events_total{event="attach",verdict="taken"}`: 1, `events_total{event="login",verdict="forbidden"}`: 1, "dial_seconds_count": 1, "streams": 0, "strangers": 0,
	})
	if got := y.scraped(y.hub); got[`events_total{event="login",verdict="admitted"}`] < 2 || got[`bytes_total{host="from"}`] < 1000 || got[`bytes_total{host="to"}`] < 1000 {
		t.Errorf("%v", got)
	}
	before := y.scraped(y.hub)["rights_read_timestamp_seconds"]
	y.hub.RightsRead(errors.New("line 1"))
	wants("the rights are wrong", map[string]float64{"rights_good": 0, "rights_read_timestamp_seconds": before})
	y.hub.RightsRead(nil)
	wants("and right", map[string]float64{"rights_good": 1})
	_ = attached.Process.Kill()
	wants("a host has gone", map[string]float64{`wires{kind="ssh"}`: 0, "hosts": 1})
	for name := range y.scraped(y.hub) {
		if strings.Contains(name, "db-0") || strings.Contains(name, "SHA256") {
			t.Errorf("%s is a label", name)
		}
	}
}
