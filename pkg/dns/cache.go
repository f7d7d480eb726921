package dns

import (
	"sync"
	"time"

	"github.com/miekg/dns"
)

// A cache keeps the cluster's answers for as long as they last, NXDOMAIN and
// NODATA for as long as their SOA says. The zero cache is ready.
type cache struct {
	mu      sync.Mutex
	entries map[cacheKey]entry
}

type cacheKey struct {
	name  string // lower case
	qtype uint16
}

type entry struct {
	reply   *dns.Msg
	stored  time.Time
	expires time.Time
}

const (
	cacheSize = 4096
	longest   = 30 * time.Second // a cluster changes, whatever its TTLs say
)

// get returns a copy with what is left of the TTLs, or nil.
func (c *cache) get(k cacheKey, now time.Time) *dns.Msg {
	c.mu.Lock()
	e, ok := c.entries[k]
	c.mu.Unlock()
	if !ok || !now.Before(e.expires) {
		return nil
	}
	m := e.reply.Copy()
	age := uint32(now.Sub(e.stored) / time.Second)
	for _, rr := range records(m) {
		if rr.Header().Rrtype != dns.TypeOPT {
			rr.Header().Ttl -= min(age, rr.Header().Ttl)
		}
	}
	return m
}

func (c *cache) put(k cacheKey, m *dns.Msg, now time.Time) {
	ttl := min(lasts(m), longest)
	if ttl <= 0 || m.Truncated {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil {
		c.entries = map[cacheKey]entry{}
	}
	if len(c.entries) >= cacheSize {
		c.evict(now)
	}
	c.entries[k] = entry{m, now, now.Add(ttl)}
}

// evict makes room: all that is expired, or else an eighth as the map gives it.
func (c *cache) evict(now time.Time) {
	for k, e := range c.entries {
		if !now.Before(e.expires) {
			delete(c.entries, k)
		}
	}
	for k := range c.entries {
		if len(c.entries) <= cacheSize*7/8 {
			return
		}
		delete(c.entries, k)
	}
}

// lasts is the shortest TTL in an answer; of a negative one that of its SOA, and
// without a SOA it does not last.
func lasts(m *dns.Msg) time.Duration {
	if len(m.Answer) == 0 {
		for _, rr := range m.Ns {
			if soa, ok := rr.(*dns.SOA); ok {
				return time.Duration(min(soa.Hdr.Ttl, soa.Minttl)) * time.Second
			}
		}
		return 0
	}
	shortest := m.Answer[0].Header().Ttl
	for _, rr := range records(m) {
		if rr.Header().Rrtype != dns.TypeOPT {
			shortest = min(shortest, rr.Header().Ttl)
		}
	}
	return time.Duration(shortest) * time.Second
}

func records(m *dns.Msg) []dns.RR {
	all := make([]dns.RR, 0, len(m.Answer)+len(m.Ns)+len(m.Extra))
	return append(append(append(all, m.Answer...), m.Ns...), m.Extra...)
}
