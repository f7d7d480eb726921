package hub

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A name is one key's at a time, at all hubs. They agree on nothing for that: who wants a name
// claims it at his hub, which tells the others before he has it. One that has attached it with
// another key refuses; of two claims at one time that of the smaller fingerprint goes on. A
// hub that does not answer is no veto: what became of names meanwhile is compared when it can
// be asked again, and the later one goes.
type claim struct {
	key  string
	of   int  // that many wires
	lost bool // to one at another hub
}

// A tenure is a name that a key has, or wants.
type tenure struct {
	Name string  `json:"name"`
	Key  string  `json:"key"`
	Age  float64 `json:"age,omitempty"` // seconds that it has had it

	Ports []string `json:"ports,omitempty"` // as 22/tcp
}

// owner is the key of who is a host now; "": nobody is.
func (r *Registry) owner(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.hosts[name]; h != nil && len(h.ports) > 0 {
		return h.key
	}
	return ""
}

// claim keeps a name for a key until it is given up.
func (r *Registry) claim(name, key string) (giveUp func(), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, c := r.hosts[name], r.claims[name]
	if h != nil && len(h.ports) > 0 && h.key != key || c != nil && c.key != key {
		return nil, &TakenError{name}
	}
	if c == nil {
		c = &claim{key: key}
		if r.claims == nil {
			r.claims = map[string]*claim{}
		}
		r.claims[name] = c
	}
	c.of++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if c.of--; c.of == 0 {
			delete(r.claims, name)
		}
	}, nil
}

// taken tells what a claim at another hub meets here. A claim here may lose by it.
func (r *Registry) taken(name, key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, c := r.hosts[name], r.claims[name]
	switch {
	case h != nil && len(h.ports) > 0:
		return h.key != key
	case c == nil || c.key == key:
		return false
	}
	c.lost = c.lost || key < c.key
	return !c.lost
}

// tenures are the names that keys have here.
func (r *Registry) tenures() map[string]tenure {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := map[string]tenure{}
	for name, h := range r.hosts {
		if len(h.ports) > 0 {
			t := tenure{Name: name, Key: h.key, Age: time.Since(h.since).Seconds()}
			for port := range h.ports {
				network, number, _ := strings.Cut(port, "/")
				t.Ports = append(t.Ports, number+"/"+network)
			}
			all[name] = t
		}
	}
	return all
}

// attach has a key be a host, if the name is nobody else's at any hub.
func (h *Hub) attach(ctx context.Context, key, network, name, port string) (net.Listener, error) {
	if h.registry.owner(name) != key {
		giveUp, err := h.registry.claim(name, key)
		if err != nil {
			return nil, err
		}
		defer giveUp()
		if h.peers.refuse(ctx, tenure{Name: name, Key: key}) {
			return nil, &TakenError{name}
		}
	}
	return h.registry.listen(ctx, key, network, name, port)
}

const (
	claimLimit   = 500 * time.Millisecond // for other hubs to answer
	compareEvery = time.Second
	sameTime     = 1 // second: less between two is no order
)

// refuse tells whether another hub has the name with another key. Those who have not said are
// asked again later.
func (p *peers) refuse(ctx context.Context, t tenure) bool {
	ctx, cancel := context.WithTimeout(ctx, p.claim)
	defer cancel()
	var all sync.WaitGroup
	var refused atomic.Bool
	up := p.up("")
	for _, one := range p.others() {
		if !slices.Contains(up, one) {
			one.unasked.Store(true)
			continue
		}
		all.Go(func() {
			_, err := request(ctx, one.keep.DialContext, http.MethodPost, "/claim", t)
			if no := (*answerError)(nil); errors.As(err, &no) && no.status == http.StatusConflict {
				refused.Store(true)
				cancel()
			} else if err != nil {
				one.unasked.Store(true)
			}
		})
	}
	all.Wait()
	return refused.Load()
}

// compareAll compares names with those hubs that have not been asked, until ctx ends.
func (p *peers) compareAll(ctx context.Context) {
	t := time.NewTicker(compareEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, one := range p.up("") {
			if one.unasked.Swap(false) {
				if err := p.hub.compare(ctx, one); err != nil {
					one.unasked.Store(true)
				}
			}
		}
	}
}

// compare gives up what another hub has had for longer with another key; that one does likewise.
// It fails for as long as both keep a name: by how much ages differ depends on when each was asked.
func (h *Hub) compare(ctx context.Context, with *peer) error {
	theirs, err := with.names(ctx)
	if err != nil {
		return err
	}
	for name, our := range h.registry.tenures() {
		their, ok := theirs[name]
		if ok && their.Key != our.Key {
			err = &TakenError{name}
		}
		if ok && their.before(our) {
			h.cfg.Log.Warn("another hub has had a name for longer, with another key", "name", name, "peer", with.address)
			h.yield(name)
		}
	}
	return err
}

// names are those that keys have at a hub.
func (p *peer) names(ctx context.Context) (all map[string]tenure, err error) {
	text, err := request(ctx, p.keep.DialContext, http.MethodGet, "/names", nil)
	if err != nil {
		return nil, err
	}
	return all, json.Unmarshal(text, &all)
}

func (t tenure) before(o tenure) bool {
	if d := t.Age - o.Age; d > sameTime || d < -sameTime {
		return t.Key != o.Key && d > 0
	}
	return t.Key < o.Key
}

// yield ends the wires that are a host: its stock client learns of it by nothing less.
func (h *Hub) yield(name string) {
	for _, v := range h.visitors() {
		if v.is(name) {
			if g, err := v.who(); err == nil {
				h.audit(g, "attach", "", name).refused(&TakenError{name})
			}
			v.end()
		}
	}
}

// is tells whether the visitor is a host of that name.
func (v *visit) is(name string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.ContainsFunc(v.held, func(h *held) bool { return h.name == name })
}

// serveClaim and serveNames answer other hubs.
func (h *Hub) serveClaim(w http.ResponseWriter, r *http.Request) {
	var t tenure
	switch err := json.NewDecoder(io.LimitReader(r.Body, maxHeader)).Decode(&t); {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
	case h.registry.taken(t.Name, t.Key):
		http.Error(w, (&TakenError{t.Name}).Error(), http.StatusConflict)
	}
}

func (h *Hub) serveNames(w http.ResponseWriter, _ *http.Request) {
	_ = json.NewEncoder(w).Encode(h.registry.tenures()) // who hung up needs no answer
}

// amongHubs is for other hubs alone.
func amongHubs(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !callerOf(r).hub {
			http.NotFound(w, r)
			return
		}
		serve(w, r)
	}
}
