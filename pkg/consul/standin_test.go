package consul

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
)

// standIn is a datacenter: agents, each with what was registered at it, and a catalog,
// which is what they told the servers. What an agent has is told again whenever it
// syncs, and what the catalog has of its node and the agent has not is removed then:
// https://developer.hashicorp.com/consul/docs/concept/catalog#anti-entropy.
type standIn struct {
	t *testing.T

	mu      sync.Mutex
	index   uint64
	agents  map[string]*agent
	catalog map[string]map[string]*entry // node, id
	said    []string                     // requests that change something: "n1 PUT /v1/…"
	deny    string                       // a part of paths that the ACL refuses
}

// entry is a registration as the servers have it.
type entry struct {
	service api.AgentService
	checks  api.HealthChecks
}

// agent is a node's own.
type agent struct {
	w        *standIn
	node     string
	server   *httptest.Server
	services map[string]*local
	dead     bool // by the word of the others; it does not answer either
}

// local is a registration as its agent has it.
type local struct {
	service     api.AgentService
	healthy     bool
	maintenance bool
	reason      string
}

func newStandIn(t *testing.T, nodes ...string) *standIn {
	w := &standIn{t: t, agents: map[string]*agent{}, catalog: map[string]map[string]*entry{}}
	for _, node := range nodes {
		a := &agent{w: w, node: node, services: map[string]*local{}}
		a.server = httptest.NewServer(a)
		w.agents[node], w.catalog[node] = a, map[string]*entry{}
		t.Cleanup(a.server.Close)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(30 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				w.mu.Lock()
				for _, a := range w.agents {
					a.sync()
				}
				w.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
	return w
}

// registry asks the first node's agent.
func (w *standIn) registry(start string) *Registry {
	w.t.Helper()
	r, err := New(Config{
		Address: w.agents["n1"].server.URL, Start: start, Token: "secret",
		AgentOf: func(node, _ string) string { return w.agents[node].server.URL },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	r.every = 10 * time.Millisecond
	return r
}

// sync tells the servers what the agent has, and only that. The mutex is held.
func (a *agent) sync() {
	if a.dead {
		return
	}
	told := a.w.catalog[a.node]
	for id := range told {
		if a.services[id] == nil {
			delete(told, id)
		}
	}
	for id, l := range a.services {
		e := told[id]
		if e == nil {
			a.w.index++
			e = &entry{}
			e.service.CreateIndex = a.w.index
			told[id] = e
		}
		created := e.service.CreateIndex
		e.service = l.service
		e.service.CreateIndex = created
		e.checks = a.checks(l)
	}
}

func (a *agent) checks(l *local) api.HealthChecks {
	status, output := api.HealthPassing, "200 OK"
	if !l.healthy {
		status, output = api.HealthCritical, "connection refused"
	}
	all := api.HealthChecks{{Node: a.node, CheckID: "service:" + l.service.ID, Name: "http", Status: status, Output: output, ServiceID: l.service.ID}}
	if l.maintenance {
		all = append(all, &api.HealthCheck{Node: a.node, CheckID: api.ServiceMaintPrefix + l.service.ID, Status: api.HealthCritical, Notes: l.reason, ServiceID: l.service.ID})
	}
	return all
}

// register is what a program does when it starts, at its own node's agent; it is
// healthy some time later. Maintenance of the id stays.
func (w *standIn) register(node, id, start string, healthy bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.agents[node]
	l := a.services[id]
	if l == nil {
		l = &local{}
		a.services[id] = l
	}
	l.service = api.AgentService{ID: id, Service: "shop", Port: 8000, Meta: map[string]string{"start": start}}
	l.healthy = healthy
	a.sync()
}

// deregister is what a program does when it ends well.
func (w *standIn) deregister(node, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.agents[node].services, id)
	w.agents[node].sync()
}

func (w *standIn) sick(node, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.agents[node].services[id].healthy = false
	w.agents[node].sync()
}

// die is the end of a node, without a word.
func (w *standIn) die(node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.agents[node].dead = true
	w.agents[node].server.CloseClientConnections()
}

func (w *standIn) has(node, id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.catalog[node][id] != nil
}

// asked are the requests so far that change something.
func (w *standIn) asked() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.said, "\n")
}

func (a *agent) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	w := a.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if a.dead {
		panic(http.ErrAbortHandler) // nobody is there
	}
	if in.Header.Get("X-Consul-Token") != "secret" || w.deny != "" && strings.Contains(in.URL.Path, w.deny) {
		http.Error(out, "Permission denied", http.StatusForbidden)
		return
	}
	if in.Method == http.MethodPut {
		w.said = append(w.said, a.node+" "+in.URL.Path)
	}
	id := in.URL.Path[strings.LastIndex(in.URL.Path, "/")+1:]
	switch path := strings.TrimSuffix(in.URL.Path, id); path {
	case "/v1/agent/": // self
		answer(out, map[string]any{"Config": map[string]any{"NodeName": a.node}})
	case "/v1/health/service/":
		if !in.URL.Query().Has("consistent") {
			w.t.Error("the registry's answer may be an old one")
		}
		answer(out, w.entries(id))
	case "/v1/catalog/": // deregister
		var of api.CatalogDeregistration
		if err := json.NewDecoder(in.Body).Decode(&of); err != nil {
			w.t.Error(err)
		}
		delete(w.catalog[of.Node], of.ServiceID)
		answer(out, true)
	case "/v1/agent/service/maintenance/", "/v1/agent/service/deregister/", "/v1/agent/health/service/id/":
		l := a.services[id]
		if l == nil {
			http.Error(out, fmt.Sprintf("Unknown service ID %q", id), http.StatusNotFound)
			return
		}
		a.serveLocal(out, in, path, l)
	default:
		w.t.Errorf("the stand-in is asked for %s", in.URL)
	}
}

// serveLocal answers what an agent knows itself.
func (a *agent) serveLocal(out http.ResponseWriter, in *http.Request, path string, l *local) {
	switch path {
	case "/v1/agent/service/maintenance/":
		l.maintenance, l.reason = in.URL.Query().Get("enable") == "true", in.URL.Query().Get("reason")
	case "/v1/agent/service/deregister/":
		delete(a.services, l.service.ID)
	default:
		if !l.healthy || l.maintenance {
			out.WriteHeader(http.StatusServiceUnavailable)
		}
		answer(out, api.AgentServiceChecksInfo{AggregatedStatus: a.checks(l).AggregatedStatus(), Checks: a.checks(l), Service: &l.service})
	}
	a.sync()
}

func answer(out http.ResponseWriter, value any) { _ = json.NewEncoder(out).Encode(value) }

func (w *standIn) entries(service string) []*api.ServiceEntry {
	all := []*api.ServiceEntry{}
	for node, entries := range w.catalog {
		serf := &api.HealthCheck{Node: node, CheckID: "serfHealth", Name: "Serf Health Status", Status: api.HealthPassing}
		if w.agents[node].dead {
			serf.Status, serf.Output = api.HealthCritical, "Agent not live or unreachable"
		}
		for _, e := range entries {
			if e.service.Service == service {
				own := e.service
				all = append(all, &api.ServiceEntry{
					Node: &api.Node{Node: node, Address: "10.0.0.1"}, Service: &own, Checks: append(slices.Clone(e.checks), serf),
				})
			}
		}
	}
	slices.SortFunc(all, func(a, b *api.ServiceEntry) int {
		return cmp.Compare(a.Service.ID+a.Node.Node, b.Service.ID+b.Node.Node)
	})
	return all
}
