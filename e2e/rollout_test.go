package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A rollingWorkload is rolled out by a culvert.yaml of its own.
type rollingWorkload struct {
	t          *testing.T
	kind, name string
	dir        string
	health     string // of the file
}

// startRolling makes a workload of a kind, with a Service, and waits until it runs.
func startRolling(t *testing.T, kind string) *rollingWorkload {
	t.Helper()
	w := &rollingWorkload{t: t, kind: kind, name: "roll-" + kind, dir: t.TempDir(), health: `{get: "http://127.0.0.1:8080/ready"}`}
	manifest := alone(w.name, "")
	switch kind {
	case "statefulset":
		manifest = strings.Replace(manifest, "kind: Deployment", "kind: StatefulSet", 1)
		manifest = strings.Replace(manifest, "replicas: 2", "replicas: 2\n  serviceName: "+w.name, 1)
	case "daemonset":
		manifest = strings.Replace(manifest, "kind: Deployment", "kind: DaemonSet", 1)
		manifest = strings.Replace(manifest, "  replicas: 2\n", "", 1)
	}
	apply(t, manifest)
	t.Cleanup(func() {
		kubectl(t, "delete", kind+",svc", "-n", namespace, "--ignore-not-found", w.name)
		eventually(t, 60*time.Second, "its pods end", func() error { return nothing(podsOfApp(t, w.name)) })
	})
	w.whole()
	known(t, w.name)
	return w
}

// whole wants it to run, by kubectl's word.
func (w *rollingWorkload) whole() {
	w.t.Helper()
	kubectl(w.t, "rollout", "status", "-n", namespace, w.kind+"/"+w.name, "--timeout=90s")
}

// file says in culvert.yaml what is to be set.
func (w *rollingWorkload) file(set string) string {
	w.t.Helper()
	text := fmt.Sprintf(`
app: %s
k8s: {workload: %s/%s, namespace: %s, within: 3m, %s}
health: %s
`, w.name, w.kind, w.name, namespace, set, w.health)
	return writeFile(w.t, w.dir, "culvert.yaml", text, 0o600)
}

// culvert begins a verb, of somebody who may do what culvert rbac --for deploy prints and
// no more.
func (w *rollingWorkload) culvert(verb, set string, args ...string) *running {
	w.t.Helper()
	return start(w.t, slices.Concat([]string{verb, "-f", w.file(set), "--kubeconfig", filepath.Join(root, "e2e/.run/kubeconfig-dev")}, args)...)
}

// has is its image and its variable.
func (w *rollingWorkload) has(image, name string) {
	w.t.Helper()
	got := kubectl(w.t, "get", "-n", namespace, w.kind+"/"+w.name, "-o", "jsonpath={.spec.template.spec.containers[0].image} {.spec.template.spec.containers[0].env[0].value}")
	if want := image + " " + name; got != want {
		w.t.Errorf("%s: %s, want %s", w.name, got, want)
	}
	eventually(w.t, 30*time.Second, w.name+" has pods of "+image+" only", func() error {
		out := kubectl(w.t, "get", "pods", "-n", namespace, "-l", "app="+w.name, "-o", `jsonpath={range .items[*]}{.spec.containers[0].image} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
		if strings.Count(out, image+" True") != strings.Count(out, "\n")+1 {
			return errors.New(out)
		}
		return nil
	})
}

// replaced wants pods that are none of these, but for a number of them.
func (w *rollingWorkload) replaced(before []string, but int) {
	w.t.Helper()
	eventually(w.t, 30*time.Second, w.name+" has other pods", func() error {
		left := slices.DeleteFunc(w.uids(), func(uid string) bool { return !slices.Contains(before, uid) })
		if len(left) != but {
			return fmt.Errorf("%v of %v are left", left, before)
		}
		return nil
	})
}

// uids are those of its pods.
func (w *rollingWorkload) uids() []string {
	w.t.Helper()
	return strings.Fields(kubectl(w.t, "get", "pods", "-n", namespace, "-l", "app="+w.name, "-o", "jsonpath={.items[*].metadata.uid}"))
}

// anotherTag gives the nodes the sample's image by a second name.
func anotherTag(t testing.TB) {
	t.Helper()
	for _, node := range strings.Fields(kubectl(t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}")) {
		if out, err := on(node, "ctr", "-n", "k8s.io", "images", "tag", "--force", "localhost/kit:1", "localhost/kit:2").CombinedOutput(); err != nil {
			t.Fatalf("tag an image on %s: %v: %s", node, err, out)
		}
	}
}

// A good image is rolled out, a bad one is put back and said what was wrong with it;
// a rollback leads to what was good; and a restart replaces all pods.
func TestRollOut(t *testing.T) {
	check := workloadsBefore(t)
	t.Cleanup(func() { check(60 * time.Second) })
	allow(t, []string{"--for", "deploy"}, "culvert-rollout", "culvert-inside")
	anotherTag(t)
	var all []*rollingWorkload
	for _, kind := range []string{"deployment", "statefulset", "daemonset"} {
		all = append(all, startRolling(t, kind))
	}
	// all at the same time: mostly they wait
	step := func(what string, code int, begin func(w *rollingWorkload) *running, then func(w *rollingWorkload, said string)) {
		t.Helper()
		var begun []*running
		for _, w := range all {
			begun = append(begun, begin(w))
		}
		for i, w := range all {
			if got := begun[i].wait(5 * time.Minute); got != code {
				t.Errorf("%s: %s ended with %d, want %d\n%s", what, w.name, got, code, begun[i].talk.String())
			}
			then(w, begun[i].talk.String())
		}
	}
	says := func(w *rollingWorkload, said string, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if !strings.Contains(said, part) {
				t.Errorf("%s: not said: %s\n%s", w.name, part, said)
			}
		}
	}

	const image2 = "image: localhost/kit:2"
	plan := func(w *rollingWorkload) string { return filepath.Join(w.dir, "plan.json") }
	step("a plan", 0, func(w *rollingWorkload) *running { return w.culvert("deploy", image2, "--plan", "-o", plan(w)) }, func(w *rollingWorkload, said string) {
		says(w, said, "localhost/kit:1", "localhost/kit:2")
		w.has("localhost/kit:1", "original")
	})
	step("a good image, as it was planned", 0, func(w *rollingWorkload) *running { return w.culvert("deploy", image2, "--apply", plan(w)) }, func(w *rollingWorkload, said string) {
		says(w, said, "deployed", "was localhost/kit:1", "available")
		w.has("localhost/kit:2", "original")
	})
	step("the same again", 0, func(w *rollingWorkload) *running { return w.culvert("deploy", image2) }, func(w *rollingWorkload, said string) {
		says(w, said, "already: nothing is changed", "unchanged")
	})
	step("a bad image", 1, func(w *rollingWorkload) *running { return w.culvert("deploy", "image: localhost/kit:none") }, func(w *rollingWorkload, said string) {
		says(w, said, "localhost/kit:none", "ImagePull", "it was put back", "restored")
		w.whole()
		w.has("localhost/kit:2", "original")
	})
	step("a variable", 0, func(w *rollingWorkload) *running { return w.culvert("deploy", "env: NAME=third") }, func(w *rollingWorkload, said string) {
		says(w, said, "deployed")
		w.has("localhost/kit:2", "third")
		comes(t, "third", at(w.name))
	})
	step("what was planned before that", 1, func(w *rollingWorkload) *running { return w.culvert("deploy", image2, "--apply", plan(w)) }, func(w *rollingWorkload, said string) {
		says(w, said, "is not what it was when that was planned")
		w.has("localhost/kit:2", "third")
	})
	step("a rollback", 0, func(w *rollingWorkload) *running { return w.culvert("rollback", image2) }, func(w *rollingWorkload, said string) {
		says(w, said, "rolled-back")
		w.has("localhost/kit:2", "original")
		comes(t, "original", at(w.name))
	})
	step("one more", 0, func(w *rollingWorkload) *running { return w.culvert("rollback", image2) }, func(w *rollingWorkload, _ string) {
		w.has("localhost/kit:1", "original") // neither what was bad, nor what was gone back from
	})
	step("a list", 0, func(w *rollingWorkload) *running { return w.culvert("releases", image2) }, func(w *rollingWorkload, said string) {
		says(w, said, "live, good", "localhost/kit:none", "bad")
	})
	before := map[string][]string{}
	step("a restart", 0, func(w *rollingWorkload) *running {
		before[w.name] = w.uids()
		return w.culvert("restart", image2)
	}, func(w *rollingWorkload, said string) {
		says(w, said, "wire open", "restarted")
		w.whole()
		w.replaced(before[w.name], 0)
	})
}

// One by one, no request is lost; a disruption budget is kept; and the first pod that is
// not well is the last.
func TestRollOutRestartLosesNothing(t *testing.T) {
	allow(t, []string{"--for", "deploy"}, "culvert-rollout", "culvert-inside")
	w := startRolling(t, "deployment")
	apply(t, here(`
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: roll-deployment, namespace: shop}
spec: {minAvailable: 1, selector: {matchLabels: {app: roll-deployment}}}
`))
	t.Cleanup(func() { kubectl(t, "delete", "pdb", "-n", namespace, "roll-deployment") })
	loads := [][]string{{"-c", "4"}, {"-c", "4", "-post"}, {"-c", "2", "-close"}, {"-c", "2", "-h2"}}
	before := w.uids()
	all := under(t, loads, "http://"+serviceIP(t, w.name)+"/report", func() {
		s := w.culvert("restart", "image: localhost/kit:1")
		if code := s.wait(patience * 2); code != 0 {
			t.Errorf("culvert ended with %d\n%s", code, s.talk.String())
		}
	})
	for i, o := range all {
		t.Logf("%v: %d requests, p99 %v ms", loads[i], o.Requests, o.P99ms)
		if o.Failures > 0 || o.Requests == 0 {
			t.Errorf("%v: %d lost of %d: %v", loads[i], o.Failures, o.Failures+o.Requests, o.Errors)
		}
	}
	w.replaced(before, 0)

	before = w.uids()
	w.health = `{get: "http://127.0.0.1:8080/ready", status: 418, within: 30s}`
	s := w.culvert("restart", "image: localhost/kit:1")
	if code := s.wait(patience); code != 1 || !strings.Contains(s.talk.String(), "pod 1 of 2") || !strings.Contains(s.talk.String(), "answers 200") {
		t.Errorf("culvert ended with %d\n%s", code, s.talk.String())
	}
	w.replaced(before, 1)
}

// The gate of a restart goes by a shadow, to whom a pod that listens on its loopback only is
// not well; where there can be none it goes by port-forward, and says so. Whatever ends it,
// nothing of the shadow is left, and for one that never started the cluster itself sees to it.
func TestRollOutRestartGate(t *testing.T) {
	allow(t, []string{"--for", "deploy"}, "culvert-rollout", "culvert-inside")
	w := &rollingWorkload{t: t, kind: "deployment", name: "roll-inside", dir: t.TempDir(), health: `{get: "http://localhost:8080/ready", within: 30s}`}
	manifest := strings.NewReplacer("replicas: 2", "replicas: 1", "args: [serve]", "args: [serve, -host, 127.0.0.1, -linger, 0s]").Replace(alone(w.name, ""))
	apply(t, strings.Replace(manifest, "readinessProbe:", "# readinessProbe:", 1)) // the kubelet would ask at the pod's address
	t.Cleanup(func() { kubectl(t, "delete", "deployment,svc", "-n", namespace, w.name) })
	w.whole()
	check := workloadsBefore(t)
	const kit, other = "image: localhost/kit:1", "the gate goes by port-forward"
	ends := func(s *running, code int, parts ...string) {
		t.Helper()
		if got := s.wait(patience); got != code {
			t.Errorf("culvert ended with %d, want %d\n%s", got, code, s.talk.String())
		}
		for _, part := range parts {
			if !strings.Contains(s.talk.String(), part) {
				t.Errorf("not said: %s\n%s", part, s.talk.String())
			}
		}
		check(30 * time.Second)
	}
	ends(w.culvert("restart", kit), 1, "wire open", "it listens on 127.0.0.1 of the pod only")

	begun := func() *running {
		s := w.culvert("restart", kit)
		s.says("1 of 1: pod roll-inside-")
		return s
	}
	killed := func(s *running) {
		t.Helper()
		pid, err := strconv.Atoi(laptop(t, "pgrep", "-f", "^"+culvertBin+" restart"))
		if err != nil {
			t.Fatal(err)
		}
		kill9(t, pid)
		s.wait(10 * time.Second)
	}
	job := func(path string) string {
		t.Helper()
		return kubectl(t, "get", "jobs", "-n", namespace, "-l", "app.kubernetes.io/managed-by=culvert", "-o", "jsonpath={.items[*]"+path+"}")
	}
	s := begun()
	if name, end := job(".metadata.name"), job(".spec.activeDeadlineSeconds"); name == "" || end != "" {
		t.Errorf("job %q of a gate that works ends by itself: %q s", name, end)
	}
	s.interrupt()
	ends(s, 1, "interrupted")
	s = begun()
	killed(s)
	laptop(t, culvertBin, "clean", "-n", namespace)
	check(30 * time.Second)

	everyNode := func(verb string) { kubectl(t, verb, "-l", "kubernetes.io/os=linux") }
	t.Cleanup(func() { everyNode("uncordon") })
	everyNode("cordon")
	s = w.culvert("restart", kit)
	s.says("shadow made, as a Job")
	killed(s)
	name, end := job(".metadata.name"), job(".spec.activeDeadlineSeconds")
	if end != "1800" {
		t.Errorf("job %q of a shadow that did not start: it ends after %q s", name, end)
	}
	kubectl(t, "patch", "job", "-n", namespace, name, "-p", `{"spec":{"activeDeadlineSeconds":1}}`) // the time passes
	check(30 * time.Second)
	everyNode("uncordon")

	w.health = `{get: "http://localhost:8080/ready"}`
	noImage := culvert([]string{"CULVERT_IMAGE=localhost/culvert-shadow:none"}, "restart", "-f", w.file(kit))
	ends(startAs(t, noImage), 0, other, "localhost/culvert-shadow:none", "restarted")
	apply(t, without(t, rbac(t, "-n", namespace, "--for", "deploy"), "  - apiGroups: [batch]\n    resources: [jobs]\n    verbs: [create, delete, get, patch]\n"))
	check = workloadsBefore(t) // the Role is another one
	ends(w.culvert("restart", kit), 0, other, "not permitted: to create jobs.batch", "restarted")
}
