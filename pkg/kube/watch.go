package kube

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"unique"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/culvert-dev/culvert/pkg/catalog"
)

// Watch fills sink with the Services of the cluster and keeps it up to date
// until ctx ends, whose error it returns. While the API server does not answer,
// the sink keeps what it had.
//
// Every namespace is watched where that is allowed; else the Cluster's own and
// the further ones given, those of them that are allowed; else none, and the
// sink's scope stays empty. What is allowed is found by doing it, as no review
// of rights is exact for every authorizer. Each right that is missing is told
// to missing once, as a verb and its object: "list services in all namespaces".
func (c *Cluster) Watch(ctx context.Context, sink catalog.Sink, missing func(string), further ...string) error {
	g, ctx := errgroup.WithContext(ctx)
	tell := once(missing)
	b := &board{sink: sink}
	var names, all bool
	tries, tryCtx := errgroup.WithContext(ctx)
	tries.Go(func() error { names = c.allowed(tryCtx, tell, c.namespaces()); return nil })
	tries.Go(func() error { all = c.watchable(tryCtx, tell, ""); return nil })
	_ = tries.Wait()
	where := []string{""}
	if !all {
		where = c.watchableOf(ctx, tell, append([]string{c.Namespace}, further...))
	}
	b.expect(where, names)
	if names {
		g.Go(b.namesOf(c).following(ctx))
	}
	for _, v := range b.views {
		g.Go(v.servicesOf(c, tell).following(ctx))
		g.Go(v.slicesOf(c, tell).following(ctx))
	}
	g.Go(func() error { <-ctx.Done(); return ctx.Err() })
	return g.Wait()
}

// once passes on each line only the first time.
func once(f func(string)) func(string) {
	var mu sync.Mutex
	told := map[string]bool{}
	return func(s string) {
		mu.Lock()
		defer mu.Unlock()
		if !told[s] {
			told[s] = true
			f(s)
		}
	}
}

// watchableOf returns those of the namespaces that may be watched.
func (c *Cluster) watchableOf(ctx context.Context, missing func(string), namespaces []string) []string {
	slices.Sort(namespaces)
	var allowed []string
	for _, ns := range slices.Compact(namespaces) {
		if ns != "" && c.watchable(ctx, missing, ns) {
			allowed = append(allowed, ns)
		}
	}
	return allowed
}

// watchable says whether a namespace ("" is all) can be held whole. Services
// without what is behind them are not whole: a headless one would seem empty.
func (c *Cluster) watchable(ctx context.Context, missing func(string), namespace string) bool {
	var services, endpoints bool
	var g errgroup.Group
	g.Go(func() error { services = c.allowed(ctx, missing, c.services(namespace)); return nil })
	g.Go(func() error { endpoints = c.allowed(ctx, missing, c.endpointSlices(namespace)); return nil })
	_ = g.Wait()
	return services && endpoints
}

// allowed tries until there is an answer.
func (c *Cluster) allowed(ctx context.Context, missing func(string), s source) bool {
	for retry := (backoff{}); ctx.Err() == nil; retry.wait(ctx, 0) {
		verb, err := s.try(ctx)
		if err == nil {
			return true
		}
		if forbidden(err) {
			missing(verb + " " + s.name)
			return false
		}
		c.log.Debug("try watch", "source", s.name, "err", err)
	}
	return false
}

func (f follower[V]) following(ctx context.Context) func() error {
	return func() error { f.run(ctx); return nil }
}

// A board joins the views, and is the one that speaks to the sink.
type board struct {
	mu    sync.Mutex
	sink  catalog.Sink
	views []*view
	scope catalog.Scope

	listed bool            // namespaces are listed, rather than inferred
	synced bool            // ... and have been
	names  map[string]bool // of the namespaces
}

func (b *board) expect(namespaces []string, listed bool) {
	b.listed, b.names = listed, map[string]bool{}
	for _, ns := range namespaces {
		b.views = append(b.views, &view{
			board:     b,
			namespace: ns,
			services:  map[key]catalog.Service{},
			slices:    map[key]slice{},
			behind:    map[key][]key{},
			sent:      map[key]catalog.Service{},
		})
	}
}

func (b *board) namesOf(c *Cluster) follower[struct{}] {
	return follower[struct{}]{
		source: c.namespaces(),
		reduce: func(runtime.Object) struct{} { return struct{}{} },
		apply:  b.putNames,
		failed: func(err error) { c.log.Debug("watch", "err", err) },
	}
}

func (b *board) putNames(d delta[struct{}]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := maps.Clone(b.names)
	if d.whole {
		clear(b.names)
		b.synced = true
	}
	for k := range d.put {
		b.names[k.name] = true
	}
	for _, k := range d.drop {
		delete(b.names, k.name)
	}
	if d.whole || !maps.Equal(before, b.names) {
		b.sink.SetNamespaces(slices.Sorted(maps.Keys(b.names)))
	}
	b.rescope()
}

// inferNames says which namespaces exist where they may not be listed: those
// that are watched, and those of the Services seen.
func (b *board) inferNames() {
	if b.listed {
		return
	}
	names := map[string]bool{}
	for _, v := range b.views {
		if v.namespace != "" {
			names[v.namespace] = true
		}
		for k := range v.sent {
			names[k.namespace] = true
		}
	}
	if !maps.Equal(names, b.names) {
		b.names = names
		b.sink.SetNamespaces(slices.Sorted(maps.Keys(names)))
	}
}

func (b *board) rescope() {
	var s catalog.Scope
	for _, v := range b.views {
		switch {
		case !v.whole() || b.listed && !b.synced:
		case v.namespace == "":
			s.All = true
		default:
			s.Namespaces = append(s.Namespaces, v.namespace)
		}
	}
	if !reflect.DeepEqual(s, b.scope) {
		b.scope = s
		b.sink.SetScope(s)
	}
}

// A view is what is known of one namespace, or of all ("").
type view struct {
	board     *board
	namespace string

	services map[key]catalog.Service // without endpoints
	slices   map[key]slice
	behind   map[key][]key // the slices of each Service
	sent     map[key]catalog.Service

	haveServices, haveSlices bool
}

// A slice is an EndpointSlice, reduced.
type slice struct {
	service   key
	endpoints []catalog.Endpoint
}

func (v *view) whole() bool { return v.haveServices && v.haveSlices }

func (v *view) servicesOf(c *Cluster, missing func(string)) follower[catalog.Service] {
	s := c.services(v.namespace)
	return follower[catalog.Service]{
		source: s,
		reduce: reduceService,
		apply:  v.putServices,
		failed: v.failed(c, s, missing, &v.haveServices),
	}
}

func (v *view) slicesOf(c *Cluster, missing func(string)) follower[slice] {
	s := c.endpointSlices(v.namespace)
	return follower[slice]{
		source: s,
		reduce: reduceSlice,
		apply:  v.putSlices,
		failed: v.failed(c, s, missing, &v.haveSlices),
	}
}

// failed withdraws the view when its rights were, since it would silently grow
// old. For any other reason what is known stays until the server is back.
func (v *view) failed(c *Cluster, s source, missing func(string), have *bool) func(error) {
	return func(err error) {
		c.log.Debug("watch", "err", err)
		if !forbidden(err) {
			return
		}
		missing("watch " + s.name)
		v.board.mu.Lock()
		defer v.board.mu.Unlock()
		*have = false
		v.board.rescope()
		for k := range v.sent {
			v.drop(k)
		}
		v.board.inferNames()
	}
}

func (v *view) putServices(d delta[catalog.Service]) {
	v.board.mu.Lock()
	defer v.board.mu.Unlock()
	d.onto(v.services)
	v.haveServices = v.haveServices || d.whole
	v.tell(d.whole, append(slices.Collect(maps.Keys(d.put)), d.drop...))
}

func (v *view) putSlices(d delta[slice]) {
	v.board.mu.Lock()
	defer v.board.mu.Unlock()
	if d.whole {
		clear(v.slices)
		clear(v.behind)
		v.haveSlices = true
	}
	var touched []key
	for _, k := range d.drop {
		touched = append(touched, v.setSlice(k, slice{}))
	}
	for k, s := range d.put {
		touched = append(touched, v.setSlice(k, s), s.service)
	}
	v.tell(d.whole, touched)
}

// setSlice puts a slice behind its Service (none: drops it), and returns the
// Service that it was behind before.
func (v *view) setSlice(k key, s slice) (before key) {
	before = v.slices[k].service
	delete(v.slices, k)
	left := slices.DeleteFunc(v.behind[before], func(name key) bool { return name == k })
	if v.behind[before] = left; len(left) == 0 {
		delete(v.behind, before)
	}
	if s.service.name == "" {
		return before
	}
	v.slices[k] = s
	v.behind[s.service] = append(v.behind[s.service], k)
	return before
}

// tell passes on what became of the Services touched, or of all. Nothing is
// said before all is known: a Service without its endpoints would be a lie.
func (v *view) tell(all bool, touched []key) {
	if !v.whole() {
		return
	}
	if all {
		touched = slices.AppendSeq(slices.Collect(maps.Keys(v.sent)), maps.Keys(v.services))
	}
	for _, k := range touched {
		v.put(k)
	}
	v.board.inferNames()
	v.board.rescope()
}

func (v *view) put(k key) {
	s, ok := v.services[k]
	if !ok {
		v.drop(k)
		return
	}
	var behind []slice
	for _, name := range v.behind[k] {
		behind = append(behind, v.slices[name])
	}
	s.Endpoints = merge(behind)
	if before, ok := v.sent[k]; ok && reflect.DeepEqual(before, s) {
		return
	}
	v.sent[k] = s
	v.board.sink.PutService(s)
}

func (v *view) drop(k key) {
	if _, ok := v.sent[k]; ok {
		delete(v.sent, k)
		v.board.sink.DropService(k.namespace, k.name)
	}
}

// merge makes one list of all slices, in order. The same address may be in several, while
// the controller moves it, or with other ports: its ports are joined. Most Services have a
// single slice, whose list is theirs.
func merge(all []slice) []catalog.Endpoint {
	if len(all) == 1 {
		return all[0].endpoints
	}
	var merged []catalog.Endpoint
	for _, s := range all {
		merged = append(merged, s.endpoints...)
	}
	return distinct(merged)
}

// distinct sorts endpoints, and makes one of those that are the same.
func distinct(all []catalog.Endpoint) []catalog.Endpoint {
	slices.SortFunc(all, compareEndpoints)
	each := all[:0]
	for _, e := range all {
		last := len(each) - 1
		if last < 0 || compareEndpoints(each[last], e) != 0 {
			each = append(each, e)
			continue
		}
		each[last].Ports = inOrder(slices.Concat(each[last].Ports, e.Ports))
	}
	return each
}

func compareEndpoints(a, b catalog.Endpoint) int {
	return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Hostname, b.Hostname))
}

// inOrder sorts ports, each once.
func inOrder(ports []catalog.Port) []catalog.Port {
	slices.SortFunc(ports, comparePorts)
	return slices.Compact(ports)
}

func comparePorts(a, b catalog.Port) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Name, b.Name))
}

func reduceService(o runtime.Object) catalog.Service {
	s, ok := o.(*corev1.Service)
	if !ok {
		return catalog.Service{}
	}
	r := catalog.Service{Namespace: shared(s.Namespace), Name: s.Name}
	for _, p := range s.Spec.Ports {
		r.Ports = append(r.Ports, catalog.Port{Name: shared(p.Name), Protocol: protocol(p.Protocol), Port: uint16(p.Port)})
	}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		r.ExternalName = s.Spec.ExternalName
		return r
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	r.Headless = ips[0] == corev1.ClusterIPNone
	r.ClusterIPs = parseAddrs(ips)
	return r
}

// reduceSlice keeps the endpoints that the cluster's DNS publishes: those that
// are ready or of which nothing is known. Endpoints of a Service that says
// publishNotReadyAddresses need nothing more: its controller calls them ready,
// and CoreDNS too goes by that alone.
func reduceSlice(o runtime.Object) slice {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return slice{}
	}
	r := slice{service: key{shared(s.Namespace), s.Labels[discoveryv1.LabelServiceName]}}
	var ports []catalog.Port // shared by all endpoints of the slice
	for _, p := range s.Ports {
		ports = append(ports, catalog.Port{Name: shared(deref(p.Name)), Protocol: protocol(deref(p.Protocol)), Port: uint16(deref(p.Port))})
	}
	ports = inOrder(ports)
	r.endpoints = make([]catalog.Endpoint, 0, len(s.Endpoints)) // of one address each
	for _, e := range s.Endpoints {
		if e.Conditions.Ready != nil && !*e.Conditions.Ready {
			continue
		}
		for _, addr := range parseAddrs(e.Addresses) {
			r.endpoints = append(r.endpoints, catalog.Endpoint{Addr: addr, Hostname: deref(e.Hostname), Ports: ports})
		}
	}
	r.endpoints = distinct(r.endpoints)
	return r
}

func protocol(p corev1.Protocol) string { return shared(strings.ToLower(string(p))) }

// shared is s, held once for all who have the same: of thousands of objects in a cluster
// each has its own copy of the few names of namespaces, ports and protocols.
func shared(s string) string { return unique.Make(s).Value() }

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// parseAddrs leaves out what is no address: "None", "", the names in a slice of
// type FQDN.
func parseAddrs(all []string) []netip.Addr {
	var addrs []netip.Addr
	for _, s := range all {
		if a, err := netip.ParseAddr(s); err == nil {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}
