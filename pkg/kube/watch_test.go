package kube

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/culvert-dev/culvert/pkg/catalog"
)

const patience = 10 * time.Second

func ptr[T any](v T) *T { return &v }

func addrs(all ...string) []netip.Addr { return parseAddrs(all) }

// shelf is a Sink that a test can wait on.
type shelf struct {
	t        *testing.T
	busy     atomic.Bool
	mu       sync.Mutex
	moved    chan struct{}
	services map[key]catalog.Service
	names    []string
	scope    catalog.Scope
	puts     int
}

func newShelf(t *testing.T) *shelf {
	return &shelf{t: t, moved: make(chan struct{}), services: map[key]catalog.Service{}}
}

func (s *shelf) do(f func()) {
	if s.busy.Swap(true) {
		s.t.Error("two calls of the sink at once")
	}
	s.mu.Lock()
	f()
	close(s.moved)
	s.moved = make(chan struct{})
	s.mu.Unlock()
	s.busy.Store(false)
}

func (s *shelf) PutService(v catalog.Service) {
	s.do(func() { s.services[key{v.Namespace, v.Name}] = v; s.puts++ })
}
func (s *shelf) DropService(namespace, name string) {
	s.do(func() { delete(s.services, key{namespace, name}) })
}
func (s *shelf) SetNamespaces(names []string) { s.do(func() { s.names = names }) }
func (s *shelf) SetScope(scope catalog.Scope) { s.do(func() { s.scope = scope }) }

func (s *shelf) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.services)
}

// until waits for what must become true.
func (s *shelf) until(what string, ok func() bool) {
	s.t.Helper()
	limit := time.After(patience)
	for {
		s.mu.Lock()
		done, moved := ok(), s.moved
		s.mu.Unlock()
		if done {
			return
		}
		select {
		case <-moved:
		case <-limit:
			s.mu.Lock()
			defer s.mu.Unlock()
			s.t.Fatalf("never: %s\nscope %+v\nnames %v\nservices %+v", what, s.scope, s.names, s.services)
		}
	}
}

// gate is an API server whose rights can be changed.
type gate struct {
	mu     sync.Mutex
	denied func(verb, resource, namespace string) bool
	opened chan string // a watch was opened on this resource
	open   []watch.Interface
}

func (g *gate) deny(denied func(verb, resource, namespace string) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.denied = denied
}

// cut ends all watches, as a restarted server does.
func (g *gate) cut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, w := range g.open {
		w.Stop()
	}
	g.open = nil
}

func (g *gate) refuses(a clienttesting.Action) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.denied != nil && g.denied(a.GetVerb(), a.GetResource().Resource, a.GetNamespace())
}

func fakeCluster(objects ...runtime.Object) (*Cluster, *gate) {
	client := fake.NewClientset(objects...)
	g := &gate{opened: make(chan string, 100)}
	client.PrependReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if g.refuses(a) {
			return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "", nil)
		}
		return false, nil, nil
	})
	client.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
		if g.refuses(a) {
			return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "", nil)
		}
		w, err := client.Tracker().Watch(a.GetResource(), a.GetNamespace())
		if err == nil {
			g.mu.Lock()
			g.open = append(g.open, w)
			g.mu.Unlock()
			g.opened <- a.GetResource().Resource
		}
		return true, w, err
	})
	return &Cluster{Namespace: "shop", client: client, log: slog.New(slog.DiscardHandler)}, g
}

// watching runs Watch until the test is over, and returns what was missing.
func watching(t *testing.T, c *Cluster, sink catalog.Sink, further ...string) (missing func() []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	var mu sync.Mutex
	var told []string
	go func() {
		done <- c.Watch(ctx, sink, func(s string) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, s)
		}, further...)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch ended with %v", err)
		}
		if c.http == nil { // else its connections are closed later
			goleak.VerifyNone(t)
		}
	})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(told)
		return slices.Clone(told)
	}
}

// opened waits for n more watches to be open, tries included.
func (g *gate) wait(t *testing.T, n int) {
	t.Helper()
	for range n {
		select {
		case <-g.opened:
		case <-time.After(patience):
			t.Fatal("a watch was not opened")
		}
	}
}

func named(namespace, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name}
}

func sliceOf(namespace, name, service string, ports []discoveryv1.EndpointPort, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: named(namespace, name), Ports: ports, Endpoints: endpoints}
	s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	return s
}

func endpoint(ready *bool, hostname string, addrs ...string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: addrs, Conditions: discoveryv1.EndpointConditions{Ready: ready}}
	if hostname != "" {
		e.Hostname = &hostname
	}
	return e
}

func shop() []runtime.Object {
	http := []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(8080)), Protocol: ptr(corev1.ProtocolTCP)}}
	admin := []discoveryv1.EndpointPort{{Name: ptr("admin"), Port: ptr(int32(9090)), Protocol: ptr(corev1.ProtocolTCP)}}
	return []runtime.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "empty"}},
		&corev1.Service{ObjectMeta: named("shop", "web"), Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.20", ClusterIPs: []string{"10.96.0.20", "fd00:96::20"},
			Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53}},
		}},
		sliceOf("shop", "web-4", "web", http, endpoint(nil, "", "10.244.0.4"), endpoint(ptr(true), "", "10.244.0.5"), endpoint(ptr(false), "", "10.244.0.6")),
		sliceOf("shop", "web-4b", "web", admin, endpoint(ptr(true), "", "10.244.0.5"), endpoint(ptr(true), "", "10.244.0.5")),
		sliceOf("shop", "web-6", "web", http, endpoint(ptr(true), "", "fd00:244::5")),
		&corev1.Service{ObjectMeta: named("shop", "db"), Spec: corev1.ServiceSpec{ClusterIP: "None", ClusterIPs: []string{"None"}}},
		sliceOf("shop", "db-1", "db", nil, endpoint(ptr(true), "db-0", "10.244.1.7"), endpoint(ptr(true), "db-1", "10.244.1.8")),
		&corev1.Service{ObjectMeta: named("other", "out"), Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.org"}},
		sliceOf("other", "stray", "nobody", http, endpoint(nil, "", "10.244.9.9")),
	}
}

func TestWatchReadsServices(t *testing.T) {
	c, _ := fakeCluster(shop()...)
	sink := newShelf(t)
	missing := watching(t, c, sink)
	sink.until("scope all", func() bool { return sink.scope.All })
	http, admin := catalog.Port{Name: "http", Protocol: "tcp", Port: 8080}, catalog.Port{Name: "admin", Protocol: "tcp", Port: 9090}
	want := map[key]catalog.Service{
		{"shop", "web"}: {
			Namespace: "shop", Name: "web", ClusterIPs: addrs("10.96.0.20", "fd00:96::20"),
			Ports: []catalog.Port{{Name: "http", Protocol: "tcp", Port: 80}, {Name: "dns", Protocol: "udp", Port: 53}},
			Endpoints: []catalog.Endpoint{
				{Addr: addrs("10.244.0.4")[0], Ports: []catalog.Port{http}},
				{Addr: addrs("10.244.0.5")[0], Ports: []catalog.Port{http, admin}},
				{Addr: addrs("fd00:244::5")[0], Ports: []catalog.Port{http}},
			},
		},
		{"shop", "db"}: {
			Namespace: "shop", Name: "db", Headless: true,
			Endpoints: []catalog.Endpoint{{Addr: addrs("10.244.1.7")[0], Hostname: "db-0"}, {Addr: addrs("10.244.1.8")[0], Hostname: "db-1"}},
		},
		{"other", "out"}: {Namespace: "other", Name: "out", ExternalName: "example.org"},
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if !reflect.DeepEqual(sink.services, want) {
		t.Errorf("services:\n%+v\nwant\n%+v", sink.services, want)
	}
	if sink.puts != len(want) {
		t.Errorf("%d calls for %d services", sink.puts, len(want))
	}
	if want := []string{"empty", "shop"}; !slices.Equal(sink.names, want) {
		t.Errorf("namespaces %v, want %v", sink.names, want)
	}
	if m := missing(); m != nil {
		t.Errorf("missing %q", m)
	}
}

func TestWatchFollowsChanges(t *testing.T) {
	c, g := fakeCluster(shop()...)
	sink := newShelf(t)
	watching(t, c, sink)
	sink.until("scope all", func() bool { return sink.scope.All })
	g.wait(t, 6)
	ctx := t.Context()
	core, discovery := c.client.CoreV1(), c.client.DiscoveryV1()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	_, err := core.Services("shop").Create(ctx, &corev1.Service{ObjectMeta: named("shop", "late"), Spec: corev1.ServiceSpec{ClusterIP: "None"}}, metav1.CreateOptions{})
	must(err)
	sink.until("late is there", func() bool { return sink.services[key{"shop", "late"}].Headless })
	_, err = discovery.EndpointSlices("shop").Create(ctx, sliceOf("shop", "late-1", "late", nil, endpoint(nil, "", "10.244.0.30")), metav1.CreateOptions{})
	must(err)
	sink.until("late has an endpoint", func() bool { return len(sink.services[key{"shop", "late"}].Endpoints) == 1 })
	must(discovery.EndpointSlices("shop").Delete(ctx, "late-1", metav1.DeleteOptions{}))
	sink.until("late has none", func() bool { return len(sink.services[key{"shop", "late"}].Endpoints) == 0 })
	must(core.Services("shop").Delete(ctx, "late", metav1.DeleteOptions{}))
	sink.until("late is gone", func() bool { _, ok := sink.services[key{"shop", "late"}]; return !ok })

	// A slice may change its Service.
	_, err = discovery.EndpointSlices("shop").Update(ctx, sliceOf("shop", "db-1", "web", nil, endpoint(nil, "", "10.244.1.7")), metav1.UpdateOptions{})
	must(err)
	sink.until("web has it", func() bool { return len(sink.services[key{"shop", "web"}].Endpoints) == 4 })
	sink.until("db has it not", func() bool { return len(sink.services[key{"shop", "db"}].Endpoints) == 0 })

	_, err = core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "new"}}, metav1.CreateOptions{})
	must(err)
	sink.until("new namespace", func() bool { return slices.Contains(sink.names, "new") })
	must(core.Namespaces().Delete(ctx, "new", metav1.DeleteOptions{}))
	sink.until("namespace gone", func() bool { return !slices.Contains(sink.names, "new") })
}

func TestWatchWithinNamespaces(t *testing.T) {
	c, g := fakeCluster(shop()...)
	g.deny(func(verb, resource, namespace string) bool {
		return namespace == "" || namespace == "secret" && resource == "endpointslices" && verb == "watch"
	})
	sink := newShelf(t)
	missing := watching(t, c, sink, "secret", "other", "shop", "")
	want := []string{"other", "shop"}
	sink.until("scope of two", func() bool { return slices.Equal(sink.scope.Namespaces, want) })
	sink.until("names of two", func() bool { return slices.Equal(sink.names, want) })
	sink.until("three services", func() bool { return len(sink.services) == 3 })
	if sink.scope.All {
		t.Error("scope is all")
	}
	lines := []string{
		"list endpointslices in all namespaces",
		"list namespaces",
		"list services in all namespaces",
		"watch endpointslices in namespace secret",
	}
	if m := missing(); !slices.Equal(m, lines) {
		t.Errorf("missing %q, want %q", m, lines)
	}
}

func TestWatchWithoutRights(t *testing.T) {
	c, g := fakeCluster(shop()...)
	g.deny(func(string, string, string) bool { return true })
	sink := newShelf(t)
	told := make(chan string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Watch(ctx, sink, func(s string) { told <- s }) }()
	for range 5 {
		<-told
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	goleak.VerifyNone(t)
	if len(sink.services) > 0 || sink.scope.All || len(sink.scope.Namespaces) > 0 || len(told) > 0 {
		t.Errorf("services %v, scope %v, told %d more", sink.services, sink.scope, len(told))
	}
}

func TestWatchLosesAndRegainsRights(t *testing.T) {
	c, g := fakeCluster(shop()...)
	sink := newShelf(t)
	missing := watching(t, c, sink)
	sink.until("scope all", func() bool { return sink.scope.All })
	g.wait(t, 6)
	g.deny(func(_, resource, _ string) bool { return resource == "endpointslices" })
	g.cut()
	sink.until("nothing is held", func() bool { return !sink.scope.All && len(sink.services) == 0 })
	g.deny(nil)
	sink.until("all is held again", func() bool { return sink.scope.All && len(sink.services) == 3 })
	if m := missing(); !slices.Equal(m, []string{"watch endpointslices in all namespaces"}) {
		t.Errorf("missing %q", m)
	}
}

// tape is a source whose answers are written down beforehand.
type tape struct {
	lists   chan playedList
	watches chan playedWatch
	asked   chan string // versions asked for
}

type playedList struct {
	list runtime.Object
	err  error
}

type playedWatch struct {
	w   watch.Interface
	err error
}

func (p *tape) source() source {
	return source{
		name: "services",
		list: func(ctx context.Context, _ metav1.ListOptions) (runtime.Object, error) {
			select {
			case l := <-p.lists:
				return l.list, l.err
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			select {
			case w := <-p.watches:
				p.asked <- o.ResourceVersion
				return w.w, w.err
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	}
}

func serviceList(version string, names ...string) *corev1.ServiceList {
	l := &corev1.ServiceList{ListMeta: metav1.ListMeta{ResourceVersion: version}}
	for _, n := range names {
		l.Items = append(l.Items, corev1.Service{ObjectMeta: named("shop", n)})
	}
	return l
}

func TestFollowerOutlivesTheServer(t *testing.T) {
	p := &tape{make(chan playedList, 10), make(chan playedWatch, 10), make(chan string, 10)}
	deltas := make(chan delta[string], 10)
	failures := make(chan error, 100)
	f := follower[string]{
		source: p.source(),
		reduce: func(o runtime.Object) string { return keyOf(o).name },
		apply:  func(d delta[string]) { deltas <- d },
		failed: func(err error) { failures <- err },
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { f.run(ctx); close(ended) }()
	next := func(whole bool, put, drop int) {
		t.Helper()
		select {
		case d := <-deltas:
			if d.whole != whole || len(d.put) != put || len(d.drop) != drop {
				t.Fatalf("delta %+v, want whole %v, %d put, %d dropped", d, whole, put, drop)
			}
		case <-time.After(patience):
			t.Fatal("no delta")
		}
	}
	asked := func(want string) {
		t.Helper()
		if v := <-p.asked; v != want {
			t.Fatalf("watched from %q, want %q", v, want)
		}
	}
	service := func(version, name string) *corev1.Service {
		s := &corev1.Service{ObjectMeta: named("shop", name)}
		s.ResourceVersion = version
		return s
	}

	// The server is away, then there.
	p.lists <- playedList{err: errors.New("connection refused")}
	<-failures
	p.lists <- playedList{list: serviceList("10", "a", "b")}
	next(true, 2, 0)
	w := watch.NewFake()
	p.watches <- playedWatch{w: w}
	asked("10")
	w.Add(service("11", "c"))
	next(false, 1, 0)
	w.Action(watch.Bookmark, service("20", ""))
	// It restarts: the watch goes on where it was, nothing is listed.
	w.Stop()
	p.watches <- playedWatch{err: errors.New("connection refused")}
	asked("20")
	<-failures
	w = watch.NewFake()
	p.watches <- playedWatch{w: w}
	asked("20")
	w.Delete(service("21", "a"))
	next(false, 0, 1)
	// The version is forgotten: a list says what is gone.
	w.Error(&apierrors.NewResourceExpired("too old").ErrStatus)
	p.lists <- playedList{list: serviceList("30", "c")}
	next(true, 1, 0)
	// A version from the future, as after a restore.
	p.watches <- playedWatch{err: apierrors.NewTimeoutError("x", 1)}
	asked("30")
	<-failures
	p.watches <- playedWatch{err: &apierrors.StatusError{ErrStatus: metav1.Status{Details: &metav1.StatusDetails{
		Causes: []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge}},
	}}}}
	asked("30")
	p.lists <- playedList{list: serviceList("5", "c")}
	next(true, 1, 0)
	p.watches <- playedWatch{err: apierrors.NewForbidden(schema.GroupResource{Resource: "services"}, "", nil)}
	asked("5")
	if err := <-failures; !forbidden(err) {
		t.Errorf("failure %v", err)
	}
	cancel()
	<-ended
	goleak.VerifyNone(t)
}

func TestSourceReadsInPages(t *testing.T) {
	var asked []string
	s := source{name: "services", list: func(_ context.Context, o metav1.ListOptions) (runtime.Object, error) {
		asked = append(asked, o.Continue)
		l := serviceList("7", "p"+o.Continue)
		if len(asked) < 3 {
			l.Continue = string(rune('0' + len(asked)))
		}
		return l, nil
	}}
	var seen []string
	version, err := s.each(t.Context(), func(o runtime.Object) bool { seen = append(seen, keyOf(o).name); return true })
	if err != nil || version != "7" || !slices.Equal(seen, []string{"p", "p1", "p2"}) {
		t.Errorf("version %q, seen %v, err %v", version, seen, err)
	}
	asked, seen = nil, nil
	_, err = s.each(t.Context(), func(o runtime.Object) bool { seen = append(seen, keyOf(o).name); return len(seen) < 2 })
	if err != nil || len(seen) != 2 || len(asked) != 2 {
		t.Errorf("stopped: seen %v, asked %v, err %v", seen, asked, err)
	}
}

// Who may list and not watch asks again now and then, not all the time.
func TestFollowerWithoutTheRightToWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists := 0
		f := follower[string]{
			source: source{
				name: "nodes",
				list: func(context.Context, metav1.ListOptions) (runtime.Object, error) {
					lists++
					return serviceList("1", "a"), nil
				},
				watch: func(context.Context, metav1.ListOptions) (watch.Interface, error) {
					return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", nil)
				},
			},
			reduce: func(o runtime.Object) string { return keyOf(o).name },
			apply:  func(delta[string]) {},
			failed: func(error) {},
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute+30*time.Second)
		defer cancel()
		f.run(ctx)
		if lists < 10 || lists > 12 {
			t.Errorf("%d lists in ten minutes", lists)
		}
	})
}
