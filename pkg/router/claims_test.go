package router

import (
	"errors"
	"net/http"
	"net/url"
	"testing"
	"time"
)

func TestChoose(t *testing.T) {
	now := time.Now()
	on := func(id string, age time.Duration, m Match) *claim {
		matches, err := m.test()
		must(t, err)
		return &claim{Claim: Claim{ID: id, Since: now.Add(-age), Match: m, Routes: []string{"tcp/80"}}, matches: matches, to: refusing{}, life: &life{seen: now}}
	}
	with := func(c *claim, change func(*claim)) *claim { change(c); return c }
	dev := Header{"x-dev", exact, "a"}
	all := []*claim{
		on("whole", 2*time.Hour, Match{}),
		on("young", time.Minute, Match{Headers: []Header{dev}}),
		on("old", time.Hour, Match{Headers: []Header{{"x-dev", prefix, ""}}}),
		on("both", time.Second, Match{Headers: []Header{dev}, Path: "/api"}),
		with(on("mirror", time.Hour, Match{}), func(c *claim) { c.Mirror = true }),
		with(on("quiet mirror", time.Hour, Match{}), func(c *claim) { c.Mirror, c.seen = true, now.Add(-silence-1) }),
		with(on("silent", time.Hour, Match{Path: "/silent/and/long"}), func(c *claim) { c.seen = now.Add(-silence - 1) }),
		with(on("tired", time.Hour, Match{Path: "/tired"}), func(c *claim) { c.tired = true }),
		with(on("nobody", time.Hour, Match{Path: "/nobody"}), func(c *claim) { c.to = nil }),
		with(on("other port", 9*time.Hour, Match{Headers: []Header{dev, dev}}), func(c *claim) { c.Routes = []string{"tcp/81"} }),
	}
	for _, test := range []struct{ path, dev, want string }{
		{"/", "", "whole"},
		{"/", "a", "old"},
		{"/", "b", "old"},
		{"/api/x", "a", "both"},
		{"/api/x", "b", "old"},
		{"/silent/and/long", "", ""},
		{"/tired", "", ""},
		{"/nobody", "", ""},
	} {
		req := &http.Request{URL: &url.URL{Path: test.path}, Header: http.Header{}}
		if test.dev != "" {
			req.Header.Set("X-Dev", test.dev)
		}
		to := choose(all, now, "tcp/80", req)
		got := ""
		if to.claim != nil {
			got = to.claim.ID
		}
		if got != test.want || len(to.mirrors) != 1 {
			t.Errorf("%s with %q goes to %q and %d mirrors, want %q", test.path, test.dev, got, len(to.mirrors), test.want)
		}
	}
	if to := choose(all, now, "tcp/80", nil); to.claim == nil || to.claim.ID != "whole" {
		t.Errorf("raw goes to %v", to)
	}
	if to := choose(all[1:], now, "tcp/80", nil); to.claim != nil {
		t.Errorf("raw goes to %v without a whole claim", to)
	}
}

func TestPut(t *testing.T) {
	r := New(Config{Routes: []Route{{Network: "tcp", Port: 80}, {Network: "udp", Port: 53}}})
	dev := Match{Headers: []Header{{"X-Dev", exact, "a"}, {"X-B", prefix, "b"}}}
	same := Match{Headers: []Header{{"x-b", prefix, "b"}, {"x-dev", exact, "a"}}}
	claim := func(id string, m Match, routes ...string) Claim {
		return Claim{ID: id, Holder: id + "@laptop", Match: m, Routes: routes}
	}
	must(t, r.Put(claim("ann", dev, "tcp/80"), refusing{}, false))
	must(t, r.Put(claim("bob", Match{}, "tcp/80", "udp/53"), refusing{}, false))
	var held *HeldError
	if err := r.Put(claim("eve", same, "tcp/80"), refusing{}, false); !errors.As(err, &held) || held.Holder != "ann@laptop" {
		t.Errorf("the same match again: %v", err)
	}
	must(t, r.Put(claim("ann", dev, "tcp/80"), refusing{}, false)) // a new wire
	must(t, r.Put(Claim{ID: "copy", Match: dev, Mirror: true, Routes: []string{"tcp/80"}}, refusing{}, false))
	must(t, r.Put(claim("dns", dev, "udp/53"), nil, false))
	for _, bad := range []Claim{claim("x", dev, "tcp/81"), claim("x", dev), claim("", dev, "tcp/80"),
		claim("x", Match{Headers: []Header{{"X-Dev", regex, "("}}}, "tcp/80"), claim("x", Match{Headers: []Header{{"X-Dev", "like", "a"}}}, "tcp/80"), claim("x", Match{Headers: []Header{{"X Dev", exact, "a"}}}, "tcp/80")} {
		if err := r.Put(bad, refusing{}, true); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	must(t, r.Put(claim("eve", same, "tcp/80"), refusing{}, true))
	if _, ok := r.Seen("ann"); ok {
		t.Error("a claim lives that was taken over")
	}
	if s, ok := r.Seen("dns"); !ok || !s.Silent {
		t.Errorf("%+v: a claim without a laptop is silent", s)
	}
	for i, id := range []string{"copy", "bob", "dns", "eve"} {
		if last, ok := r.Drop(id); !ok || last != (i == 3) {
			t.Errorf("drop %s: last %v, ok %v", id, last, ok)
		}
	}
	if _, ok := r.Drop("eve"); ok {
		t.Error("dropped twice")
	}
	if err := r.Put(claim("eve", same, "tcp/80"), refusing{}, true); !errors.Is(err, ErrClosing) {
		t.Errorf("a claim on a closing router: %v", err)
	}
}

func TestGrace(t *testing.T) {
	c := newClaims([]Route{web80("")}, time.Minute)
	must(t, c.put(Claim{ID: "ann", Routes: []string{"tcp/80"}}, refusing{}, false))
	c.find("ann").seen = time.Now().Add(-59 * time.Second)
	c.look()
	if len(c.list()) != 1 {
		t.Error("dropped within the grace time")
	}
	c.find("ann").seen = time.Now().Add(-61 * time.Second)
	changed := c.changes()
	c.look()
	if len(c.list()) != 0 || c.closed() {
		t.Error("not dropped after the grace time, or closing without a word")
	}
	<-changed
}
