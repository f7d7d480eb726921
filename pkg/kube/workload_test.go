package kube

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

func testDeployment(name, app string, n int32) *appsv1.Deployment {
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "dev", ResourceVersion: "7"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &n, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}, Template: testTemplate(app, 8080),
		},
		Status: appsv1.DeploymentStatus{ReadyReplicas: n},
	}
}

func testStatefulSet(name, app string, n int32) *appsv1.StatefulSet {
	d := testDeployment(name, app, n)
	return &appsv1.StatefulSet{
		ObjectMeta: d.ObjectMeta, Spec: appsv1.StatefulSetSpec{Replicas: &n, Selector: d.Spec.Selector, Template: d.Spec.Template},
		Status: appsv1.StatefulSetStatus{ReadyReplicas: n},
	}
}

// madePod is one that a controller made.
func madePod(name, app, kind, by string) *corev1.Pod {
	p, yes := testPod(name, app, 8080), true
	if kind == "ReplicaSet" {
		p.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = by[strings.LastIndex(by, "-")+1:]
	}
	p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: by, Controller: &yes}}
	return p
}

func TestFindWorkload(t *testing.T) {
	held := testDeployment("held", "held", 0)
	held.Labels = map[string]string{heal.WorkloadLabel: "x9", heal.ReplicasLabel: "2", heal.OwnerLabel: "joe_at_pc"}
	volatile := testStatefulSet("volatile", "volatile", 1)
	volatile.Spec.PersistentVolumeClaimRetentionPolicy = &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{WhenScaled: appsv1.DeletePersistentVolumeClaimRetentionPolicyType}
	c := testCluster(fake.NewClientset(
		testService("volatile"), volatile,
		testService("web"), testService("web-too", selects(map[string]string{"app": "web"})), testDeployment("web", "web", 2), madePod("web-a", "web", "ReplicaSet", "web-1"),
		testService("db"), testStatefulSet("db", "db", 3), madePod("db-0", "db", "StatefulSet", "db"),
		testService("mixed"), testDeployment("mixed", "mixed", 1), testPod("by-hand", "mixed", 8080), madePod("other", "mixed", "ReplicaSet", "mixed-too-1"),
		testService("watched"), testDeployment("watched", "watched", 1), madePod("agent", "watched", "DaemonSet", "agent"),
		testService("two"), testDeployment("one", "two", 1), testStatefulSet("other", "two", 1),
		testService("idle"), testDeployment("idle", "idle", 0), testService("none"), testService("held"), held,
	))
	for _, test := range []struct {
		service, found, others string
		replicas               int
		err                    error
		says                   string
	}{
		{service: "web", found: "deployment/web", replicas: 2, others: "web-too"},
		{service: "db", found: "statefulset/db", replicas: 3},
		{service: "volatile", err: ErrNoWorkload, says: "would delete its volumes"},
		{service: "mixed", err: ErrNoWorkload, says: "not of deployment/mixed, and would go on answering: pod/by-hand, pod/other (of replicaset/mixed-too-1)"},
		{service: "watched", err: ErrNoWorkload, says: "not of deployment/watched, and would go on answering: pod/agent (of daemonset/agent)"},
		{service: "two", err: ErrNoWorkload, says: "deployment/one, statefulset/other"},
		{service: "idle", err: ErrNoWorkload, says: "no replicas"},
		{service: "none", err: ErrNoWorkload},
		{service: "held", err: ErrExchanged, says: "joe_at_pc"},
	} {
		s, err := c.FindService(t.Context(), Target{"service", test.service})
		if err != nil {
			t.Fatal(err)
		}
		w, err := c.FindWorkload(t.Context(), s)
		if test.err != nil {
			if !errors.Is(err, test.err) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v", test.service, err)
			}
			continue
		}
		if err != nil || w.String() != test.found || w.Replicas != test.replicas || strings.Join(w.Others, ",") != test.others {
			t.Errorf("%s: %+v, %v", test.service, w, err)
		}
	}
}

// scaleRouter is a router that stands in for deployment/web or statefulset/web.
func scaleRouter(t *testing.T, kind string) (*Shadow, *fake.Clientset, func() liveWorkload) {
	t.Helper()
	var object runtime.Object = testDeployment("web", "web", 2)
	if kind == "statefulset" {
		object = testStatefulSet("web", "web", 2)
	}
	client := fake.NewClientset(testService("web"), object)
	c := testCluster(client)
	cfg := routerConfig(t, c, "x1")
	var err error
	if cfg.Router.Workload, err = c.FindWorkload(t.Context(), cfg.Router.Service); err != nil {
		t.Fatal(err)
	}
	now := func() liveWorkload {
		w, err := c.getWorkload(t.Context(), "dev", Workload{Kind: kind, Name: "web"})
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	return c.NewShadow(cfg, routerRights(ByDeployment)), client, now
}

func setReady(t *testing.T, client *fake.Clientset, kind string, n int32) {
	if kind == "statefulset" {
		s, err := client.AppsV1().StatefulSets("dev").Get(t.Context(), "web", metav1.GetOptions{})
		if err == nil {
			s.Status.ReadyReplicas = n
			_, err = client.AppsV1().StatefulSets("dev").Update(t.Context(), s, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Error(err)
		}
		return
	}
	d, err := client.AppsV1().Deployments("dev").Get(t.Context(), "web", metav1.GetOptions{})
	if err == nil {
		d.Status.ReadyReplicas = n
		_, err = client.AppsV1().Deployments("dev").Update(t.Context(), d, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Error(err)
	}
}

// A workload goes to nothing and back, once; the way down waits for the last pod,
// the way up for as many as were ready, and not for ever.
func TestScaleDownAndUp(t *testing.T) {
	for _, kind := range []string{"deployment", "statefulset"} {
		for _, late := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				s, client, now := scaleRouter(t, kind)
				pods := client.CoreV1().Pods("dev")
				ours := madePod("web-a", "web", "ReplicaSet", "web-1")
				if kind == "statefulset" {
					ours = madePod("web-a", "web", "StatefulSet", "web")
				}
				for _, p := range []*corev1.Pod{ours, madePod("agent-1", "web", "DaemonSet", "agent"), madePod("other", "web", "ReplicaSet", "web-too-1")} { // of which two stay
					if _, err := pods.Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				before := now()
				time.AfterFunc(5*time.Second, func() {
					if err := pods.Delete(t.Context(), "web-a", metav1.DeleteOptions{}); err != nil {
						t.Error(err)
					}
					setReady(t, client, kind, 0)
				})
				var said []string
				say := func(line string) { said = append(said, line) }
				begin := time.Now()
				if left, err := s.ScaleDown(t.Context(), say); err != nil || len(left) > 0 || time.Since(begin) < 5*time.Second || time.Since(begin) > 6*time.Second {
					t.Fatalf("after %v: %v, %v", time.Since(begin), left, err)
				}
				if w := now(); w.Replicas != 0 || w.live.Labels[heal.WorkloadLabel] != "x1" || w.live.Labels[heal.ReplicasLabel] != "2" {
					t.Errorf("%+v", w)
				}
				if left, err := s.ScaleDown(t.Context(), say); err != nil || len(left) > 0 { // again
					t.Error(left, err)
				}
				after, least, most := 3*time.Second, 3*time.Second, 4*time.Second
				if late {
					after, least, most = 2*time.Minute, readyLimit, readyLimit+time.Second
				}
				timer := time.AfterFunc(after, func() { setReady(t, client, kind, 2) })
				begin = time.Now()
				if changed, err := s.ScaleUp(t.Context(), say); err != nil || !changed || time.Since(begin) < least || time.Since(begin) > most {
					t.Errorf("after %v: %v, %v", time.Since(begin), changed, err)
				}
				timer.Stop()
				if w := now(); w.Replicas != before.Replicas || len(w.live.Labels) != 0 {
					t.Errorf("%+v", w)
				}
				if !slices.Equal(said, []string{"waiting for the end of web-a", "waiting for the pods of " + kind + "/web: 0 of 2 are ready"}) {
					t.Errorf("%q", said)
				}
				begin = time.Now()
				if changed, err := s.ScaleUp(t.Context(), say); err != nil || changed || time.Since(begin) > 0 {
					t.Errorf("again: after %v: %v, %v", time.Since(begin), changed, err)
				}
			})
		}
	}
}

// Whatever others did to it meanwhile stays.
func TestScaleMeetsOthers(t *testing.T) {
	s, client, now := scaleRouter(t, "deployment")
	scale := func(n int32) {
		d, err := client.AppsV1().Deployments("dev").Get(t.Context(), "web", metav1.GetOptions{})
		if err == nil {
			d.Spec.Replicas, d.Status.ReadyReplicas = &n, n
			_, err = client.AppsV1().Deployments("dev").Update(t.Context(), d, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	say := func(string) {}
	down := func(s *Shadow) error {
		t.Helper()
		left, err := s.ScaleDown(t.Context(), say)
		if len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		return err
	}
	up := func(s *Shadow) error { _, err := s.ScaleUp(t.Context(), say); return err }
	scaled := func(want int, mark bool) {
		t.Helper()
		if to, marked, err := s.Scaled(t.Context()); err != nil || to != want || marked != mark {
			t.Errorf("scaled to %d, marked %v, want %d, %v; %v", to, marked, want, mark, err)
		}
	}
	if err := down(s); err != nil {
		t.Fatal(err)
	}
	scaled(0, true)
	other := s.cfg
	other.Session = "x2"
	second := s.cluster.NewShadow(other, routerRights(ByDeployment))
	if err := down(second); !errors.Is(err, ErrExchanged) || !strings.Contains(err.Error(), labelValue(Self().Owner())) {
		t.Errorf("the second: %v", err)
	}
	if err := up(second); err != nil || now().Replicas != 0 {
		t.Errorf("%+v, %v", now(), err)
	}
	scale(5)
	scaled(5, true)
	if _, err := client.CoreV1().Pods("dev").Create(t.Context(), madePod("web-b", "web", "ReplicaSet", "web-1"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err) // one that is not waited for
	}
	if err := down(s); err != nil || now().Replicas != 5 {
		t.Errorf("%+v, %v", now(), err)
	}
	if err := up(s); err != nil || now().Replicas != 5 || len(now().live.Labels) != 0 {
		t.Errorf("%+v, %v", now(), err)
	}
	scaled(5, false)
	if err := client.CoreV1().Pods("dev").Delete(t.Context(), "web-b", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	scale(0)
	if err := down(s); err != nil || len(now().live.Labels) != 0 {
		t.Errorf("%+v, %v", now(), err)
	}
	if err := client.AppsV1().Deployments("dev").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := up(s); err != nil {
		t.Error(err)
	}
	if err := down(s); !errors.Is(err, ErrNoTarget) {
		t.Error(err)
	}
}

// A pod that does not end, as on a dead node, is waited for as long as it has to
// end, and then named.
func TestScaleDownIsBounded(t *testing.T) {
	for _, grace := range []*int64{nil, new(int64)} {
		synctest.Test(t, func(t *testing.T) {
			s, client, _ := scaleRouter(t, "deployment")
			d, err := client.AppsV1().Deployments("dev").Get(t.Context(), "web", metav1.GetOptions{})
			if err == nil {
				d.Spec.Template.Spec.TerminationGracePeriodSeconds = grace
				_, err = client.AppsV1().Deployments("dev").Update(t.Context(), d, metav1.UpdateOptions{})
			}
			if err == nil {
				_, err = client.CoreV1().Pods("dev").Create(t.Context(), madePod("web-a", "web", "ReplicaSet", "web-1"), metav1.CreateOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
			want := endSlack
			if grace == nil {
				want += 30 * time.Second
			}
			begin := time.Now()
			left, err := s.ScaleDown(t.Context(), func(string) {})
			if took := time.Since(begin); err != nil || !slices.Equal(left, []string{"web-a"}) || took < want || took > want+time.Second {
				t.Errorf("left %v after %v: %v", left, took, err)
			}
		})
	}
}

// The router is told what to heal and may do so; who joins knows of it, and
// Clean finds what nobody holds.
func TestScaleIsUndone(t *testing.T) {
	for _, way := range []string{"delete", "joined", "clean"} {
		synctest.Test(t, func(t *testing.T) {
			s, client, now := scaleRouter(t, "deployment")
			client.PrependReactor("create", "services", withAddress)
			err := errors.Join(s.Create(t.Context(), nil), s.Swap(t.Context()))
			if _, serr := s.ScaleDown(t.Context(), func(string) {}); err != nil || serr != nil {
				t.Fatal(err, serr)
			}
			role, err := client.RbacV1().Roles("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})
			if err != nil || !slices.ContainsFunc(role.Rules, func(r rbacv1.PolicyRule) bool {
				return reflect.DeepEqual(r, rbacv1.PolicyRule{Verbs: []string{"get", "patch"}, APIGroups: []string{"apps"}, Resources: []string{"deployments"}, ResourceNames: []string{"web"}})
			}) {
				t.Errorf("%+v, %v", role, err)
			}
			d, err := client.AppsV1().Deployments("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})
			if err != nil || !slices.Contains(d.Spec.Template.Spec.Containers[0].Args, "--workload=deployments/web") {
				t.Errorf("%+v, %v", d, err)
			}
			switch way {
			case "delete":
				err = s.Delete(t.Context())
			case "joined":
				var other *Shadow
				if other, _, err = s.cluster.OpenRouter(t.Context(), "x1", Path{}, routerRights(ByDeployment)); err == nil {
					err = other.Delete(t.Context())
				}
			case "clean":
				if err := client.CoordinationV1().Leases("dev").Delete(t.Context(), "culvert-x1", metav1.DeleteOptions{}); err != nil {
					t.Error(err)
				}
				var cleaned []Cleaned
				cleaned, err = s.cluster.Clean(t.Context(), CleanConfig{})
				if len(cleaned) != 1 || !slices.Contains(cleaned[0].Objects, "replicas of deployment/web") {
					t.Errorf("%+v", cleaned)
				}
			}
			if w := now(); err != nil || w.Replicas != 2 || len(w.live.Labels) != 0 || serviceNow(t, client).Spec.Selector["app"] != "web" {
				t.Errorf("%s: %+v, %v", way, w, err)
			}
		})
	}
}

func TestRBACOfScale(t *testing.T) {
	text, err := RBAC("dev", false, Scale)
	if err != nil {
		t.Fatal(err)
	}
	var role rbacv1.Role
	if err := yaml.UnmarshalStrict([]byte(text), &role); err != nil {
		t.Fatal(err)
	}
	var asked []string
	for _, r := range scaleRights() {
		for _, verb := range r.verbs {
			asked = append(asked, strings.Join([]string{verb, r.group, r.resource, r.name}, " "))
		}
	}
	same(t, "Role", asked, ruleLines(role.Rules))
}

// Every call of an exchange by scale, and of one by stand-ins, fails in turn:
// nothing of it is left, and Service and workload are as they were.
func TestMethodsFailInTurn(t *testing.T) {
	for _, mode := range []Mode{ByDeployment, ByBareDeployment} {
		for method, want := range map[string]int{"scale": 6, "stand-ins": 9} {
			n := 1
			for methodFailing(t, mode, method, n) {
				n++
			}
			if n < want {
				t.Errorf("%s, %s: only %d calls", mode, method, n-1)
			}
		}
	}
}

func methodFailing(t *testing.T, mode Mode, method string, n int) (failed bool) {
	t.Helper()
	c, client := standCluster(testService("web"), testDeployment("web", "web", 2))
	target, find := "web", Target{"service", "web"}
	if method == "stand-ins" {
		target, find = "db", Target{"pod", "db-1"}
	}
	cfg := testConfig("x1")
	cfg.Router = &RouterConfig{ClientKey: []byte("client"), HostPublic: []byte("public")}
	var err error
	if cfg.Router.Service, err = c.FindService(t.Context(), find); err != nil {
		t.Fatal(err)
	}
	if method == "scale" {
		if cfg.Router.Workload, err = c.FindWorkload(t.Context(), cfg.Router.Service); err != nil {
			t.Fatal(err)
		}
	}
	dump := func() string {
		s, err := client.CoreV1().Services("dev").Get(t.Context(), target, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		d, err := client.AppsV1().Deployments("dev").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(s.Spec, s.Annotations, *d.Spec.Replicas, len(d.Labels))
	}
	before := dump()
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
		return true, nil, errors.New("wire cut")
	})
	s := c.NewShadow(cfg, routerRights(mode))
	err = s.Create(t.Context(), nil)
	if err == nil {
		err = s.Swap(t.Context())
	}
	if err == nil {
		_, err = s.ScaleDown(t.Context(), func(string) {})
	}
	what := fmt.Sprintf("%s, %s, call %d fails", mode, method, n)
	if failed != (err != nil) {
		t.Errorf("%s: %v", what, err)
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if left, err := c.find(t.Context(), "dev", ""); err != nil || len(left) > 0 {
		t.Errorf("%s: left %v, %v", what, left, err)
	}
	if after := dump(); after != before {
		t.Errorf("%s: it was %s and is %s", what, before, after)
	}
	return failed
}
