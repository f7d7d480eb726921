package kube

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
)

// dbPod is one of a StatefulSet behind the headless Service db.
func dbPod(name string) *corev1.Pod {
	p := testPod(name, "db", 5432)
	p.Labels[podNameLabel] = name
	p.Spec.Hostname, p.Spec.Subdomain = name, "db"
	p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports, corev1.ContainerPort{Name: "gossip", ContainerPort: 7000})
	always := corev1.ContainerRestartPolicyAlways
	p.Spec.InitContainers = []corev1.Container{
		{Name: "setup", Ports: []corev1.ContainerPort{{ContainerPort: 7001}}}, // ends before the pod is ready
		{Name: "exporter", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "metrics", ContainerPort: 9187}}},
	}
	return p
}

func headless(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = corev1.ClusterIPNone, nil }

func standCluster(more ...runtime.Object) (*Cluster, *fake.Clientset) {
	client := fake.NewClientset(append(more, testService("db", headless), testService("db-read", selects(map[string]string{"app": "db"})),
		dbPod("db-2"), dbPod("db-0"), dbPod("db-1"))...)
	client.PrependReactor("create", "services", withAddress)
	return testCluster(client), client
}

func TestFindServiceOfPod(t *testing.T) {
	alone := testPod("alone", "alone", 8080)
	alone.Spec.Hostname, alone.Spec.Subdomain = "named", "alone"
	twin, other := dbPod("twin"), testPod("other", "twin", 8080)
	twin.Labels["app"], twin.Spec.Subdomain = "twin", "twin"
	c, _ := standCluster(
		testService("web"), testPod("web-1", "web", 8080), testPod("web-2", "web", 8080),
		testService("one"), testPod("one-1", "one", 8080),
		testService("alone", headless), alone,
		testService("twin", headless), twin, other,
	)
	for _, test := range []struct{ pod, service, stands, ports, says string }{
		{pod: "db-1", service: "db", stands: "db-1 db-0 db-2", ports: "tcp/80 udp/53 tcp/7000 tcp/9187"},
		{pod: "alone", service: "alone", stands: "alone", ports: "tcp/80 udp/53"},
		{pod: "one-1", service: "one", ports: "tcp/80"},
		{pod: "web-1", says: "one of 2 pods behind service web: --method ephemeral"},
		{pod: "twin", says: "pod other is behind service twin too"},
	} {
		s, err := c.FindService(t.Context(), Target{"pod", test.pod})
		if test.says != "" {
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v", test.pod, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		var stands, ports []string
		for _, at := range s.stands {
			stands = append(stands, at.pod)
		}
		for _, p := range s.Ports {
			ports = append(ports, p.Network+"/"+strconv.Itoa(p.Port))
		}
		if s.Name != test.service || strings.Join(stands, " ") != test.stands || strings.Join(ports, " ") != test.ports || (s.Pod == test.pod) != (test.stands != "") {
			t.Errorf("%s: service %s, pod %q, stands %q, ports %q", test.pod, s.Name, s.Pod, stands, ports)
		}
	}
}

// Each pod has a stand-in of its name, and one of these is claimed.
func TestStandIns(t *testing.T) {
	for _, mode := range []Mode{ByDeployment, ByBareDeployment} {
		c, client := standCluster()
		cfg := testConfig("x1")
		cfg.Router = &RouterConfig{ClientKey: []byte("client"), HostPublic: []byte("public")}
		var err error
		if cfg.Router.Service, err = c.FindService(t.Context(), Target{"pod", "db-1"}); err != nil {
			t.Fatal(err)
		}
		s := c.NewShadow(cfg, routerRights(mode))
		if err := s.Create(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		for name, pod := range map[string]string{"culvert-x1": "db-1", "culvert-x1-1": "db-0", "culvert-x1-2": "db-2"} {
			d, err := client.AppsV1().Deployments("dev").Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			in := d.Spec.Template.Spec
			if in.Hostname != pod || in.Subdomain != "db" || d.Spec.Template.Labels[labelSession] != "x1" || d.Spec.Template.Labels[labelPod] != pod ||
				!maps.Equal(d.Spec.Selector.MatchLabels, map[string]string{labelSession: "x1", labelPod: pod}) || len(d.OwnerReferences) != 1 {
				t.Errorf("%s: %+v", name, d)
			}
			args := strings.Join(in.Containers[0].Args, " ")
			heals := mode == ByDeployment && pod == "db-1"
			if strings.Contains(args, "--lease=") != heals || strings.Contains(args, "--service=db") != heals || (in.ServiceAccountName != "") != heals ||
				strings.Count(args, "--route=") != 4 || strings.Count(args, "original=10.96.9.9") != 4 || strings.Contains(args, "--name=db") != (pod == "db-1") {
				t.Errorf("%s: account %q, %s", name, in.ServiceAccountName, args)
			}
			sibling, err := client.CoreV1().Services("dev").Get(t.Context(), name, metav1.GetOptions{})
			if err != nil || !maps.Equal(sibling.Spec.Selector, map[string]string{"app": "db", podNameLabel: pod}) || len(sibling.Spec.Ports) != 4 || len(sibling.OwnerReferences) != 1 {
				t.Errorf("%s: %+v, %v", name, sibling, err)
			}
		}
		if got := s.standing(); !slices.Equal(got, []string{"db-2", "db-0", "db-1"}) {
			t.Errorf("%q are waited for", got)
		}
		if err := s.Swap(t.Context()); err != nil {
			t.Fatal(err)
		}
		other, _, err := c.OpenRouter(t.Context(), "x1", Path{}, routerRights(mode))
		if err != nil || other.StandsFor() != "db-1" || !maps.Equal(other.original, map[string]string{"app": "db"}) ||
			other.podSelector(other.pod) != labelSession+"=x1,"+labelPod+"=db-1" {
			t.Errorf("%+v, %v", other, err)
		}
		if err := other.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		if left, err := c.find(t.Context(), "dev", "x1"); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
		now, err := client.CoreV1().Services("dev").Get(t.Context(), "db", metav1.GetOptions{})
		if err != nil || !maps.Equal(now.Spec.Selector, map[string]string{"app": "db"}) {
			t.Errorf("%+v, %v", now, err)
		}
	}
}
