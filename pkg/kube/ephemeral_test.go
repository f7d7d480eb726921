package kube

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"
)

// lonePod runs, with the ports 8080 and 53 of UDP.
func lonePod(name string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := testPod(name, "web", 8080)
	p.UID, p.ResourceVersion = "uid-1", "7"
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.9"}
	for _, c := range change {
		c(p)
	}
	return p
}

func selecting(app string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
}

func TestFindPod(t *testing.T) {
	ended := func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }
	named := func(name string, change ...func(*corev1.Pod)) *corev1.Pod { return lonePod(name, change...) }
	deployment := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "dev"}, Spec: appsv1.DeploymentSpec{Selector: selecting("web")}}
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "dev"}, Spec: appsv1.StatefulSetSpec{Selector: selecting("web")}}
	yes := true
	owned := func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{Kind: "StatefulSet", Name: "db", Controller: &yes}}
	}
	for _, test := range []struct {
		name   string
		target Target
		pods   []runtime.Object
		pod    string
		says   string
		noPod  bool
	}{
		{name: "by name", target: Target{"pod", "a"}, pods: []runtime.Object{named("a"), named("b")}, pod: "a"},
		{name: "the only one", target: Target{"deployment", "web"}, pods: []runtime.Object{named("a"), named("old", ended)}, pod: "a"},
		{name: "of a set", target: Target{"statefulset", "db"}, pods: []runtime.Object{named("db-0", owned)}, pod: "db-0"},
		{name: "none", target: Target{"pod", "x"}, noPod: true, says: `"x" not found`},
		{name: "no workload", target: Target{"deployment", "x"}, noPod: true, says: `"x" not found`},
		{name: "several", target: Target{"deployment", "web"}, pods: []runtime.Object{named("b"), named("a")}, noPod: true, says: "name one: pod/a, pod/b"},
		{name: "no pods", target: Target{"deployment", "web"}, noPod: true, says: "deployment/web has none"},
		{name: "a service", target: Target{"service", "web"}, noPod: true, says: "pod/NAME"},
		{name: "ended", target: Target{"pod", "a"}, pods: []runtime.Object{named("a", ended)}, noPod: true, says: "has ended"},
		{name: "the node's network", target: Target{"pod", "a"}, pods: []runtime.Object{named("a", func(p *corev1.Pod) { p.Spec.HostNetwork = true })}, says: "network of its node"},
		{name: "not yet", target: Target{"pod", "a"}, pods: []runtime.Object{named("a", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending })}, says: "does not run yet"},
		{name: "windows", target: Target{"pod", "a"}, pods: []runtime.Object{named("a", func(p *corev1.Pod) { p.Spec.OS = &corev1.PodOS{Name: corev1.Windows} })}, says: "Windows"},
		{name: "a mesh", target: Target{"pod", "a"}, pods: []runtime.Object{named("a", func(p *corev1.Pod) { p.Spec.InitContainers = []corev1.Container{{Name: "istio-proxy"}} })}, says: "istio-proxy"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := testCluster(fake.NewClientset(append(test.pods, deployment, set)...)).FindPod(t.Context(), test.target)
			if test.says != "" {
				if err == nil || !strings.Contains(err.Error(), test.says) || errors.Is(err, ErrNoPod) != test.noPod {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil || p.Name != test.pod || p.Returns != (test.target.Kind == "statefulset") || len(p.Ports) != 2 {
				t.Errorf("%+v, %v", p, err)
			}
		})
	}
}

func TestDeclaredAndProbed(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	get := func(port intstr.IntOrString, scheme corev1.URIScheme, headers ...corev1.HTTPHeader) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: port, Scheme: scheme, HTTPHeaders: headers}}}
	}
	p := lonePod("a", func(p *corev1.Pod) {
		p.Spec.InitContainers = []corev1.Container{
			{Ports: []corev1.ContainerPort{{ContainerPort: 1}}},
			{RestartPolicy: &always, Ports: []corev1.ContainerPort{{ContainerPort: 9443, Name: "tls"}, {ContainerPort: 8080}},
				LivenessProbe: get(intstr.FromString("tls"), corev1.URISchemeHTTPS)},
		}
		c := &p.Spec.Containers[0]
		c.Ports = append(c.Ports, corev1.ContainerPort{ContainerPort: 5, Protocol: corev1.ProtocolSCTP})
		c.StartupProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}}
		c.ReadinessProbe = get(intstr.FromInt32(8080), corev1.URISchemeHTTP)
		p.Spec.Containers = append(p.Spec.Containers,
			corev1.Container{
				LivenessProbe:  get(intstr.FromInt32(8081), "", corev1.HTTPHeader{Name: "user-agent", Value: "me"}),
				ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9090}}},
				StartupProbe:   &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{}}},
			})
	})
	var routes []string
	for _, port := range declaredPorts(p) {
		routes = append(routes, port.route())
	}
	if !slices.Equal(routes, []string{"udp/53", "tcp/8080", "tcp/9443"}) {
		t.Errorf("ports %v", routes)
	}
	want := []Probe{
		{Port: 9443, Restarts: true},
		{Port: 8080, Connects: true, Restarts: true}, {Port: 8080, Named: true},
		{Port: 8081, Restarts: true}, {Port: 9090, Named: true},
	}
	if got := probes(p); !slices.Equal(got, want) {
		t.Errorf("probes %+v", got)
	}
}

// ephemeralRightsHeld are those of who may do all of it.
func ephemeralRightsHeld() *Rights {
	held := map[string]bool{}
	for _, r := range ephemeralRights() {
		for _, verb := range r.verbs {
			held[r.key(verb)] = true
		}
	}
	return weigh(ephemeralRights(), held, "dev")
}

func ephemeralConfig(p *Pod) EphemeralConfig {
	return EphemeralConfig{
		Session: "x1", Image: "shadow:1", Pod: p, Ports: []ServicePort{PodPort("tcp", 8080), PodPort("udp", 53)},
		Protocols: map[string]string{"tcp/8080": "http"}, Grace: time.Minute,
		HostKey: []byte("host\nkey\n"), AuthorizedKey: []byte("authorized"), ClientKey: []byte("client"), HostPublic: []byte("public"),
	}
}

// A pod gets one container, with the rights that it needs and no other, and whoever
// comes later finds it, unless it has ended.
func TestEphemeralCreate(t *testing.T) {
	client := fake.NewClientset(lonePod("a"))
	var sub, sent string
	client.PrependReactor("patch", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		sub, sent = a.GetSubresource(), string(a.(clienttesting.PatchAction).GetPatch())
		return false, nil, nil
	})
	c := testCluster(client)
	p, err := c.FindPod(t.Context(), Target{"pod", "a"})
	must(t, err)
	e := c.NewEphemeral(ephemeralConfig(p), ephemeralRightsHeld())
	must(t, e.Create(t.Context(), nil))
	if sub != "ephemeralcontainers" || !strings.Contains(sent, `"resourceVersion":"7"`) {
		t.Errorf("patch of %q: %s", sub, sent)
	}
	p, err = c.FindPod(t.Context(), Target{"pod", "a"})
	must(t, err)
	got := p.raw.Spec.EphemeralContainers[0]
	want := []string{"--redirect", "--listen=:7465", "--keys=env", "--grace=1m0s", "--route=tcp/8080,listen=:8080,original=10.0.0.9:8080,protocol=http", "--route=udp/53,listen=:53,original=10.0.0.9:53"}
	if got.Name != "culvert-x1" || !slices.Equal(got.Args, want) {
		t.Errorf("%s %q", got.Name, got.Args)
	}
	may := got.SecurityContext
	if *may.RunAsUser != 0 || *may.Privileged || *may.AllowPrivilegeEscalation || !slices.Equal(may.Capabilities.Add, []corev1.Capability{"NET_ADMIN"}) || !slices.Equal(may.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("%+v", may)
	}
	if again := c.NewEphemeral(ephemeralConfig(p), ephemeralRightsHeld()).Create(t.Context(), nil); !errors.Is(again, ErrExchanged) {
		t.Errorf("a second one: %v", again)
	}
	joined, keys, mark, err := c.OpenEphemeral(p, []ServicePort{PodPort("udp", 53)}, Path{}, ephemeralRightsHeld())
	if err != nil || joined.door != 7465 || joined.cfg.Grace != time.Minute || string(keys.ClientKey) != "client" || string(keys.HostPublic) != "public" || mark.By != Self().Owner() || mark.Since.IsZero() {
		t.Errorf("%+v %+v %+v %v", joined, keys, mark, err)
	}
	if _, _, _, err := c.OpenEphemeral(p, []ServicePort{PodPort("udp", 53), PodPort("tcp", 9)}, Path{}, ephemeralRightsHeld()); !errors.Is(err, ErrExchanged) || !strings.Contains(err.Error(), "udp/53 of pod a and not tcp/9") {
		t.Errorf("half of it: %v", err)
	}
	if other, _, _, err := c.OpenEphemeral(p, []ServicePort{PodPort("tcp", 9)}, Path{}, ephemeralRightsHeld()); other != nil || err != nil {
		t.Errorf("another port: %v, %v", other, err)
	}
	if door := freeDoor(p.raw, []ServicePort{PodPort("tcp", 7466)}); door != 7467 {
		t.Errorf("the next door is %d", door)
	}
	taken, err := c.TakenPods(t.Context(), Path{}, ephemeralRightsHeld())
	if err != nil || len(taken) != 1 || taken[0].Pod != "a" || taken[0].Mark.Session != "x1" {
		t.Errorf("taken: %+v, %v", taken, err)
	}
	p.raw.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "culvert-x1", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
	if len(guests(p.raw)) != 0 {
		t.Error("one that has ended is still there")
	}
}

func TestEphemeralRefused(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	for _, test := range []struct {
		name      string
		err       error
		forbidden bool
		says      string
	}{
		{"pod security", apierrors.NewForbidden(pods, "a", errors.New(`violates PodSecurity "baseline:latest": non-default capabilities`)), false, "Pod Security refuses NET_ADMIN"},
		{"no right", apierrors.NewForbidden(pods, "a", errors.New("cannot patch resource")), true, "cannot patch"},
		{"a static pod", apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, "a", nil), false, "invalid"},
		{"never the same version", apierrors.NewConflict(pods, "a", errors.New("try again")), false, "try again"},
	} {
		t.Run(test.name, func(t *testing.T) {
			client := fake.NewClientset(lonePod("a"))
			client.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, test.err })
			c := testCluster(client)
			p, err := c.FindPod(t.Context(), Target{"pod", "a"})
			must(t, err)
			e := c.NewEphemeral(ephemeralConfig(p), ephemeralRightsHeld())
			err = e.Create(t.Context(), nil)
			if err == nil || errors.Is(err, ErrForbidden) != test.forbidden || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v", err)
			}
			must(t, e.Delete(t.Context())) // there is nothing
		})
	}
}

func TestEphemeralEnds(t *testing.T) {
	client := fake.NewClientset(lonePod("a"))
	c := testCluster(client)
	p, err := c.FindPod(t.Context(), Target{"pod", "a"})
	must(t, err)
	e := c.NewEphemeral(ephemeralConfig(p), ephemeralRightsHeld())
	must(t, e.Create(t.Context(), nil))
	status := func(s corev1.ContainerState) {
		raw, err := client.CoreV1().Pods("dev").Get(t.Context(), "a", metav1.GetOptions{})
		must(t, err)
		raw.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "culvert-x1", State: s}}
		_, err = client.CoreV1().Pods("dev").UpdateStatus(t.Context(), raw, metav1.UpdateOptions{})
		must(t, err)
	}
	status(corev1.ContainerState{Running: &corev1.ContainerStateRunning{}})
	brief, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	var lingers *LingerError
	if err := e.Delete(brief); !errors.As(err, &lingers) || lingers.Pod != "a" || !errors.Is(err, ErrLeft) {
		t.Errorf("it goes on: %v", err)
	}
	status(corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}})
	if err := e.WaitReady(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "no such image") {
		t.Errorf("without an image: %v", err)
	}
	status(corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", Message: "redirect not made"}})
	if err := e.WaitReady(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "redirect not made") {
		t.Errorf("it ended: %v", err)
	}
	if _, _, err := e.Dial(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("dial of what has ended: %v", err)
	}
	must(t, e.Delete(t.Context()))
	raw, err := client.CoreV1().Pods("dev").Get(t.Context(), "a", metav1.GetOptions{})
	must(t, err)
	raw.UID = "uid-2"
	_, err = client.CoreV1().Pods("dev").Update(t.Context(), raw, metav1.UpdateOptions{})
	must(t, err)
	if _, _, err := e.Dial(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("dial of another pod: %v", err)
	}
	if err := e.Create(t.Context(), nil); !errors.Is(err, ErrGone) {
		t.Errorf("another pod: %v", err)
	}
}

func TestEphemeralRBACIsTheList(t *testing.T) {
	text, err := RBAC("dev", false, EphemeralExchange)
	must(t, err)
	var want []string
	for _, r := range ephemeralRights() {
		for _, verb := range r.verbs {
			want = append(want, strings.Join([]string{verb, r.group, r.resource, r.name}, " "))
		}
	}
	var role rbacv1.Role
	must(t, yaml.UnmarshalStrict([]byte(text), &role))
	same(t, "Role", want, ruleLines(role.Rules))
	if r := weigh(ephemeralRights(), map[string]bool{}, "dev"); !errors.Is(r.Err(), ErrForbidden) || !strings.Contains(r.Err().Error(), "patch pods/ephemeralcontainers") {
		t.Errorf("%v", r.Err())
	}
}
