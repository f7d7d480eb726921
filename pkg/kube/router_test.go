package kube

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"
)

// routerRights are those of who may do all that an exchange asks for.
func routerRights(mode Mode) *Rights {
	held := map[string]bool{}
	for _, r := range exchangeRights() {
		for _, verb := range r.verbs {
			held[r.key(verb)] = true
		}
	}
	r := weigh(exchangeRights(), held, "dev")
	r.Mode = mode
	return r
}

// routerCluster has the Service web with two pods, and gives addresses out.
func routerCluster(more ...runtime.Object) (*Cluster, *fake.Clientset) {
	client := fake.NewClientset(append(more, testService("web"), testPod("web-1", "web", 8080), testPod("web-2", "web", 8080))...)
	client.PrependReactor("create", "services", withAddress)
	return testCluster(client), client
}

func withAddress(a clienttesting.Action) (bool, runtime.Object, error) {
	a.(clienttesting.CreateAction).GetObject().(*corev1.Service).Spec.ClusterIP = "10.96.9.9"
	return false, nil, nil
}

func routerConfig(t *testing.T, c *Cluster, session string) ShadowConfig {
	t.Helper()
	cfg := testConfig(session)
	cfg.Router = &RouterConfig{ClientKey: []byte("client"), HostPublic: []byte("public"), Protocols: map[string]string{"tcp/80": "http"}}
	var err error
	if cfg.Router.Service, err = c.FindService(t.Context(), Target{"service", "web"}); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func exposeConfig(session string) ShadowConfig {
	cfg := testConfig(session)
	cfg.Router = &RouterConfig{ClientKey: []byte("client"), HostPublic: []byte("public"), Expose: &Expose{
		Name: "preview", Ports: []ServicePort{{Port: 80, Target: 8080, AppProtocol: "http"}, {Network: "udp", Port: 53}},
	}}
	return cfg
}

// What a router is made of, as the API server gets it.
func TestRouterGolden(t *testing.T) {
	affinity, families, seconds := corev1.IPFamilyPolicyPreferDualStack, []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}, int32(60)
	full := testService("web", func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ClusterIPs, s.Spec.ExternalIPs = corev1.ServiceTypeNodePort, []string{"fd00::1", "10.96.1.1"}, []string{"192.0.2.1"}
		s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = "ClientIP", &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
		s.Spec.IPFamilyPolicy, s.Spec.IPFamilies = &affinity, families
		s.Spec.Ports[0].NodePort = 30080
		s.Spec.Ports = append(s.Spec.Ports,
			corev1.ServicePort{Name: "dns", Port: 5353, TargetPort: intstr.FromString("http"), Protocol: corev1.ProtocolUDP},
			corev1.ServicePort{Name: "alt", Port: 8080, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP})
	})
	c := testCluster(fake.NewClientset(full, testPod("web-1", "web", 8080)))
	for name, cfg := range map[string]ShadowConfig{"router": routerConfig(t, c, "a1b2c3"), "expose": exposeConfig("a1b2c3")} {
		o := testObjects(t, cfg)
		if o.exposed != nil { // its time is now
			o.exposed.Annotations[annExpose] = ""
			lead(&o.deployment.Spec.Template.Spec.Containers[0], cfg.Router, true, "")
		} else {
			lead(&o.deployment.Spec.Template.Spec.Containers[0], cfg.Router, true, "fd00::9")
		}
		o.lease.UID = "uid-of-the-root"
		o.ownedBy(refTo("coordination.k8s.io/v1", "Lease", o.lease))
		golden(t, name, o.lease, o.secret, o.role, o.deployment, o.sibling, o.exposed)
		args := len(o.deployment.Spec.Template.Spec.Containers[0].Args)
		if withoutRights(&o.deployment.Spec.Template.Spec); len(o.deployment.Spec.Template.Spec.Containers[0].Args) != args-2 {
			t.Errorf("args without rights: %q", o.deployment.Spec.Template.Spec.Containers[0].Args)
		}
	}
}

// A router may use more memory than the shadow of one laptop, where nobody else
// lacks it then, and asks for no more.
func TestRouterMemory(t *testing.T) {
	o := testObjects(t, exposeConfig("a1b2c3"))
	want := o.deployment.Spec.Template.Spec.Containers[0].Resources
	left := func(limit string) []corev1.ResourceQuota {
		return []corev1.ResourceQuota{quota(map[corev1.ResourceName]string{"limits.memory": limit}, nil)}
	}
	for _, test := range []struct {
		name   string
		ranges []corev1.LimitRange
		quotas []corev1.ResourceQuota
		limit  string
	}{
		{name: "nothing asked", limit: "1Gi"},
		{name: "much left", quotas: left("16Gi"), limit: "1Gi"},
		{name: "a quarter of it", quotas: left("2Gi"), limit: "512Mi"},
		{name: "some left", quotas: left("600Mi"), limit: "256Mi"},
		{name: "little left", quotas: left("100Mi"), limit: "100Mi"},
		{name: "none left", quotas: left("0"), limit: "48Mi"},
		{name: "max", ranges: []corev1.LimitRange{limitRange(corev1.LimitRangeItem{Max: quantities("1", "300Mi")})}, limit: "300Mi"},
	} {
		got := fit(want, test.ranges, test.quotas)
		if have := got.Limits.Memory(); have.Cmp(resource.MustParse(test.limit)) != 0 {
			t.Errorf("%s: limit %s, want %s", test.name, have, test.limit)
		}
		if have := got.Requests.Memory(); have.Cmp(resource.MustParse("32Mi")) != 0 {
			t.Errorf("%s: request %s", test.name, have)
		}
	}
}

// golden compares objects with the file of that name, of those that are there.
func golden(t *testing.T, name string, objects ...metav1.Object) {
	t.Helper()
	var docs []string
	for _, o := range objects {
		if reflect.ValueOf(o).IsNil() {
			continue
		}
		text, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		docs = append(docs, string(text))
	}
	got, file := strings.Join(docs, "---\n"), filepath.Join("testdata", "golden", name+".yaml")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs:\n%s", file, got)
	}
}

func TestRouterOwnPort(t *testing.T) {
	cfg := exposeConfig("x1")
	cfg.Router.Expose.Ports[0].Target = port
	if _, err := render(cfg, "dev", Holder{}, func(*corev1.PodSpec) {}); err == nil || !strings.Contains(err.Error(), "7465") {
		t.Errorf("%v", err)
	}
}

// Every call of making a router fails in turn, once without and once with its
// effect: nothing of it is left, and the Service is as it was.
func TestRouterFailsInTurn(t *testing.T) {
	for _, mode := range []Mode{ByDeployment, ByBareDeployment} {
		for _, exposes := range []bool{false, true} {
			for _, effect := range []bool{false, true} {
				n := 0
				for failed := true; failed; n++ {
					synctest.Test(t, func(t *testing.T) { failed = routerFailing(t, mode, exposes, effect, n+1) })
				}
				if want := map[Mode]int{ByDeployment: 9, ByBareDeployment: 6}[mode]; n < want {
					t.Errorf("%s: only %d calls", mode, n-1)
				}
			}
		}
	}
}

func routerFailing(t *testing.T, mode Mode, exposes, effect bool, n int) (failed bool) {
	t.Helper()
	c, client := routerCluster(defaultDeny())
	cfg := exposeConfig("x1")
	if !exposes {
		cfg = routerConfig(t, c, "x1")
	}
	before := serviceNow(t, client)
	var mu sync.Mutex
	count := 0
	client.PrependReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		if !changes(a) {
			return false, nil, nil
		}
		if count++; count != n {
			return false, nil, nil
		}
		failed = true
		if create, ok := a.(clienttesting.CreateAction); ok && effect {
			if err := client.Tracker().Create(a.GetResource(), create.GetObject(), "dev"); err != nil {
				t.Error(err)
			}
		}
		return true, nil, errors.New("wire cut")
	})
	s := c.NewShadow(cfg, routerRights(mode))
	err := s.Create(t.Context(), nil)
	what := fmt.Sprintf("%s, exposes %v, call %d fails, effect %v", mode, exposes, n, effect)
	if err == nil {
		err = s.Swap(t.Context())
	}
	if failed != (err != nil) {
		t.Errorf("%s: %v", what, err)
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if left, err := c.find(t.Context(), "dev", ""); err != nil || len(left) > 0 {
		t.Errorf("%s: left %v, %v", what, left, err)
	}
	if after := serviceNow(t, client); !reflect.DeepEqual(before, after) {
		t.Errorf("%s: the service was %+v, and is %+v", what, before, after)
	}
	return failed
}

func serviceNow(t *testing.T, client *fake.Clientset) *corev1.Service {
	t.Helper()
	s, err := client.CoreV1().Services("dev").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.ManagedFields = nil
	return s
}

func startRouter(t *testing.T, c *Cluster, mode Mode, session string) *Shadow {
	t.Helper()
	s := c.NewShadow(routerConfig(t, c, session), routerRights(mode))
	if err := s.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return s
}

// A second laptop finds the router, joins it, and may be the one that ends it.
func TestOpenRouter(t *testing.T) {
	for _, mode := range []Mode{ByDeployment, ByBareDeployment} {
		c, client := routerCluster()
		first := startRouter(t, c, mode, "x1")
		if err := first.Swap(t.Context()); err != nil {
			t.Fatal(err)
		}
		found, err := c.FindService(t.Context(), Target{"service", "web"})
		if err != nil || found.Exchange == nil || found.Exchange.Session != "x1" || found.Exchange.By != Self().Owner() || found.Selector["app"] != "web" {
			t.Fatalf("%+v, %v", found, err)
		}
		second, keys, err := c.OpenRouter(t.Context(), "x1", Path{Way: SPDY}, routerRights(ByDeployment))
		if err != nil || string(keys.ClientKey) != "client" || string(keys.HostPublic) != "public" || second.Mode() != mode {
			t.Fatalf("%s: %+v, %q, %v", mode, second, keys, err)
		}
		if err := second.Create(t.Context(), nil); err == nil {
			t.Error("it is made twice")
		}
		second.holder = Holder{User: "joe", Host: "pc"}
		if err := second.renew(t.Context()); err != nil || *leaseOf(t, client).Spec.HolderIdentity != second.holder.String() {
			t.Errorf("%v, %+v", err, leaseOf(t, client).Spec)
		}
		if err := second.Delete(t.Context()); err != nil || serviceNow(t, client).Spec.Selector["app"] != "web" {
			t.Errorf("%v, %+v", err, serviceNow(t, client))
		}
		if err := first.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		if _, _, err := c.OpenRouter(t.Context(), "x1", Path{}, routerRights(mode)); !errors.Is(err, ErrGone) {
			t.Errorf("%v", err)
		}
	}
	c := testCluster(fake.NewClientset())
	if err := c.NewShadow(testConfig("x2"), allRights(ByDeployment)).Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.OpenRouter(t.Context(), "x2", Path{}, allRights(ByDeployment)); err == nil || errors.Is(err, ErrGone) {
		t.Errorf("a session that is none: %v", err)
	}
}

// The built-in role edit may not grant anything: its router has no rights.
func TestRouterMode(t *testing.T) {
	held := routerRights(ByDeployment).held
	delete(held, "here create rbac.authorization.k8s.io/roles")
	r := weigh(exchangeRights(), held, "dev")
	if r.Err() != nil || r.Mode != ByBareDeployment || len(r.Notices) != 1 || !strings.Contains(r.Notices[0], "culvert clean") {
		t.Errorf("%+v", r)
	}
	delete(held, "here patch /services")
	if r := weigh(exchangeRights(), held, "dev"); !errors.Is(r.Err(), ErrForbidden) || !strings.Contains(r.Err().Error(), "patch services in namespace dev") {
		t.Errorf("%v", r.Err())
	}
	both := weigh(rightsFor([]Need{Connect, Exchange}), map[string]bool{}, "dev")
	for i, line := range both.Missing {
		if slices.Contains(both.Missing[:i], line) {
			t.Errorf("twice: %q", line)
		}
	}
	c, client := routerCluster()
	s := startRouter(t, c, ByJob, "x1") // as connecting would have it
	for what, err := range map[string]error{
		"serviceaccount": second(client.CoreV1().ServiceAccounts("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})),
		"role":           second(client.RbacV1().Roles("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})),
		"rolebinding":    second(client.RbacV1().RoleBindings("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})),
	} {
		if !apierrors.IsNotFound(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if s.Mode() != ByBareDeployment {
		t.Errorf("mode %s", s.Mode())
	}
}

func second[T any](_ T, err error) error { return err }

func ingress(name string, pods map[string]string, from ...string) *netv1.NetworkPolicy {
	p := &netv1.NetworkPolicy{ObjectMeta: called(name), Spec: netv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: pods}}}
	for _, app := range from {
		p.Spec.Ingress = append(p.Spec.Ingress, netv1.NetworkPolicyIngressRule{From: []netv1.NetworkPolicyPeer{
			{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}},
		}})
	}
	return p
}

// Who may reach the original pods may reach the router, nobody else, and the
// router may reach them; no pod is shut in that was not before.
func TestRouterPolicies(t *testing.T) {
	egress := ingress("egress", nil)
	egress.Spec.PolicyTypes = []netv1.PolicyType{netv1.PolicyTypeEgress}
	for _, test := range []struct {
		name    string
		there   []runtime.Object
		want    []string // names of those that are made
		ingress string   // of the router
	}{
		{name: "none"},
		{name: "of other pods", there: []runtime.Object{ingress("db", map[string]string{"app": "db"}, "web")}},
		{"everything shut", []runtime.Object{ingress("deny", nil)}, []string{"culvert-x1", "culvert-x1-1"}, "7465 7465"},
		{"shut and opened", []runtime.Object{ingress("deny", nil), ingress("web", map[string]string{"app": "web"}, "shop")}, []string{"culvert-x1", "culvert-x1-1", "culvert-x1-2"}, "7465 7465 shop"},
		{"one pod only", []runtime.Object{ingress("one", map[string]string{"pod": "web-2"}, "shop", "till")}, []string{"culvert-x1", "culvert-x1-1"}, "7465 7465 shop till"},
		{"ways out", []runtime.Object{egress}, []string{"culvert-x1"}, "7465 7465 8080"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, client := routerCluster(test.there...)
			startRouter(t, c, ByDeployment, "x1")
			list, err := client.NetworkingV1().NetworkPolicies("dev").List(t.Context(), metav1.ListOptions{LabelSelector: labelManaged})
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, p := range list.Items {
				names = append(names, p.Name)
				if p.Name == "culvert-x1" {
					if got := ingressWords(p); got != test.ingress {
						t.Errorf("into the router: %q", got)
					}
					continue
				}
				to, ports := p.Spec.PodSelector, p.Spec.Ingress[0].Ports
				if len(to.MatchExpressions) != 1 || to.MatchExpressions[0].Key != "app" || len(ports) != 1 || ports[0].Port.StrVal != "http" ||
					p.Spec.Ingress[0].From[0].PodSelector.MatchLabels[labelSession] != "x1" || len(p.OwnerReferences) != 1 {
					t.Errorf("%s: %+v", p.Name, p.Spec)
				}
			}
			if slices.Sort(names); !slices.Equal(names, test.want) {
				t.Errorf("%q", names)
			}
		})
	}
}

func ingressWords(p netv1.NetworkPolicy) string {
	var words []string
	for _, rule := range p.Spec.Ingress {
		for _, port := range rule.Ports {
			words = append(words, port.Port.String())
		}
		for _, peer := range rule.From {
			words = append(words, peer.PodSelector.MatchLabels["app"])
		}
	}
	return strings.Join(words, " ")
}
