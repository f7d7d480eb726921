package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

const (
	// asks is how often the API server is asked for its Service range. With
	// several ranges it names one by chance.
	asks = 4
	// settle is how long other changes are waited for before one is told.
	settle = 300 * time.Millisecond
)

// A Route is a range of cluster addresses.
type Route struct {
	Prefix netip.Prefix
	Kind   string // "pod" or ServiceRange
	Source string // how it is known, in words: "ServiceCIDR kubernetes"
}

// ServiceRange is the Kind of addresses for Services.
const ServiceRange = "service"

// A Hint is addresses that are known to be the cluster's from elsewhere, as
// what the shadow says of itself.
type Hint struct{ Pods, Services []netip.Addr }

// CIDRs finds the address ranges of the cluster.
//
// Those of Services: the ServiceCIDR objects; else what kubeadm wrote down and
// what the API server answers to a Service, never created, whose address is
// wrong. Those of pods: what nodes and kubeadm name. Addresses that are seen
// outside of these ranges are covered narrowly, and where nothing else is
// known they are all there is; missing then says which rights would have told
// more, as a verb and its object.
func (c *Cluster) CIDRs(ctx context.Context, hint Hint) (routes []Route, missing []string, err error) {
	s := &survey{cluster: c, world: newWorld(hint)}
	if err := s.run(ctx); err != nil {
		return nil, nil, fmt.Errorf("find cluster addresses: %w", err)
	}
	return s.world.routes(), s.missing(), nil
}

// WatchCIDRs reports what CIDRs finds, and again whenever there are other
// prefixes, until ctx ends, whose error it returns.
func (c *Cluster) WatchCIDRs(ctx context.Context, hint Hint, report func([]Route)) error {
	s := &survey{cluster: c, world: newWorld(hint), changed: make(chan struct{}, 1)}
	for retry := (backoff{}); ; retry.wait(ctx, 0) {
		err := s.run(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			break
		}
		c.log.Debug("find cluster addresses", "err", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	s.follow(ctx, g)
	g.Go(func() error { return s.reportTo(ctx, report) })
	return g.Wait()
}

// A world is all that was found out.
type world struct {
	hint            Hint
	ranges          map[key][]netip.Prefix // ServiceCIDR objects
	nodes           map[key][]netip.Prefix
	kubeadmServices []netip.Prefix
	kubeadmPods     []netip.Prefix
	answers         []netip.Prefix
	services        map[key][]netip.Addr
	pods            map[key][]netip.Addr
}

func newWorld(hint Hint) world {
	return world{
		hint:     hint,
		ranges:   map[key][]netip.Prefix{},
		nodes:    map[key][]netip.Prefix{},
		services: map[key][]netip.Addr{},
		pods:     map[key][]netip.Addr{},
	}
}

// routes is the decision: what is exact, then what was seen outside of that.
func (w world) routes() []Route {
	services := w.serviceRoutes()
	services = append(services, observed(ServiceRange, 24, 112, outside(services, w.services, w.hint.Services))...)
	pods := w.podRoutes()
	pods = append(pods, observed("pod", 24, 64, outside(pods, w.pods, w.hint.Pods))...)
	return append(prune(services), prune(pods)...)
}

// serviceRoutes are the exact ones. ServiceCIDR objects tell all by themselves.
func (w world) serviceRoutes() []Route {
	var r []Route
	for k, prefixes := range w.ranges {
		r = append(r, routesOf(ServiceRange, "ServiceCIDR "+k.name, prefixes)...)
	}
	if len(r) == 0 {
		r = append(r, routesOf(ServiceRange, "kubeadm-config", w.kubeadmServices)...)
		r = append(r, routesOf(ServiceRange, "dry-run answer", w.answers)...)
	}
	return r
}

func (w world) podRoutes() []Route {
	var r []Route
	for k, prefixes := range w.nodes {
		r = append(r, routesOf("pod", "node "+k.name+" podCIDR", prefixes)...)
	}
	return append(r, routesOf("pod", "kubeadm-config", w.kubeadmPods)...)
}

func routesOf(kind, source string, prefixes []netip.Prefix) []Route {
	var r []Route
	for _, p := range prefixes {
		r = append(r, Route{p.Masked(), kind, source})
	}
	return r
}

// outside returns each address once that no route covers. Addresses that mean
// something else on every machine are never the cluster's.
func outside(routes []Route, seen map[key][]netip.Addr, more []netip.Addr) []netip.Addr {
	found := map[netip.Addr]bool{}
	take := func(all []netip.Addr) {
		for _, a := range all {
			a = a.Unmap().WithZone("")
			known := slices.ContainsFunc(routes, func(r Route) bool { return r.Prefix.Contains(a) })
			if a.IsGlobalUnicast() && !known {
				found[a] = true
			}
		}
	}
	for _, all := range seen {
		take(all)
	}
	take(more)
	return slices.Collect(maps.Keys(found))
}

// observed covers addresses by prefixes of the given lengths, halves joined.
func observed(kind string, bits4, bits6 int, addrs []netip.Addr) []Route {
	count := map[netip.Prefix]int{}
	for _, a := range addrs {
		bits := bits4
		if a.Is6() {
			bits = bits6
		}
		p, _ := a.Prefix(bits)
		count[p]++
	}
	join(count)
	var r []Route
	for p, n := range count {
		source := fmt.Sprintf("observed: %d %ss", n, kind)
		if n == 1 {
			source = "observed: 1 " + kind
		}
		r = append(r, Route{p, kind, source})
	}
	return r
}

// join replaces two halves by the whole, as long as there are any.
func join(count map[netip.Prefix]int) {
	for again := true; again; {
		again = false
		for p, n := range count {
			whole, other := parent(p)
			if m, ok := count[other]; ok && p.Bits() > 0 {
				delete(count, p)
				delete(count, other)
				count[whole] += n + m
				again = true
				break
			}
		}
	}
}

// parent returns the prefix one bit shorter and its other half.
func parent(p netip.Prefix) (whole, other netip.Prefix) {
	if p.Bits() == 0 {
		return p, p
	}
	whole, _ = p.Addr().Prefix(p.Bits() - 1)
	b := p.Addr().AsSlice()
	b[(p.Bits()-1)/8] ^= 0x80 >> ((p.Bits() - 1) % 8)
	a, _ := netip.AddrFromSlice(b)
	return whole, netip.PrefixFrom(a, p.Bits())
}

// prune sorts, and leaves out what is within another.
func prune(all []Route) []Route {
	slices.SortFunc(all, func(a, b Route) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Source, b.Source))
	})
	var kept []Route
	for _, r := range all {
		if n := len(kept); n > 0 && kept[n-1].Prefix.Contains(r.Prefix.Addr()) {
			continue
		}
		kept = append(kept, r)
	}
	return kept
}

// A survey finds out, once, and then goes on as long as it is wanted.
type survey struct {
	cluster *Cluster

	mu      sync.Mutex
	world   world
	changed chan struct{}

	// rights that are missing
	noRanges, noAsking, noNodes, noAllPods, noPods, noServices bool

	podsIn, servicesIn string // the namespaces they are looked for in
}

// run asks in two steps: what is exact first, since it decides how much must
// be looked at.
func (s *survey) run(ctx context.Context) error {
	c := s.cluster
	g, exact := errgroup.WithContext(ctx)
	g.Go(func() error { return s.read(exact, c.serviceCIDRs(), s.putRange, &s.noRanges) })
	g.Go(func() error { return s.read(exact, c.nodes(), s.putNode, &s.noNodes) })
	g.Go(func() error { return s.readKubeadm(exact) })
	if err := g.Wait(); err != nil {
		return err
	}
	g, seen := errgroup.WithContext(ctx)
	g.Go(func() error { return s.lookAtPods(seen) })
	if len(s.world.ranges) == 0 {
		g.Go(func() error { return s.ask(seen) })
		g.Go(func() error { return s.lookAtServices(seen) })
	}
	return g.Wait()
}

// read lists a source into the world. denied is set where that is forbidden;
// a server that is too old to know the kind has none of it.
func (s *survey) read(ctx context.Context, from source, put func(runtime.Object) bool, denied *bool) error {
	*denied = false
	_, err := from.each(ctx, func(o runtime.Object) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return put(o)
	})
	switch {
	case forbidden(err):
		*denied = true
	case apierrors.IsNotFound(err):
	default:
		return err
	}
	return nil
}

func (s *survey) putRange(o runtime.Object) bool {
	s.world.ranges[keyOf(o)] = reduceRange(o)
	return true
}

func (s *survey) putNode(o runtime.Object) bool {
	s.world.nodes[keyOf(o)] = reduceNode(o)
	return true
}

// lookAtPods reads a page of pods. Only when a pod is outside of what nodes
// say, or they say nothing, does it matter what the others have.
func (s *survey) lookAtPods(ctx context.Context) error {
	n := 0
	put := func(o runtime.Object) bool {
		s.world.pods[keyOf(o)] = reducePod(o)
		n++
		return n != pageSize || !s.podsKnown()
	}
	c := s.cluster
	s.podsIn = metav1.NamespaceAll
	err := s.read(ctx, c.runningPods(s.podsIn), put, &s.noAllPods)
	if err != nil || !s.noAllPods {
		return err
	}
	s.podsIn = c.Namespace
	return s.read(ctx, c.runningPods(s.podsIn), put, &s.noPods)
}

// podsKnown says that the ranges of pods are exact: there are some, and no pod
// is known to be elsewhere.
func (s *survey) podsKnown() bool {
	exact := s.world.podRoutes()
	return len(exact) > 0 && len(outside(exact, s.world.pods, s.world.hint.Pods)) == 0
}

func (s *survey) lookAtServices(ctx context.Context) error {
	put := func(o runtime.Object) bool {
		s.world.services[keyOf(o)] = reduceService(o).ClusterIPs
		return true
	}
	c := s.cluster
	s.servicesIn = metav1.NamespaceAll
	err := s.read(ctx, c.services(s.servicesIn), put, &s.noServices)
	if err != nil || !s.noServices {
		return err
	}
	s.servicesIn = c.Namespace
	return s.read(ctx, c.services(s.servicesIn), put, &s.noServices)
}

// missing names the rights that would have told what is now only observed.
func (s *survey) missing() []string {
	var m []string
	if len(s.world.serviceRoutes()) == 0 {
		if s.noRanges {
			m = append(m, "list servicecidrs")
		}
		if s.noAsking {
			m = append(m, "create "+in(s.cluster.Namespace, "services"))
		}
	}
	if !s.podsKnown() {
		if s.noNodes {
			m = append(m, "list nodes")
		}
		if s.noAllPods {
			m = append(m, "list pods in all namespaces")
		}
	}
	return m
}

// readKubeadm reads what kubeadm wrote down. It is one source among several,
// and in many clusters there is none, so a failure says nothing.
func (s *survey) readKubeadm(ctx context.Context) error {
	m, err := s.cluster.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, "kubeadm-config", metav1.GetOptions{})
	if forbidden(err) || apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("get configmap kubeadm-config: %w", err)
	}
	pods, services := parseKubeadm(m.Data["ClusterConfiguration"])
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.kubeadmPods, s.world.kubeadmServices = pods, services
	return nil
}

func parseKubeadm(config string) (pods, services []netip.Prefix) {
	var c struct {
		Networking struct{ PodSubnet, ServiceSubnet string }
	}
	if err := yaml.Unmarshal([]byte(config), &c); err != nil {
		return nil, nil
	}
	return parsePrefixes(strings.Split(c.Networking.PodSubnet, ",")), parsePrefixes(strings.Split(c.Networking.ServiceSubnet, ","))
}

// ask has the API server refuse a Service, and reads the range from its words.
func (s *survey) ask(ctx context.Context) error {
	var g errgroup.Group
	for range asks {
		// Documentation addresses (RFC 5737, RFC 3849), which no cluster uses.
		for _, ip := range []string{"192.0.2.1", "2001:db8::1"} {
			g.Go(func() error { return s.askOnce(ctx, ip) })
		}
	}
	return g.Wait()
}

func (s *survey) askOnce(ctx context.Context, ip string) error {
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "culvert-range"},
		Spec: corev1.ServiceSpec{
			ClusterIP: ip,
			Ports:     []corev1.ServicePort{{Port: 80}},
		},
	}
	_, err := s.cluster.client.CoreV1().Services(s.cluster.Namespace).Create(ctx, service, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	var status apierrors.APIStatus
	if err != nil && !errors.As(err, &status) {
		return fmt.Errorf("ask for the service range: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if forbidden(err) {
		s.noAsking = true
	}
	if err != nil {
		s.world.answers = append(s.world.answers, rangeIn(err.Error())...)
	}
	return nil
}

var validRange = regexp.MustCompile(`range of valid IPs is ([0-9a-fA-F.:]+/[0-9]+)`)

// rangeIn finds the ranges that a refusal names. The words are those of every
// version since 1.10; were they ever others, nothing is found.
func rangeIn(refusal string) []netip.Prefix {
	var found []string
	for _, m := range validRange.FindAllStringSubmatch(refusal, -1) {
		found = append(found, m[1])
	}
	return parsePrefixes(found)
}

func parsePrefixes(all []string) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, s := range all {
		if p, err := netip.ParsePrefix(strings.TrimSpace(s)); err == nil {
			prefixes = append(prefixes, p.Masked())
		}
	}
	return prefixes
}

func reduceRange(o runtime.Object) []netip.Prefix {
	r, ok := o.(*networkingv1.ServiceCIDR)
	if !ok {
		return nil
	}
	return parsePrefixes(r.Spec.CIDRs)
}

func reduceNode(o runtime.Object) []netip.Prefix {
	n, ok := o.(*corev1.Node)
	if !ok {
		return nil
	}
	return parsePrefixes(append(n.Spec.PodCIDRs, n.Spec.PodCIDR))
}

// reducePod keeps the addresses that are the pod's own, not its node's.
func reducePod(o runtime.Object) []netip.Addr {
	p, ok := o.(*corev1.Pod)
	if !ok || p.Spec.HostNetwork {
		return nil
	}
	all := []string{p.Status.PodIP}
	for _, ip := range p.Status.PodIPs {
		all = append(all, ip.IP)
	}
	return parseAddrs(all)
}

// follow keeps up to date whatever the survey could read.
func (s *survey) follow(ctx context.Context, g *errgroup.Group) {
	c, w := s.cluster, s.world
	pods := !s.noPods && !s.podsKnown()
	if !s.noNodes {
		g.Go(follower[[]netip.Prefix]{c.nodes(), reduceNode, into(s, w.nodes), s.failed}.following(ctx))
	}
	if len(w.ranges) > 0 {
		g.Go(follower[[]netip.Prefix]{c.serviceCIDRs(), reduceRange, into(s, w.ranges), s.failed}.following(ctx))
	} else if !s.noServices {
		reduce := func(o runtime.Object) []netip.Addr { return reduceService(o).ClusterIPs }
		g.Go(follower[[]netip.Addr]{c.services(s.servicesIn), reduce, into(s, w.services), s.failed}.following(ctx))
	}
	if pods {
		g.Go(follower[[]netip.Addr]{c.runningPods(s.podsIn), reducePod, into(s, w.pods), s.failed}.following(ctx))
	}
}

func (s *survey) failed(err error) { s.cluster.log.Debug("watch", "err", err) }

func into[V any](s *survey, m map[key]V) func(delta[V]) {
	return func(d delta[V]) {
		s.mu.Lock()
		defer s.mu.Unlock()
		d.onto(m)
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
}

// reportTo reports when there are other prefixes. It waits a little first, as
// nodes and pods come in crowds. That one more pod was seen where there are some
// already is not worth a report.
func (s *survey) reportTo(ctx context.Context, report func([]Route)) error {
	last := s.routes()
	report(last)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.changed:
		}
		if err := pause(ctx, settle); err != nil {
			return err
		}
		if now := s.routes(); !slices.EqualFunc(now, last, samePrefix) {
			last = now
			report(now)
		}
	}
}

func samePrefix(a, b Route) bool { return a.Prefix == b.Prefix && a.Kind == b.Kind }

func (s *survey) routes() []Route {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.world.routes()
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
