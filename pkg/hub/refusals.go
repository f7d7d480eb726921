package hub

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// refusals bounds what the audit log gets of strangers that are refused: anybody who reaches the
// port can be, as often as he likes. Of each source some are written, of the others how many they
// were. Beyond so many sources all others are one.
type refusals struct {
	mu     sync.Mutex
	of     map[netip.Prefix]*refusal
	others refusal // the zero value is a full one
}

// refusal is what a source has left.
type refusal struct {
	lines     *rate.Limiter
	unwritten int
}

const (
	refusalLines   = 10 // of one source at once, and then a minute
	refusalSources = 256
	refusalsTold   = time.Minute // how often it is told what was not written
	refusalText    = 256         // bytes of each thing that a stranger says in a line
)

// source is an address, or the network of IPv6 that one machine has all of.
func source(from netip.Addr) netip.Prefix {
	if from.Is6() && !from.Is4In6() {
		return netip.PrefixFrom(from.WithZone(""), 64).Masked()
	}
	return netip.PrefixFrom(from, from.BitLen())
}

// take tells whether a line may be written; one that may not is counted.
func (r *refusals) take(from netip.Addr, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.at(source(from))
	if one.lines == nil {
		one.lines = rate.NewLimiter(refusalLines/rate.Limit(time.Minute.Seconds()), refusalLines)
	}
	if one.lines.AllowN(now, 1) {
		return true
	}
	one.unwritten++
	return false
}

// at is that of a source. mu is held.
func (r *refusals) at(from netip.Prefix) *refusal {
	if r.of == nil {
		r.of = map[netip.Prefix]*refusal{}
	}
	one := r.of[from]
	if one == nil && len(r.of) >= refusalSources {
		return &r.others
	}
	if one == nil {
		one = &refusal{}
		r.of[from] = one
	}
	return one
}

// untold is what was not written since it was asked last, by source. Who may write as much as at
// first is forgotten.
func (r *refusals) untold(now time.Time) map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[string]int{}
	tell := func(from string, one *refusal) {
		if one.unwritten > 0 {
			all[from], one.unwritten = one.unwritten, 0
		}
	}
	for from, one := range r.of {
		name := from.String()
		if from.IsSingleIP() {
			name = from.Addr().String()
		}
		tell(name, one)
	}
	tell("others", &r.others)
	maps.DeleteFunc(r.of, func(_ netip.Prefix, one *refusal) bool { return one.lines.TokensAt(now) >= refusalLines })
	return all
}

// tellRefusals writes how many refusals were not written. Each is in the metrics all the same.
func (h *Hub) tellRefusals() {
	for from, n := range h.refusals.untold(time.Now()) {
		h.cfg.Audit.LogAttrs(context.Background(), slog.LevelInfo, "audit",
			slog.String("event", "refusals"), slog.String("from", from), slog.String("verdict", "unwritten"), slog.Int("count", n))
	}
}

// tellRefusalsNow does until ctx ends.
func (h *Hub) tellRefusalsNow(ctx context.Context) error {
	t := time.NewTicker(refusalsTold)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			h.tellRefusals()
		}
	}
}

// auditStranger is audit for who is not known, or wants to be: when he is refused, that is written
// if he has lines left.
func (h *Hub) auditStranger(g *Guest, what, network, address string) *record {
	r := h.audit(g, what, network, address)
	r.spares = func() bool { return !h.refusals.take(g.From, time.Now()) }
	return r
}

// clipped are attrs whose texts are not longer than a line is to have of them.
func clipped(attrs []slog.Attr) []slog.Attr {
	for i, a := range attrs {
		if a.Value.Kind() == slog.KindString && len(a.Value.String()) > refusalText {
			attrs[i].Value = slog.StringValue(strings.ToValidUTF8(a.Value.String()[:refusalText], "") + "…")
		}
	}
	return attrs
}
