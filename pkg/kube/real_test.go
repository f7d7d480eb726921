package kube

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/culvert-dev/culvert/pkg/catalog"
)

// realCluster is the one of the e2e harness. The tests that use it must run
// where its API server is reached.
func realCluster(t *testing.T, namespace string) *Cluster {
	t.Helper()
	kubeconfig := os.Getenv("CULVERT_E2E_KUBECONFIG")
	if kubeconfig == "" {
		t.Skip("CULVERT_E2E_KUBECONFIG is not set: no real cluster")
	}
	c, err := Load(Config{Kubeconfig: kubeconfig, Namespace: namespace})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	return c.over(t, &line{}, namespace, "")
}

// over is the cluster by way of a line of its own, as a user ("" is the same).
func (c *Cluster) over(t *testing.T, l *line, namespace, user string) *Cluster {
	t.Helper()
	config := rest.CopyConfig(c.config)
	config.Dial, config.Impersonate.UserName = l.dial, user
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfigAndClient(config, httpClient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.set(true) })
	return &Cluster{Context: c.Context, Namespace: namespace, Server: c.Server, client: client, config: config, log: c.log, http: httpClient, conns: &conns{}, credentials: &credentials{}}
}

// line is the way to the API server, which can be cut.
type line struct {
	mu    sync.Mutex
	cut   bool
	conns []net.Conn
}

func (l *line) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		c.Close()
		return nil, syscall.ECONNREFUSED
	}
	l.conns = append(l.conns, c)
	return c, nil
}

func (l *line) set(cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

// realNamespace makes one that is gone after the test.
func realNamespace(t *testing.T, c *Cluster) string {
	t.Helper()
	ns, err := c.client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "culvert-test-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.client.CoreV1().Namespaces().Delete(context.Background(), ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	return ns.Name
}

// as is the cluster as somebody else sees it, who has these rights in one
// namespace and no others.
func (c *Cluster) as(t *testing.T, namespace string, rules ...rbacv1.PolicyRule) *Cluster {
	t.Helper()
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}, Rules: rules}
	role, err := c.client.RbacV1().Roles(namespace).Create(t.Context(), role, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	user := namespace + "-" + role.Name
	_, err = c.client.RbacV1().RoleBindings(namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return c.over(t, &line{}, namespace, user)
}

func rule(group, resource string, verbs ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: verbs}
}

func serviceOf(name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
}

func TestRealWatch(t *testing.T) {
	c := realCluster(t, "shop")
	namespace := realNamespace(t, c)
	sink := newShelf(t)
	missing := watching(t, c, sink)
	sink.until("scope all", func() bool { return sink.scope.All })
	sink.mu.Lock()
	web, kubernetes := sink.services[key{"shop", "web"}], sink.services[key{"default", "kubernetes"}]
	named := slices.Contains(sink.names, namespace)
	sink.mu.Unlock()
	if len(web.ClusterIPs) != 1 || len(web.Endpoints) != 2 || !slices.Equal(web.Ports, []catalog.Port{{Name: "http", Protocol: "tcp", Port: 80}}) {
		t.Errorf("web: %+v", web)
	}
	if len(kubernetes.ClusterIPs) != 1 || len(kubernetes.Endpoints) == 0 {
		t.Errorf("kubernetes: %+v", kubernetes)
	}
	if !named || missing() != nil {
		t.Errorf("%s in namespaces: %v; missing %q", namespace, named, missing())
	}
	began := time.Now()
	if _, err := c.client.CoreV1().Services(namespace).Create(t.Context(), serviceOf("late"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	sink.until("late is there", func() bool { return len(sink.services[key{namespace, "late"}].ClusterIPs) == 1 })
	if took := time.Since(began); took > time.Second {
		t.Errorf("a new Service took %v", took)
	} else {
		t.Logf("a new Service took %v", took)
	}
	if err := c.client.CoreV1().Services(namespace).Delete(t.Context(), "late", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	sink.until("late is gone", func() bool { _, ok := sink.services[key{namespace, "late"}]; return !ok })
}

func TestRealWatchWithinNamespace(t *testing.T) {
	admin := realCluster(t, "shop")
	namespace := realNamespace(t, admin)
	c := admin.as(t, namespace, rule("", "services", "list", "watch"), rule("discovery.k8s.io", "endpointslices", "list", "watch"))
	sink := newShelf(t)
	missing := watching(t, c, sink, "shop")
	sink.until("scope of one", func() bool { return slices.Equal(sink.scope.Namespaces, []string{namespace}) })
	want := []string{
		"list endpointslices in all namespaces", "list endpointslices in namespace shop", "list namespaces",
		"list services in all namespaces", "list services in namespace shop",
	}
	if m := missing(); !slices.Equal(m, want) {
		t.Errorf("missing %q, want %q", m, want)
	}
	if _, err := admin.client.CoreV1().Services(namespace).Create(t.Context(), serviceOf("late"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	sink.until("late is there", func() bool { return len(sink.services[key{namespace, "late"}].ClusterIPs) == 1 })
	sink.until("nothing else is", func() bool { return len(sink.services) == 1 })
}

// The API server is away for some seconds, as far as the watch can see. With a
// command in CULVERT_E2E_RESTART it really is.
func TestRealWatchOutlivesTheServer(t *testing.T) {
	admin := realCluster(t, "shop")
	namespace := realNamespace(t, admin)
	l := &line{}
	sink := newShelf(t)
	watching(t, admin.over(t, l, "shop", ""), sink)
	sink.until("scope all", func() bool { return sink.scope.All })
	before := sink.count()
	if restart := os.Getenv("CULVERT_E2E_RESTART"); restart != "" {
		if out, err := exec.CommandContext(t.Context(), "sh", "-c", restart).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	} else {
		l.set(true)
		pause(t.Context(), 3*time.Second)
	}
	if after := sink.count(); after != before {
		t.Errorf("%d services where there were %d", after, before)
	}
	create := func() error {
		_, err := admin.client.CoreV1().Services(namespace).Create(t.Context(), serviceOf("late"), metav1.CreateOptions{})
		return err
	}
	for err := create(); err != nil; err = create() {
		if pause(t.Context(), 100*time.Millisecond) != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	l.set(false)
	sink.until("late is there", func() bool { return len(sink.services[key{namespace, "late"}].ClusterIPs) == 1 })
	t.Logf("a new Service took %v once the server was back", time.Since(began))
	sink.until("still all", func() bool { return sink.scope.All })
}

// has tells whether a route of that kind and source covers prefix.
func has(routes []Route, kind, source string, prefix netip.Prefix) bool {
	return slices.ContainsFunc(routes, func(r Route) bool {
		return r.Kind == kind && strings.HasPrefix(r.Source, source) && r.Prefix.Overlaps(prefix) && r.Prefix.Bits() <= prefix.Bits()
	})
}

func TestRealCIDRs(t *testing.T) {
	admin := realCluster(t, "shop")
	routes, missing, err := admin.CIDRs(t.Context(), Hint{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("admin: %q", lines(routes))
	for service, pod := range map[string]string{"10.96.0.0/16": "10.244.0.0/24", "fd00:10:96::/112": "fd00:10:244::/64"} {
		services, pods := netip.MustParsePrefix(service), netip.MustParsePrefix(pod)
		if !has(routes, "service", "ServiceCIDR kubernetes", services) || !has(routes, "pod", "node ", pods) || len(missing) > 0 {
			t.Errorf("admin: %q, missing %q", lines(routes), missing)
		}
	}

	namespace := realNamespace(t, admin)
	asker := admin.as(t, namespace, rule("", "services", "list", "create"))
	routes, missing, err = asker.CIDRs(t.Context(), Hint{Pods: addrs("10.244.0.9", "fd00:10:244::9")})
	want := []string{"list nodes", "list pods in all namespaces"}
	if err != nil || !slices.Equal(missing, want) || !slices.Equal(lines(routes), []string{
		"service 10.96.0.0/16 dry-run answer", "service fd00:10:96::/112 dry-run answer",
		"pod 10.244.0.0/24 observed: 1 pod", "pod fd00:10:244::/64 observed: 1 pod",
	}) {
		t.Errorf("asker: %q, missing %q, %v", lines(routes), missing, err)
	}
	if _, err := admin.client.CoreV1().Services(namespace).Create(t.Context(), serviceOf("one"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	all, err := admin.client.CoreV1().Services(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(all.Items) != 1 {
		t.Errorf("asking left %d services, %v", len(all.Items), err)
	}
	looker := admin.as(t, namespace, rule("", "services", "list"))
	routes, missing, err = looker.CIDRs(t.Context(), Hint{})
	if err != nil || len(missing) != 4 || len(routes) != 1 || routes[0].Source != "observed: 1 service" {
		t.Errorf("looker: %q, missing %q, %v", lines(routes), missing, err)
	}
	nobody := admin.as(t, namespace)
	routes, missing, err = nobody.CIDRs(t.Context(), Hint{})
	if err != nil || len(missing) != 4 || len(routes) != 0 {
		t.Errorf("nobody: %q, missing %q, %v", lines(routes), missing, err)
	}
}

func TestRealSecondServiceCIDR(t *testing.T) {
	admin := realCluster(t, "shop")
	namespace := realNamespace(t, admin)
	asker := admin.as(t, namespace, rule("", "services", "list", "watch", "create"))
	reports := make(chan []Route, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- admin.WatchCIDRs(ctx, Hint{}, func(r []Route) { reports <- r }) }()
	defer func() { cancel(); <-done }()
	<-reports
	second := netip.MustParsePrefix("10.111.7.0/28")
	cidrs := admin.client.NetworkingV1().ServiceCIDRs()
	made, err := cidrs.Create(t.Context(), &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "culvert-test-"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{second.String()}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { // it goes when the last address of it is free
		for !apierrors.IsNotFound(cidrs.Delete(context.Background(), made.Name, metav1.DeleteOptions{})) {
			if pause(t.Context(), 100*time.Millisecond) != nil {
				t.Errorf("%s is still there", made.Name)
				return
			}
		}
	}()
	select {
	case r := <-reports:
		if !has(r, "service", "ServiceCIDR "+made.Name, second) {
			t.Errorf("watched: %q", lines(r))
		}
	case <-time.After(patience):
		t.Error("the new ServiceCIDR was not reported")
	}
	// The server answers with one of its ranges; what it does not say is seen
	// as soon as a Service is there.
	s := serviceOf("there")
	s.Spec.ClusterIP = "10.111.7.5"
	for range 50 {
		if _, err = admin.client.CoreV1().Services(namespace).Create(t.Context(), s, metav1.CreateOptions{}); err == nil {
			break
		}
		pause(t.Context(), 100*time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	both := 0
	for range 10 {
		routes, _, err := asker.CIDRs(t.Context(), Hint{})
		if err != nil {
			t.Fatal(err)
		}
		if !has(routes, "service", "", netip.PrefixFrom(netip.MustParseAddr("10.111.7.5"), 32)) {
			t.Errorf("not covered: %q", lines(routes))
		}
		if has(routes, "service", "dry-run answer", second) && has(routes, "service", "dry-run answer", netip.MustParsePrefix("10.96.0.0/16")) {
			both++
		}
	}
	t.Logf("both ranges were answered in %d of 10 surveys", both)
	if err := admin.client.CoreV1().Services(namespace).Delete(t.Context(), "there", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}
