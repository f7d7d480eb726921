package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// liveShop is the admin's Cluster with a namespace of restricted pods, where the
// Service web leads to two of them, and a policy decides who may reach them.
func liveShop(t *testing.T) *Cluster {
	t.Helper()
	admin := realCluster(t, "default")
	loadStandin(t)
	admin.Namespace = realNamespace(t, admin)
	ns := admin.Namespace
	label := []byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"restricted"}}}`)
	_, err := admin.client.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, label, metav1.PatchOptions{})
	must(t, err)
	policy := ingress("web", map[string]string{"app": "web"}, "shop")
	policy.Namespace = ns
	_, err = admin.client.NetworkingV1().NetworkPolicies(ns).Create(t.Context(), policy, metav1.CreateOptions{})
	must(t, err)
	two, no, yes, user := int32(2), false, true, int64(1000)
	_, err = admin.client.AppsV1().Deployments(ns).Create(t.Context(), &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.DeploymentSpec{
		Replicas: &two, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}}, Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64),
			Containers: []corev1.Container{{
				Name: "web", Image: standinImage, Args: []string{"-answer=:8080"}, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
				ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromString("http")}}},
				SecurityContext: &corev1.SecurityContext{
					RunAsNonRoot: &yes, RunAsUser: &user, AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
					SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
				},
			}},
		}},
	}}, metav1.CreateOptions{})
	must(t, err)
	service := testService("web", func(s *corev1.Service) {
		s.ObjectMeta = metav1.ObjectMeta{Name: "web", Annotations: map[string]string{"team": "shop"}}
		s.Spec.ClusterIP, s.Spec.ClusterIPs = "", nil
		s.Spec.Ports = append(s.Spec.Ports,
			corev1.ServicePort{Name: "low", Port: 81, TargetPort: intstr.FromInt32(81)},
			corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP})
	})
	_, err = admin.client.CoreV1().Services(ns).Create(t.Context(), service, metav1.CreateOptions{})
	must(t, err)
	answers(t, admin, "web", 30*time.Second, func(pod, routed string) bool { return strings.HasPrefix(pod, "web-") && routed == "" })
	return admin
}

// answers asks a Service, by the API server, until the answer is as wanted.
func answers(t *testing.T, c *Cluster, service string, within time.Duration, wanted func(pod, routed string) bool) {
	t.Helper()
	begin := time.Now()
	for {
		pod, routed, err := askService(t, c, service)
		if err == nil && wanted(pod, routed) {
			t.Logf("service %s answers as wanted after %v", service, time.Since(begin).Round(time.Millisecond))
			return
		}
		if time.Since(begin) > within {
			t.Fatalf("service %s answers %q, routed %q, %v", service, pod, routed, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// askService tells which pod answers, and by which route of a router.
func askService(t *testing.T, c *Cluster, service string) (pod, routed string, err error) {
	url := fmt.Sprintf("%s/api/v1/namespaces/%s/services/%s:80/proxy/", strings.TrimSuffix(c.Server, "/"), c.Namespace, service)
	resp, err := c.http.Get(url)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	text := make([]byte, 512)
	n, _ := resp.Body.Read(text)
	if resp.StatusCode != 200 {
		err = fmt.Errorf("%s: %s", resp.Status, text[:n])
	}
	return string(text[:n]), resp.Header.Get("Routed"), err
}

// theService without what every change changes.
func theService(t *testing.T, c *Cluster) string {
	t.Helper()
	s, err := c.client.CoreV1().Services(c.Namespace).Get(t.Context(), "web", metav1.GetOptions{})
	must(t, err)
	s.ResourceVersion, s.Generation, s.ManagedFields = "", 0, nil
	text, err := json.Marshal(s)
	must(t, err)
	return string(text)
}

// grantedExchange holds the Role that RBAC prints for exchanging.
func grantedExchange(t *testing.T, admin *Cluster) *Cluster {
	text, err := RBAC(admin.Namespace, false, Exchange)
	must(t, err)
	var role rbacv1.Role
	must(t, yaml.UnmarshalStrict([]byte(text), &role))
	_, err = admin.client.RbacV1().Roles(admin.Namespace).Create(t.Context(), &role, metav1.CreateOptions{})
	must(t, err)
	bind(t, admin, "Role", role.Name, "ex")
	return asUser(t, admin, "ex")
}

// makeRouter makes one for the Service web, or for what cfg says.
func makeRouter(t *testing.T, c *Cluster, router *RouterConfig) *Shadow {
	t.Helper()
	rights, err := c.Preflight(t.Context(), Exchange)
	must(t, err)
	must(t, rights.Err())
	t.Log(strings.Join(rights.Notices, "\n"))
	cfg := liveConfig(t)
	if router == nil {
		router = &RouterConfig{}
		router.Service, err = c.FindService(t.Context(), Target{"deployment", "web"})
		must(t, err)
	}
	cfg.Router = router
	router.ClientKey, router.HostPublic = []byte("client"), []byte("public")
	s := c.NewShadow(cfg, rights)
	t.Cleanup(func() { _ = s.Delete(context.Background()) }) // after a failure
	ready(t, s)
	return s
}

// A Service's traffic is taken and given back, by each sort of user, and nothing
// is left of it.
func TestLiveRouter(t *testing.T) {
	admin := liveShop(t)
	for _, test := range []struct {
		name string
		as   func(*testing.T, *Cluster) *Cluster
		mode Mode
	}{
		{"admin", func(_ *testing.T, c *Cluster) *Cluster { return c }, ByDeployment},
		{"role", grantedExchange, ByDeployment},
		{"edit", editor, ByBareDeployment},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := test.as(t, admin)
			before := theService(t, admin)
			s := makeRouter(t, c, nil)
			if s.Mode() != test.mode || theService(t, admin) != before {
				t.Errorf("mode %s, service %s", s.Mode(), theService(t, admin))
			}
			list, err := admin.client.NetworkingV1().NetworkPolicies(admin.Namespace).List(t.Context(), metav1.ListOptions{LabelSelector: labelSession + "=" + s.cfg.Session})
			if err != nil || len(list.Items) != 2 {
				t.Errorf("%d policies, %v", len(list.Items), err)
			}
			must(t, s.Swap(t.Context()))
			answers(t, admin, "web", 10*time.Second, func(pod, routed string) bool { return strings.HasPrefix(pod, "web-") && routed == "tcp/80" })
			joins(t, c, s)
			loses(t, c)
			must(t, s.Restore(t.Context()))
			for range 20 { // at once, for Restore waited
				if pod, routed, err := askService(t, admin, "web"); err != nil || routed != "" || !strings.HasPrefix(pod, "web-") {
					t.Errorf("%q, routed %q, %v", pod, routed, err)
				}
			}
			stop(t, admin, s)
			if after := theService(t, admin); after != before {
				t.Errorf("the service was\n%s\nand is\n%s", before, after)
			}
		})
	}
}

// joins is the second laptop, on the first one's router.
func joins(t *testing.T, c *Cluster, s *Shadow) {
	t.Helper()
	found, err := c.FindService(t.Context(), Target{"service", "web"})
	must(t, err)
	if found.Exchange == nil || found.Exchange.Session != s.cfg.Session || found.Selector["app"] != "web" || found.Ports[0].Target != 8080 {
		t.Fatalf("%+v", found)
	}
	other, keys, err := c.OpenRouter(t.Context(), found.Exchange.Session, testPath, s.rights)
	must(t, err)
	if string(keys.ClientKey) != "client" || string(keys.HostPublic) != "public" || other.Mode() != s.Mode() || !reflect.DeepEqual(other.original, s.original) {
		t.Errorf("%+v, %q", other, keys)
	}
	conn, _, err := other.Dial(t.Context())
	must(t, err)
	echoes(t, conn)
	conn.Close()
	must(t, other.renew(t.Context()))
}

// loses is one who made a router of his own, and comes too late.
func loses(t *testing.T, c *Cluster) {
	t.Helper()
	rights, err := c.Preflight(t.Context(), Exchange)
	must(t, err)
	cfg := liveConfig(t)
	found, err := c.FindService(t.Context(), Target{"service", "web"})
	must(t, err)
	cfg.Router = &RouterConfig{Service: found, ClientKey: []byte("a"), HostPublic: []byte("b")}
	s := c.NewShadow(cfg, rights)
	must(t, s.Create(t.Context(), nil))
	if err := s.Swap(t.Context()); !errors.Is(err, ErrExchanged) {
		t.Errorf("%v", err)
	}
	must(t, s.Delete(t.Context()))
}

// The router's own rights are enough to give back what it took, and for nothing
// else; whoever wrote another selector meanwhile keeps it.
func TestLiveRouterHeals(t *testing.T) {
	admin := liveShop(t)
	before := theService(t, admin)
	services := admin.client.CoreV1().Services(admin.Namespace)
	s := makeRouter(t, admin, nil)
	itself := asUser(t, admin, "system:serviceaccount:"+admin.Namespace+":"+s.name())
	for what, change := range map[string]string{
		"as it is":     `{}`,
		"applied":      `{"spec":{"selector":{"app":"web"}}}`,
		"replaced":     `{"spec":{"selector":{"app":"web","culvert.dev/session":null}}}`,
		"unannotated":  `{"metadata":{"annotations":{"culvert.dev/exchange":null}}}`,
		"all put back": `{"metadata":{"annotations":{"culvert.dev/exchange":null}},"spec":{"selector":{"app":"web","culvert.dev/session":null}}}`,
	} {
		must(t, s.Swap(t.Context()))
		_, err := services.Patch(t.Context(), "web", types.MergePatchType, []byte(change), metav1.PatchOptions{})
		must(t, err)
		_, err = itself.restore(t.Context(), admin.Namespace, "web", s.cfg.Session, s.original)
		must(t, err)
		if after := theService(t, admin); after != before {
			t.Errorf("%s: the service was\n%s\nand is\n%s", what, before, after)
		}
	}
	if _, err := itself.client.CoreV1().Services(admin.Namespace).Get(t.Context(), s.name(), metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("another service: %v", err)
	}
	must(t, itself.client.CoordinationV1().Leases(admin.Namespace).Delete(t.Context(), s.name(), metav1.DeleteOptions{}))
	gone(t, admin, s.cfg.Session, 60*time.Second)
	if _, _, err := admin.OpenRouter(t.Context(), s.cfg.Session, testPath, s.rights); !errors.Is(err, ErrGone) {
		t.Errorf("%v", err)
	}
}

func TestLiveExpose(t *testing.T) {
	admin := liveShop(t)
	for _, c := range []*Cluster{admin, editor(t, admin)} {
		s := makeRouter(t, c, &RouterConfig{Expose: &Expose{Name: "preview", Ports: []ServicePort{
			{Network: "tcp", Port: 80, Target: 80}, {Network: "udp", Port: 80, Target: 80},
		}}})
		must(t, s.Swap(t.Context()))
		answers(t, admin, "preview", 10*time.Second, func(pod, routed string) bool { return strings.HasPrefix(pod, s.name()) && routed == "tcp/80" })
		all, err := c.Exchanges(t.Context())
		if err != nil || len(all) != 1 || all[0].Name != "preview" || !all[0].Exposed || all[0].Exchange.Session != s.cfg.Session {
			t.Errorf("%+v, %v", all, err)
		}
		stop(t, admin, s)
	}
}

// A router whose laptop died is cleaned up, by one who may only edit as well;
// one that somebody else renews is not.
func TestLiveCleanRouter(t *testing.T) {
	admin := liveShop(t)
	ed := editor(t, admin)
	before := theService(t, admin)
	for _, c := range []*Cluster{admin, ed} {
		s := makeRouter(t, c, nil)
		must(t, s.Swap(t.Context()))
		s.holder.Start++ // a process that is no more
		must(t, s.renew(t.Context()))
		renewed := time.AfterFunc(2*time.Second, func() { _ = s.renew(t.Context()) })
		defer renewed.Stop()
		begin := time.Now()
		got, err := ed.Clean(t.Context(), CleanConfig{})
		if err != nil || len(got) != 1 || !got[0].Living || theService(t, admin) == before {
			t.Fatalf("after %v: %+v, %v", time.Since(begin), got, err)
		}
		got, err = ed.Clean(t.Context(), CleanConfig{})
		t.Logf("after %v: %+v", time.Since(begin).Round(time.Second), got)
		if err != nil || len(got) != 1 || !got[0].Removed || theService(t, admin) != before {
			t.Fatalf("%+v, %v, %s", got, err, theService(t, admin))
		}
		gone(t, admin, s.cfg.Session, 30*time.Second)
	}
	mark := map[string]any{"metadata": map[string]any{"annotations": map[string]string{heal.Annotation: `{"session":"lost","selector":{"app":"web"}}`}},
		"spec": map[string]any{"selector": map[string]any{"app": nil, heal.Label: "lost"}}}
	patch, err := json.Marshal(mark)
	must(t, err)
	_, err = admin.client.CoreV1().Services(admin.Namespace).Patch(t.Context(), "web", types.MergePatchType, patch, metav1.PatchOptions{})
	must(t, err)
	got, err := ed.Clean(t.Context(), CleanConfig{})
	if err != nil || len(got) != 1 || got[0].Name != "lost" || !got[0].Removed || theService(t, admin) != before {
		t.Errorf("%+v, %v, %s", got, err, theService(t, admin))
	}
}
