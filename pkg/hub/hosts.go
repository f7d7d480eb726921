package hub

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A Host is what a hub says of one, to who may reach it.
type Host struct {
	Name  string   `json:"name"`
	Ports []string `json:"ports,omitempty"` // that it offers, as 22/tcp
	Hubs  int      `json:"hubs"`            // that it is attached to; 0: to none
	For   float64  `json:"for"`             // seconds that it is attached, or away
}

// Hosts asks a hub which hosts there are, at it and at others, of those that who asks may
// reach. A Name and Offers are not for it.
func Hosts(ctx context.Context, cfg AgentConfig) ([]Host, error) {
	ctx, cancel := context.WithTimeout(ctx, wireLimit)
	defer cancel()
	c, _, err := cfg.withDefaults().open(ctx, cfg.Dial)
	if err != nil {
		return nil, err
	}
	defer func() { c.Close(); _ = c.Wait() }()
	return hostsAt(ctx, c)
}

func hostsAt(ctx context.Context, far channel.Network) (all []Host, err error) {
	text, err := request(ctx, far.DialContext, http.MethodGet, "/hosts", nil)
	if err != nil {
		return nil, err
	}
	return all, json.Unmarshal(text, &all)
}

// hosts are those of all hubs.
func (h *Hub) hosts(ctx context.Context) map[string]*Host {
	ctx, cancel := context.WithTimeout(ctx, h.peers.claim)
	defer cancel()
	up := h.peers.up("")
	known := make([]map[string]tenure, len(up)+1)
	known[len(up)] = h.registry.tenures()
	var asked sync.WaitGroup
	for i, one := range up {
		asked.Go(func() { known[i], _ = one.names(ctx) }) // one that does not answer is left out
	}
	asked.Wait()
	all := h.registry.away()
	for _, names := range known {
		for name, t := range names {
			one := all[name]
			if one == nil || one.Hubs == 0 {
				one = &Host{Name: name}
				all[name] = one
			}
			one.Hubs++
			one.For = max(one.For, t.Age)
			one.Ports = slices.Compact(slices.Sorted(slices.Values(append(one.Ports, t.Ports...))))
		}
	}
	return all
}

// away are the hosts that were attached to this hub.
func (r *Registry) away() map[string]*Host {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[string]*Host{}
	for name, h := range r.hosts {
		if len(h.ports) == 0 {
			all[name] = &Host{Name: name, For: time.Since(h.seen).Seconds()}
		}
	}
	return all
}

// sees tells whether a guest may reach anything of a host.
func (g *Guest) sees(h *Host) bool {
	if h.Hubs == 0 {
		return slices.ContainsFunc(g.open, func(p place) bool { return has([]place{{p.host, "*"}}, h.Name, "") })
	}
	return slices.ContainsFunc(h.Ports, func(port string) bool {
		number, _, _ := strings.Cut(port, "/")
		return g.mayOpen(h.Name, number)
	})
}

func (h *Hub) serveHosts(w http.ResponseWriter, r *http.Request) {
	v := callerOf(r).visit
	if v == nil {
		http.NotFound(w, r)
		return
	}
	g, err := v.who()
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	var all []*Host
	if len(g.open) > 0 { // else other hubs need not be asked
		all = slices.DeleteFunc(slices.Collect(maps.Values(h.hosts(r.Context()))), func(one *Host) bool { return !g.sees(one) })
	}
	slices.SortFunc(all, func(a, b *Host) int { return cmp.Compare(a.Name, b.Name) })
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(append([]*Host{}, all...)) // who hung up needs no answer
}
