package rollouts_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/consul/api"
	appsv1 "k8s.io/api/apps/v1"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"
)

// standIn is an API server that has one Deployment, whose pods are replaced the moment
// its template is, and a Consul agent that each of them is registered at. What a rollout
// takes for good is tested in package kube, and on a cluster.
type standIn struct {
	t      *testing.T
	dir    string
	client *fake.Clientset
	kube   *httptest.Server
	consul *httptest.Server
	mu     sync.Mutex
	pods   int
	ended  []string
	said   []string        // to Consul
	drain  map[string]bool // instances
	denied string          // a verb and resource
}

const replicas = 2

func newStandIn(t *testing.T) *standIn {
	w := &standIn{t: t, dir: t.TempDir(), drain: map[string]bool{}}
	n, labels := int32(replicas), map[string]string{"app": "shop"}
	w.client = fake.NewClientset(&appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "shop", Namespace: "dev", UID: "d", ResourceVersion: "1", Generation: 1},
		Spec: appsv1.DeploymentSpec{
			Replicas: &n, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "shop:1"}}},
			},
		},
	})
	w.control()
	w.kube, w.consul = httptest.NewServer(http.HandlerFunc(w.serveKube)), httptest.NewServer(http.HandlerFunc(w.serveConsul))
	t.Cleanup(w.kube.Close)
	t.Cleanup(w.consul.Close)
	w.write("kubeconfig", fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c,
clusters: [{name: c, cluster: {server: %q}}], users: [{name: u, user: {}}],
contexts: [{name: c, context: {cluster: c, user: u, namespace: default}}]}`, w.kube.URL))
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(w.dir, "culvert")); err != nil {
		t.Skip("no symbolic links here:", err)
	}
	return w
}

func (w *standIn) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// run is culvert with a file, and returns its exit code.
func (w *standIn) run(file string, args ...string) (code int, out string) {
	w.t.Helper()
	w.write("culvert.yaml", "app: shop\n"+file)
	c := exec.CommandContext(w.t.Context(), filepath.Join(w.dir, "culvert"), args...)
	c.Dir = w.dir
	c.Env = []string{"HOME=" + w.dir, "PATH=" + os.Getenv("PATH"), "KUBECONFIG=" + filepath.Join(w.dir, "kubeconfig"), "CONSUL_HTTP_ADDR=" + w.consul.URL}
	text, err := c.CombinedOutput()
	if c.ProcessState == nil {
		w.t.Fatal(err)
	}
	return c.ProcessState.ExitCode(), string(text)
}

func (w *standIn) image() string {
	d, err := w.client.AppsV1().Deployments("dev").Get(w.t.Context(), "shop", metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return d.Spec.Template.Spec.Containers[0].Image
}

func (w *standIn) check(err error) {
	if err != nil {
		w.t.Error(err)
	}
}

// control does what the Deployment's controller does, and all at once.
func (w *standIn) control() {
	ctx := w.t.Context()
	d, err := w.client.AppsV1().Deployments("dev").Get(ctx, "shop", metav1.GetOptions{})
	w.check(err)
	sets, err := w.client.AppsV1().ReplicaSets("dev").List(ctx, metav1.ListOptions{})
	w.check(err)
	highest, own := 0, -1
	for i, s := range sets.Items {
		n, _ := strconv.Atoi(s.Annotations["deployment.kubernetes.io/revision"])
		highest = max(highest, n)
		template := s.Spec.Template.DeepCopy()
		delete(template.Labels, "pod-template-hash")
		if equality.Semantic.DeepEqual(*template, d.Spec.Template) {
			own = i
		}
	}
	hash, next := strconv.Itoa(highest+1), map[string]string{"deployment.kubernetes.io/revision": strconv.Itoa(highest + 1)}
	if own >= 0 {
		s := &sets.Items[own]
		hash = strings.TrimPrefix(s.Name, "shop-")
		s.Annotations["deployment.kubernetes.io/revision"] = next["deployment.kubernetes.io/revision"]
		_, err = w.client.AppsV1().ReplicaSets("dev").Update(ctx, s, metav1.UpdateOptions{})
	} else {
		template, yes := d.Spec.Template.DeepCopy(), true
		template.Labels["pod-template-hash"] = hash
		_, err = w.client.AppsV1().ReplicaSets("dev").Create(ctx, &appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{
				Name: "shop-" + hash, Namespace: "dev", UID: types.UID("r" + hash), Annotations: next, Labels: template.Labels,
				OwnerReferences: []metav1.OwnerReference{{UID: d.UID, Kind: "Deployment", Name: "shop", Controller: &yes}},
			},
			Spec: appsv1.ReplicaSetSpec{Template: *template},
		}, metav1.CreateOptions{})
	}
	w.check(err)
	d.Generation++
	version, _ := strconv.Atoi(d.ResourceVersion)
	d.ResourceVersion = strconv.Itoa(version + 1)
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: replicas, UpdatedReplicas: replicas, AvailableReplicas: replicas}
	if bad := strings.HasSuffix(d.Spec.Template.Spec.Containers[0].Image, ":bad"); bad {
		d.Status.AvailableReplicas--
		w.pod(hash, corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "app", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "InvalidImageName", Message: "no such image"}}}}})
	} else {
		w.check(w.client.CoreV1().Pods("dev").DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
		list, err := w.client.CoreV1().Pods("dev").List(ctx, metav1.ListOptions{})
		w.check(err)
		for _, p := range list.Items {
			w.check(w.client.CoreV1().Pods("dev").Delete(ctx, p.Name, metav1.DeleteOptions{}))
		}
		for range replicas {
			w.pod(hash, wellPod)
		}
	}
	_, err = w.client.AppsV1().Deployments("dev").Update(ctx, d, metav1.UpdateOptions{})
	w.check(err)
}

var wellPod = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}

// pod makes another one.
func (w *standIn) pod(hash string, status corev1.PodStatus) {
	w.pods++
	yes := true
	status.PodIP = fmt.Sprintf("10.0.0.%d", w.pods)
	_, err := w.client.CoreV1().Pods("dev").Create(w.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("shop-%s-%d", hash, w.pods), Namespace: "dev", UID: types.UID(fmt.Sprintf("p%d", w.pods)),
			Labels:          map[string]string{"app": "shop", "pod-template-hash": hash},
			OwnerReferences: []metav1.OwnerReference{{UID: types.UID("r" + hash), Kind: "ReplicaSet", Name: "shop-" + hash, Controller: &yes}},
		},
		Spec: corev1.PodSpec{NodeName: "n"}, Status: status,
	}, metav1.CreateOptions{})
	w.check(err)
}

// evicted has another pod come in the place of one.
func (w *standIn) evicted(name string) {
	w.ended = append(w.ended, name)
	w.check(w.client.CoreV1().Pods("dev").Delete(w.t.Context(), name, metav1.DeleteOptions{}))
	w.pod(strings.Split(name, "-")[1], wellPod)
}

var kinds = map[string]string{"deployments": "Deployment", "replicasets": "ReplicaSet", "pods": "Pod", "events": "Event"}

// serveKube is the fake client's store, over HTTP.
func (w *standIn) serveKube(out http.ResponseWriter, in *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	body, err := io.ReadAll(in.Body)
	w.check(err)
	part := strings.Split(strings.Trim(in.URL.Path, "/"), "/")
	if part[0] == "api" {
		part = slices.Insert(part, 1, "")
	}
	if part[len(part)-1] == "selfsubjectaccessreviews" {
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
		w.check(err)
		at := object.(*authv1.SelfSubjectAccessReview).Spec.ResourceAttributes
		answerKube(out, http.StatusCreated, fmt.Appendf(nil, `{"kind":"SelfSubjectAccessReview","apiVersion":"authorization.k8s.io/v1","status":{"allowed":%v}}`, at.Verb+" "+at.Resource != w.denied))
		return
	}
	gvr := schema.GroupVersionResource{Group: part[1], Version: part[2], Resource: part[5]}
	gvk := gvr.GroupVersion().WithKind(kinds[gvr.Resource])
	var action clienttesting.Action
	switch {
	case part[4] != "dev":
		w.t.Errorf("namespace %s is asked", part[4])
	case in.URL.Query().Has("watch"):
		http.Error(out, "no watches here", http.StatusForbidden)
		return
	case len(part) == 8: // eviction
		w.evicted(part[6])
		answerKube(out, http.StatusCreated, []byte(`{"kind":"Status","apiVersion":"v1","status":"Success"}`))
		return
	case in.Method == http.MethodPatch:
		action = clienttesting.NewPatchAction(gvr, "dev", part[6], types.PatchType(in.Header.Get("Content-Type")), body)
	case len(part) == 7:
		action = clienttesting.NewGetAction(gvr, "dev", part[6])
	default:
		action = clienttesting.NewListAction(gvr, gvk, "dev", metav1.ListOptions{LabelSelector: in.URL.Query().Get("labelSelector")})
	}
	_, object, err := clienttesting.ObjectReaction(w.client.Tracker())(action)
	if err != nil {
		w.t.Errorf("%s %s: %v", in.Method, in.URL, err)
		http.Error(out, err.Error(), http.StatusInternalServerError)
		return
	}
	if in.Method == http.MethodPatch && gvr.Resource == "deployments" {
		w.control()
		object, err = w.client.Tracker().Get(gvr, "dev", part[6])
		w.check(err)
	}
	text, err := runtime.Encode(scheme.Codecs.LegacyCodec(gvr.GroupVersion()), object)
	w.check(err)
	answerKube(out, http.StatusOK, text)
}

func answerKube(out http.ResponseWriter, code int, text []byte) {
	out.Header().Set("Content-Type", "application/json")
	out.WriteHeader(code)
	_, _ = out.Write(text)
}

// serveConsul has an instance for each pod.
func (w *standIn) serveConsul(out http.ResponseWriter, in *http.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	list, err := w.client.CoreV1().Pods("dev").List(w.t.Context(), metav1.ListOptions{})
	w.check(err)
	id := filepath.Base(in.URL.Path)
	var value any = []api.ServiceEntry{}
	switch in.URL.Path {
	case "/v1/agent/self":
		value = map[string]any{"Config": map[string]any{"NodeName": "n"}}
	case "/v1/health/service/shop":
		var all []api.ServiceEntry
		for _, p := range list.Items {
			e := api.ServiceEntry{Node: &api.Node{Node: "n"}, Service: &api.AgentService{ID: p.Name, Service: "shop", Address: p.Status.PodIP}, Checks: api.HealthChecks{}}
			if w.drain[p.Name] {
				e.Checks = append(e.Checks, &api.HealthCheck{CheckID: api.ServiceMaintPrefix + p.Name, Status: api.HealthCritical})
			}
			all = append(all, e)
		}
		value = all
	case "/v1/agent/service/maintenance/" + id:
		w.drain[id] = in.URL.Query().Get("enable") == "true"
		w.said = append(w.said, "drain "+id)
	case "/v1/agent/health/service/id/" + id:
		value = api.AgentServiceChecksInfo{Service: &api.AgentService{ID: id}}
	default:
		w.t.Errorf("consul is asked for %s", in.URL)
	}
	w.check(json.NewEncoder(out).Encode(value))
}

func says(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("not said: %s\n%s", part, text)
		}
	}
}

func TestK8sVerbs(t *testing.T) {
	w := newStandIn(t)
	const k8s = "k8s: {workload: deployment/shop, namespace: dev, image: \"shop:${COMMIT7}\", within: 1m}\n"
	for _, step := range []struct {
		name, file, args string
		code             int
		image            string
		says             []string
	}{
		{name: "plan", args: "deploy --commit 22222222222 --plan", image: "shop:1", says: []string{"app image", "shop:1", "shop:2222222"}},
		{name: "plan as JSON", args: "deploy --commit 22222222222 --plan --json", image: "shop:1", says: []string{`"from": "shop:1"`, `"to": "shop:2222222"`}},
		{name: "no commit", args: "deploy", code: 2, image: "shop:1", says: []string{"name it with --commit"}},
		{name: "some hosts", args: "deploy --commit 2 --to web-1", code: 2, image: "shop:1", says: []string{"of hosts"}},
		{name: "deploy", args: "deploy --commit 22222222222", image: "shop:2222222", says: []string{"deployed", "was shop:1", "revision 2 (shop:2222222), 2 of 2 pods are new, 2 available"}},
		{name: "again", args: "deploy --commit 22222222222", image: "shop:2222222", says: []string{"unchanged", "already: nothing is changed"}},
		{name: "bad", args: "deploy --commit bad", code: 1, image: "shop:2222222", says: []string{"restored", "InvalidImageName: no such image", "it was put back and runs revision 4 (shop:2222222)"}},
		{name: "bad as JSON", args: "deploy --commit bad --json", code: 1, image: "shop:2222222", says: []string{`"state": "restored"`, `"done": false`}},
		{name: "rollback's plan", args: "rollback --plan", image: "shop:2222222", says: []string{"would go back to 1 (shop:1)"}},
		{name: "rollback", args: "rollback", image: "shop:1", says: []string{"rolled-back"}},
		{name: "no further", args: "rollback", code: 1, image: "shop:1", says: []string{"no revision before revision 7 (shop:1) is known to be good"}},
		{name: "to a revision", args: "rollback 6", image: "shop:2222222", says: []string{"rolled-back"}},
		{name: "releases", args: "releases", image: "shop:2222222", says: []string{"live, good", "shop:bad", "bad"}},
		{name: "restart", args: "restart", image: "shop:2222222", says: []string{"2 of 2: pod shop-2-", "restarted, 2 pods"}},
		{name: "no such health", file: "health: {cmd: uptime}\n", args: "restart", code: 2, image: "shop:2222222", says: []string{"cmd is of hosts"}},
		{name: "nothing to set", file: "k8s: {workload: deployment/shop, namespace: dev}\n", args: "deploy", code: 2, image: "shop:2222222", says: []string{"neither an image nor an env"}},
	} {
		file := k8s + step.file
		if strings.HasPrefix(step.file, "k8s") {
			file = step.file
		}
		code, out := w.run(file, strings.Fields(step.args)...)
		if code != step.code || w.image() != step.image {
			t.Errorf("%s: exit code %d, want %d; image %s, want %s\n%s", step.name, code, step.code, w.image(), step.image, out)
		}
		says(t, out, step.says...)
	}
	if len(w.ended) != replicas {
		t.Errorf("%v were restarted", w.ended)
	}

	w.denied = "patch deployments"
	code, out := w.run(k8s, "deploy", "--commit", "3333333")
	if code != 3 {
		t.Errorf("without the right: exit code %d\n%s", code, out)
	}
	says(t, out, "not permitted: to patch deployments.apps in namespace dev", "culvert rbac -n dev --for deploy | kubectl apply")
}

// What is deployed by a plan's file is what was planned, or nothing; and the same again
// goes on.
func TestK8sPlanFile(t *testing.T) {
	w := newStandIn(t)
	const image, env = "image: \"shop:${COMMIT7}\"", "env: \"AT=${RELEASE}\""
	file := func(sets string) string {
		return "k8s: {workload: deployment/shop, namespace: dev, within: 1m, " + sets + "}\n"
	}
	step := func(code int, sets, args string, parts ...string) {
		t.Helper()
		got, out := w.run(file(sets), strings.Fields(args)...)
		if got != code {
			t.Errorf("%s: exit code %d, want %d\n%s", args, got, code, out)
		}
		says(t, out, parts...)
	}
	is := func(image string) {
		t.Helper()
		if got := w.image(); got != image {
			t.Errorf("image %s, want %s", got, image)
		}
	}
	step(0, image, "deploy --commit 22222222222 --plan -o two")
	step(0, image, "deploy --commit 33333333333 --plan -o three")
	is("shop:1")
	step(1, env, "deploy --apply two", "what culvert.yaml says has changed")
	step(0, image, "deploy --apply two --wait 10m", "deployed", "was shop:1")
	is("shop:2222222")
	step(0, image, "deploy --apply two", "unchanged", "already: nothing is changed")
	step(1, image, "deploy --apply three", `its image was shop:1 when that was planned, and is shop:2222222 now`)
	step(0, image, "rollback")
	is("shop:1")
	step(0, image, "deploy --apply three", "deployed") // it is as it was, again
	is("shop:3333333")

	step(0, env, "deploy --commit 4 --plan -o four")
	step(0, env, "deploy --commit 5 --plan -o five")
	step(0, env, "deploy --apply four", "deployed")
	step(1, env, "deploy --apply five", "AT was nothing when that was planned, and is 2")
	step(0, image, "deploy --commit 66666666666 --plan -o six")
	step(0, env, "deploy --commit 7")
	step(1, image, "deploy --apply six", "its template is not what it was")
	is("shop:3333333")

	w.write("seven", `{"version": 1, "app": "shop", "release": "20260101-000000-2222222", "hosts": [{"host": "web"}]}`)
	step(1, image, "deploy --apply seven", "web was planned, and is not a host")
	w.write("eight", `{"version": 1, "app": "shop", "release": "20260101-000000-2222222"}`)
	step(1, image, "deploy --apply eight", "has changed")
}

// By Consul's registry each is drained, ended, and replaced by one that passes.
func TestK8sRestartByConsul(t *testing.T) {
	w := newStandIn(t)
	const file = "k8s: {workload: deployment/shop, namespace: dev}\ndrain: consul shop\n"
	code, out := w.run(file, "restart")
	if code != 0 || !slices.Equal(w.ended, []string{"shop-1-1", "shop-1-2"}) || !slices.Equal(w.said, []string{"drain shop-1-1", "drain shop-1-2"}) {
		t.Errorf("exit code %d, ended %v, consul was told %v\n%s", code, w.ended, w.said, out)
	}
	says(t, out, "2 of 2: shop-1-4 on n passes")
	w.consul.Close()
	if code, out := w.run(file, "restart"); code != 1 || len(w.ended) != 2 || !strings.Contains(out, "consul does not answer") {
		t.Errorf("without consul: exit code %d, ended %v\n%s", code, w.ended, out)
	}
}
