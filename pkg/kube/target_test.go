package kube

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
)

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]Target{
		"web": {"service", "web"}, "svc/web": {"service", "web"}, "Service/web": {"service", "web"},
		"deploy/web": {"deployment", "web"}, "deployment/web": {"deployment", "web"}, "sts/db": {"statefulset", "db"},
		"statefulset/db": {"statefulset", "db"}, "po/db-0": {"pod", "db-0"}, "pod/a.b": {"pod", "a.b"},
		"": {}, "/": {}, "svc/": {}, "/web": {}, "node/a": {}, "svc/a/b": {}, "svc/A": {}, "svc/../x": {}, "a b": {},
	} {
		got, err := ParseTarget(text)
		if got != want || (err == nil) != (want.Kind != "") {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

// testService leads to pods app=NAME, on port 80.
func testService(name string, change ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "dev", ResourceVersion: "7", Annotations: map[string]string{"theirs": "stays"}},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.1.1", ClusterIPs: []string{"10.96.1.1"}, Selector: map[string]string{"app": name},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), Protocol: corev1.ProtocolTCP}},
		},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

// testPod is one of app=NAME whose port http has that number.
func testPod(name, app string, number int32) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "dev", Labels: map[string]string{"app": app, "pod": name}},
		Spec:       testPodSpec(number),
	}
}

func testPodSpec(number int32) corev1.PodSpec {
	return corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
		{Name: "http", ContainerPort: 53, Protocol: corev1.ProtocolUDP}, {Name: "http", ContainerPort: number},
	}}}}
}

func testTemplate(app string, number int32) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": app, "x": "y"}}, Spec: testPodSpec(number)}
}

func annotated(name, value string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Annotations[name] = value }
}

func selects(selector map[string]string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Spec.Selector = selector }
}

func called(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Name: name, Namespace: "dev"} }

func TestFindService(t *testing.T) {
	local := corev1.ServiceInternalTrafficPolicyLocal
	mark := `{"session":"x1","selector":{"app":"taken"},"by":"jane@laptop","since":"2026-01-02T03:04:05Z"}`
	c := testCluster(fake.NewClientset(
		testService("web"), testPod("web-1", "web", 8080),
		&appsv1.Deployment{ObjectMeta: called("web"), Spec: appsv1.DeploymentSpec{Template: testTemplate("web", 8080)}},
		&appsv1.Deployment{ObjectMeta: called("alone"), Spec: appsv1.DeploymentSpec{Template: testTemplate("alone", 8080)}},
		testService("db", func(s *corev1.Service) { s.Spec.ClusterIP = "None" }), testService("db-read", selects(map[string]string{"app": "db"})),
		&appsv1.StatefulSet{ObjectMeta: called("db"), Spec: appsv1.StatefulSetSpec{Template: testTemplate("db", 5432)}},
		testService("taken", selects(map[string]string{"culvert.dev/session": "x1"}), annotated("culvert.dev/exchange", mark)),
		testService("culvert-x1", selects(map[string]string{"app": "taken"}), func(s *corev1.Service) { s.Labels = map[string]string{labelManaged: managed} }),
		testPod("taken-1", "taken", 9090),
		testService("torn", selects(map[string]string{"culvert.dev/session": "x3"})), testPod("torn-1", "torn", 7070),
		testService("culvert-x3", selects(map[string]string{"app": "torn"}), func(s *corev1.Service) { s.Labels = map[string]string{labelManaged: managed} }),
		testService("empty"), testService("bare", selects(nil)), testService("portless", func(s *corev1.Service) { s.Spec.Ports = nil }),
		testService("alias", selects(nil), func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalName = corev1.ServiceTypeExternalName, "x.example"
		}),
		testService("sctp", func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolSCTP }),
		testService("local", func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = &local }),
		testService("shown", selects(map[string]string{"culvert.dev/session": "x2"}), annotated(annExpose, `{"session":"x2","by":"joe@pc","since":"2026-01-02T03:04:05Z"}`),
			func(s *corev1.Service) { s.Labels = map[string]string{labelManaged: managed} }),
	))
	for _, test := range []struct {
		target, name, selects string
		port                  int
		session               string
		err                   error
		says                  string
	}{
		{target: "web", name: "web", selects: "web", port: 8080},
		{target: "deploy/web", name: "web", selects: "web", port: 8080},
		{target: "po/web-1", name: "web", selects: "web", port: 8080},
		{target: "db", name: "db", selects: "db", port: 5432}, // from the template
		{target: "sts/db", err: ErrSeveral, says: "db, db-read"},
		{target: "taken", name: "taken", selects: "taken", port: 9090, session: "x1"},
		{target: "pod/taken-1", name: "taken", selects: "taken", port: 9090, session: "x1"},
		{target: "torn", name: "torn", selects: "torn", port: 7070, session: "x3"},
		{target: "shown", name: "shown", selects: "", port: 80, session: "x2"},
		{target: "empty", name: "empty", selects: "empty", port: 80},
		{target: "nobody", err: ErrNoTarget, says: `"nobody" not found`},
		{target: "deploy/nobody", err: ErrNoTarget}, {target: "sts/nobody", err: ErrNoTarget}, {target: "po/nobody", err: ErrNoTarget},
		{target: "deploy/alone", err: ErrNoTarget, says: "no service selects"},
		{target: "culvert-x1", err: ErrNoTarget, says: "culvert's own"},
		{target: "bare", err: ErrNoSelector}, {target: "alias", err: ErrNoSelector, says: "x.example"},
		{target: "portless", err: ErrNoPorts}, {target: "sctp", err: ErrNoPorts, says: "SCTP"},
		{target: "local", says: "internalTrafficPolicy"},
	} {
		target, err := ParseTarget(test.target)
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.FindService(t.Context(), target)
		if test.err != nil || test.says != "" {
			if err == nil || !errors.Is(err, test.err) && test.err != nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v", test.target, err)
			}
			continue
		}
		if err != nil || s.Name != test.name || s.Ports[0].Target != test.port || s.Headless != (test.target == "db") {
			t.Errorf("%s: %+v, %v", test.target, s, err)
			continue
		}
		if (s.Exchange != nil) != (test.session != "") || s.Exchange != nil && s.Exchange.Session != test.session || test.selects != "" && s.Selector["app"] != test.selects {
			t.Errorf("%s: %+v, %+v", test.target, s, s.Exchange)
		}
	}
	all, err := c.Exchanges(t.Context())
	if err != nil || len(all) != 3 || all[0].Name != "shown" || !all[0].Exposed || all[1].Exchange.By != "jane@laptop" || all[2].Name != "torn" {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestPortsOf(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	sidecar := corev1.PodSpec{InitContainers: []corev1.Container{
		{Ports: []corev1.ContainerPort{{Name: "admin", ContainerPort: 1}}},
		{RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "admin", ContainerPort: 9901}}},
	}}
	h2c := "kubernetes.io/h2c"
	got := portsOf([]corev1.ServicePort{
		{Name: "plain", Port: 8080, TargetPort: intstr.FromInt32(8080)},
		{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), AppProtocol: &h2c},
		{Name: "dns", Port: 5353, TargetPort: intstr.FromString("http"), Protocol: corev1.ProtocolUDP},
		{Name: "admin", Port: 90, TargetPort: intstr.FromString("admin")},
		{Name: "same", Port: 7070},
		{Name: "lost", Port: 6060, TargetPort: intstr.FromString("lost")},
	}, []corev1.PodSpec{testPodSpec(8080), testPodSpec(1), sidecar})
	want := []ServicePort{
		{Name: "plain", Network: "tcp", Port: 8080, Target: 8080, Also: []int{80}, names: []string{"http"}},
		{Name: "dns", Network: "udp", Port: 5353, Target: 53, names: []string{"http"}},
		{Name: "admin", Network: "tcp", Port: 90, Target: 9901, names: []string{"admin"}},
		{Name: "same", Network: "tcp", Port: 7070, Target: 7070},
		{Name: "lost", Network: "tcp", Port: 6060, Target: 6060, names: []string{"lost"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}
