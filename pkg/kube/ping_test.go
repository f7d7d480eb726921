package kube

import (
	"net/http"
	"testing"
	"time"
)

func TestPing(t *testing.T) {
	var date []string
	c := apiServer(t, func(w http.ResponseWriter, _ *http.Request) { w.Header()["Date"] = date })
	for _, off := range []time.Duration{0, -time.Hour, time.Hour} {
		date = []string{time.Now().Add(off).UTC().Format(http.TimeFormat)}
		p, err := c.Ping(t.Context())
		if err != nil || !p.Dated || p.RTT <= 0 || (p.Ahead-off).Abs() > 2*time.Second {
			t.Errorf("%v off: %+v, %v", off, p, err)
		}
	}
	date = nil
	if p, err := c.Ping(t.Context()); err != nil || p.Dated {
		t.Errorf("without a date: %+v, %v", p, err)
	}
}

// A second is what a Date may lack.
func TestAhead(t *testing.T) {
	date := time.Unix(1000, 0)
	for now, want := range map[time.Duration]time.Duration{
		0: 0, 999 * time.Millisecond: 0, 1500 * time.Millisecond: -500 * time.Millisecond, -2 * time.Second: 2 * time.Second,
	} {
		if got := ahead(date, date.Add(now)); got != want {
			t.Errorf("%v after: %v, want %v", now, got, want)
		}
	}
}
