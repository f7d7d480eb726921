package kube

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func prefixes(all ...string) []netip.Prefix { return parsePrefixes(all) }

// lines makes routes readable: "service 10.96.0.0/16 ServiceCIDR kubernetes".
func lines(routes []Route) []string {
	var l []string
	for _, r := range routes {
		l = append(l, fmt.Sprintf("%s %s %s", r.Kind, r.Prefix, r.Source))
	}
	return l
}

func many(n int) []netip.Addr {
	var all []netip.Addr
	for i := range n {
		all = append(all, netip.AddrFrom4([4]byte{10, 20, 30, byte(i + 1)}))
	}
	return all
}

func TestRoutesC17(t *testing.T) {
	for name, tc := range map[string]struct {
		world world
		want  []string
	}{
		"nothing": {},
		"service objects alone": {
			world: world{
				ranges:          map[key][]netip.Prefix{{"", "kubernetes"}: prefixes("10.96.0.0/16", "fd00:96::/112"), {"", "more"}: prefixes("10.100.0.0/24")},
				kubeadmServices: prefixes("10.96.0.0/12"),
				answers:         prefixes("10.1.0.0/16"),
			},
			want: []string{
				"service 10.96.0.0/16 ServiceCIDR kubernetes",
				"service 10.100.0.0/24 ServiceCIDR more",
				"service fd00:96::/112 ServiceCIDR kubernetes",
			},
		},
		"kubeadm and the same answer": {
			world: world{kubeadmServices: prefixes("10.96.0.0/12"), answers: prefixes("10.96.0.0/12", "10.96.0.0/12", "172.20.0.0/16")},
			want:  []string{"service 10.96.0.0/12 dry-run answer", "service 172.20.0.0/16 dry-run answer"},
		},
		"a Service outside of the answer": {
			world: world{
				answers:  prefixes("10.96.0.0/16"),
				services: map[key][]netip.Addr{{"a", "in"}: addrs("10.96.0.1"), {"a", "out"}: addrs("10.111.7.9", "fd00:1::9")},
			},
			want: []string{"service 10.96.0.0/16 dry-run answer", "service 10.111.7.0/24 observed: 1 service", "service fd00:1::/112 observed: 1 service"},
		},
		"nodes": {
			world: world{nodes: map[key][]netip.Prefix{{"", "n1"}: prefixes("10.244.1.0/24", "fd00:244:1::/64"), {"", "n2"}: prefixes("10.244.0.0/24")}},
			want:  []string{"pod 10.244.0.0/24 node n2 podCIDR", "pod 10.244.1.0/24 node n1 podCIDR", "pod fd00:244:1::/64 node n1 podCIDR"},
		},
		"nodes within what kubeadm says": {
			world: world{nodes: map[key][]netip.Prefix{{"", "n1"}: prefixes("10.244.1.0/24")}, kubeadmPods: prefixes("10.244.0.0/16")},
			want:  []string{"pod 10.244.0.0/16 kubeadm-config"},
		},
		"pods elsewhere than nodes say": {
			world: world{
				nodes: map[key][]netip.Prefix{{"", "n1"}: prefixes("10.244.1.0/24")},
				pods:  map[key][]netip.Addr{{"a", "in"}: addrs("10.244.1.9"), {"a", "x"}: addrs("192.168.7.4"), {"b", "y"}: addrs("192.168.7.5"), {"b", "z"}: addrs("192.168.9.1")},
			},
			want: []string{"pod 10.244.1.0/24 node n1 podCIDR", "pod 192.168.7.0/24 observed: 2 pods", "pod 192.168.9.0/24 observed: 1 pod"},
		},
		"only seen": {
			world: world{pods: map[key][]netip.Addr{{"a", "x"}: many(12), {"a", "y"}: addrs("fd00:5::7")}},
			want:  []string{"pod 10.20.30.0/24 observed: 12 pods", "pod fd00:5::/64 observed: 1 pod"},
		},
		"halves are joined": {
			world: world{pods: map[key][]netip.Addr{{"a", "x"}: addrs("10.0.0.1", "10.0.1.1", "10.0.2.1", "10.0.3.1", "10.0.4.1")}},
			want:  []string{"pod 10.0.0.0/22 observed: 4 pods", "pod 10.0.4.0/24 observed: 1 pod"},
		},
		"hints": {
			world: world{hint: Hint{Pods: addrs("10.244.3.3", "10.244.3.3"), Services: addrs("10.96.0.10", "169.254.20.10", "127.0.0.1")}},
			want:  []string{"service 10.96.0.0/24 observed: 1 service", "pod 10.244.3.0/24 observed: 1 pod"},
		},
		"seen around an exact range": {
			world: world{nodes: map[key][]netip.Prefix{{"", "n"}: prefixes("10.0.1.0/25")}, pods: map[key][]netip.Addr{{"a", "x"}: addrs("10.0.1.200")}},
			want:  []string{"pod 10.0.1.0/24 observed: 1 pod"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := lines(tc.world.routes()); !slices.Equal(got, tc.want) {
				t.Errorf("\n got %q\nwant %q", got, tc.want)
			}
		})
	}
}

func TestRangeInRefusal(t *testing.T) {
	const v134 = `Service "culvert-range" is invalid: spec.clusterIPs: Invalid value: ["192.0.2.1"]: failed to allocate IP 192.0.2.1: the provided IP (192.0.2.1) is not in the valid range. The range of valid IPs is 10.96.0.0/16`
	const v120 = `Service "x" is invalid: spec.clusterIP: Invalid value: "1.1.1.1": provided IP is not in the valid range. The range of valid IPs is 10.0.0.0/24.`
	for refusal, want := range map[string][]netip.Prefix{
		v134: prefixes("10.96.0.0/16"),
		v120: prefixes("10.0.0.0/24"),
		"The range of valid IPs is fd00:10:96::/112":                                prefixes("fd00:10:96::/112"),
		"the provided network does not match the current range":                     nil,
		`spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster`: nil,
		"The range of valid IPs is 10.0.0.0/99":                                     nil,
		"":                                                                          nil,
	} {
		if got := rangeIn(refusal); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", refusal, got, want)
		}
	}
}

func TestParseKubeadm(t *testing.T) {
	pods, services := parseKubeadm("apiVersion: kubeadm.k8s.io/v1beta4\nnetworking:\n  dnsDomain: cluster.local\n  podSubnet: 10.244.0.0/16,fd00:244::/56\n  serviceSubnet: 10.96.0.0/12\n")
	if !slices.Equal(pods, prefixes("10.244.0.0/16", "fd00:244::/56")) || !slices.Equal(services, prefixes("10.96.0.0/12")) {
		t.Errorf("pods %v, services %v", pods, services)
	}
	for _, bad := range []string{"", "\t{", "networking: 7", "networking: {podSubnet: x}"} {
		if pods, services := parseKubeadm(bad); pods != nil || services != nil {
			t.Errorf("%q: %v, %v", bad, pods, services)
		}
	}
}

func node(name string, cidrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if len(cidrs) > 0 {
		n.Spec.PodCIDR, n.Spec.PodCIDRs = cidrs[0], cidrs
	}
	return n
}

func pod(namespace, name, ip string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: named(namespace, name), Status: corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
	}}
}

func cluster() []runtime.Object {
	host := pod("kube-system", "proxy", "172.30.0.11")
	host.Spec.HostNetwork = true
	return []runtime.Object{
		&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}},
		node("n1", "10.244.0.0/24"), node("n2"),
		host, pod("shop", "web", "10.244.0.7"),
		&corev1.Service{ObjectMeta: named("shop", "web"), Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.3.20"}}},
		&corev1.Service{ObjectMeta: named("other", "api"), Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.97.4.20"}}},
	}
}

// answering makes a server that refuses the Services of a dry run as a real
// one does; its own test is against a real one.
func answering(c *Cluster) {
	client := c.client.(*fake.Clientset)
	client.PrependReactor("create", "services", func(a clienttesting.Action) (bool, runtime.Object, error) {
		s := a.(clienttesting.CreateAction).GetObject().(*corev1.Service)
		why := fmt.Sprintf("failed to allocate IP %s: the provided IP (%[1]s) is not in the valid range. The range of valid IPs is 10.96.0.0/16", s.Spec.ClusterIP)
		if s.Spec.ClusterIP == "2001:db8::1" {
			why = "not configured on this cluster"
		}
		return true, nil, apierrors.NewInvalid(schema.GroupKind{Kind: "Service"}, s.Name, field.ErrorList{field.Invalid(field.NewPath("spec", "clusterIPs"), s.Spec.ClusterIPs, why)})
	})
}

func TestCIDRsC17ByRights(t *testing.T) {
	of := func(all ...string) func(verb, resource, namespace string) bool {
		return func(verb, resource, namespace string) bool {
			return slices.Contains(all, verb+" "+resource) || namespace == "" && slices.Contains(all, "all "+resource)
		}
	}
	for name, tc := range map[string]struct {
		denied  func(verb, resource, namespace string) bool
		hint    Hint
		want    []string
		missing []string
	}{
		"everything": {
			denied: of(),
			want:   []string{"service 10.96.0.0/16 ServiceCIDR kubernetes", "pod 10.244.0.0/24 node n1 podCIDR"},
		},
		"no service objects": {
			denied: of("list servicecidrs"),
			want:   []string{"service 10.96.0.0/16 dry-run answer", "service 10.97.4.0/24 observed: 1 service", "pod 10.244.0.0/24 node n1 podCIDR"},
		},
		"a namespace": {
			denied:  of("list servicecidrs", "list nodes", "get configmaps", "all services", "all pods"),
			want:    []string{"service 10.96.0.0/16 dry-run answer", "pod 10.244.0.0/24 observed: 1 pod"},
			missing: []string{"list nodes", "list pods in all namespaces"},
		},
		"to look at a namespace": {
			denied:  of("list servicecidrs", "list nodes", "get configmaps", "all services", "all pods", "create services"),
			want:    []string{"service 10.96.3.0/24 observed: 1 service", "pod 10.244.0.0/24 observed: 1 pod"},
			missing: []string{"list servicecidrs", "create services in namespace shop", "list nodes", "list pods in all namespaces"},
		},
		"nothing but a hint": {
			denied:  func(string, string, string) bool { return true },
			hint:    Hint{Pods: addrs("10.244.9.9"), Services: addrs("10.96.0.10")},
			want:    []string{"service 10.96.0.0/24 observed: 1 service", "pod 10.244.9.0/24 observed: 1 pod"},
			missing: []string{"list servicecidrs", "create services in namespace shop", "list nodes", "list pods in all namespaces"},
		},
		"nodes, but the shadow is elsewhere": {
			denied:  of("all pods"),
			hint:    Hint{Pods: addrs("192.168.4.4")},
			want:    []string{"service 10.96.0.0/16 ServiceCIDR kubernetes", "pod 10.244.0.0/24 node n1 podCIDR", "pod 192.168.4.0/24 observed: 1 pod"},
			missing: []string{"list pods in all namespaces"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, g := fakeCluster(cluster()...)
			answering(c)
			c.client.(*fake.Clientset).PrependReactor("create", "services", func(a clienttesting.Action) (bool, runtime.Object, error) {
				return g.refuses(a), nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "", nil)
			})
			g.deny(tc.denied)
			routes, missing, err := c.CIDRs(t.Context(), tc.hint)
			if err != nil {
				t.Fatal(err)
			}
			if got := lines(routes); !slices.Equal(got, tc.want) {
				t.Errorf("\n got %q\nwant %q", got, tc.want)
			}
			if !slices.Equal(missing, tc.missing) {
				t.Errorf("missing %q, want %q", missing, tc.missing)
			}
		})
	}
}

func TestCIDRsFailWithTheServer(t *testing.T) {
	c, _ := fakeCluster(cluster()...)
	away := errors.New("connection refused")
	c.client.(*fake.Clientset).PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, away })
	if _, _, err := c.CIDRs(t.Context(), Hint{}); !errors.Is(err, away) {
		t.Errorf("error %v", err)
	}
}

func TestPodsAreReadOnlyAsFarAsNeeded(t *testing.T) {
	for ip, want := range map[string]int{"10.244.0.7": 1, "192.168.0.7": 3} {
		c, _ := fakeCluster(cluster()...)
		pages := 0
		c.client.(*fake.Clientset).PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			pages++
			l := &corev1.PodList{}
			if pages < 3 {
				l.Continue = "more"
			}
			for i := range pageSize {
				l.Items = append(l.Items, *pod("shop", fmt.Sprintf("p%d-%d", pages, i), ip))
			}
			return true, l, nil
		})
		if _, _, err := c.CIDRs(t.Context(), Hint{}); err != nil {
			t.Fatal(err)
		}
		if pages != want {
			t.Errorf("pods at %s: %d pages read, want %d", ip, pages, want)
		}
	}
}

func TestWatchCIDRs(t *testing.T) {
	c, g := fakeCluster(cluster()[1:]...) // no ServiceCIDR
	answering(c)
	ctx, cancel := context.WithCancel(t.Context())
	reports := make(chan []string, 10)
	done := make(chan error)
	go func() {
		done <- c.WatchCIDRs(ctx, Hint{Pods: addrs("192.168.1.1")}, func(r []Route) { reports <- lines(r) })
	}()
	next := func(want ...string) {
		t.Helper()
		select {
		case got := <-reports:
			if !slices.Equal(got, want) {
				t.Fatalf("\n got %q\nwant %q", got, want)
			}
		case <-time.After(patience):
			t.Fatal("no report")
		}
	}
	services := []string{"service 10.96.0.0/16 dry-run answer", "service 10.97.4.0/24 observed: 1 service"}
	next(append(services, "pod 10.244.0.0/24 node n1 podCIDR", "pod 192.168.1.0/24 observed: 1 pod")...)
	g.wait(t, 3)
	_, err := c.client.CoreV1().Nodes().Create(t.Context(), node("n3", "10.244.3.0/24"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	next(append(services, "pod 10.244.0.0/24 node n1 podCIDR", "pod 10.244.3.0/24 node n3 podCIDR", "pod 192.168.1.0/24 observed: 1 pod")...)
	// A pod within what is known is no news; one outside is.
	for _, p := range []*corev1.Pod{pod("shop", "in", "192.168.1.9"), pod("shop", "out", "192.168.2.7")} {
		if _, err := c.client.CoreV1().Pods("shop").Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	next(append(services, "pod 10.244.0.0/24 node n1 podCIDR", "pod 10.244.3.0/24 node n3 podCIDR", "pod 192.168.1.0/24 observed: 2 pods", "pod 192.168.2.0/24 observed: 1 pod")...)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	goleak.VerifyNone(t)
}
