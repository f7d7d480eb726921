package kube

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// defaultDeny shuts every pod of the namespace in.
func defaultDeny() runtime.Object {
	policy := testPolicy(metav1.LabelSelector{})[0]
	policy.Name, policy.Namespace = "default-deny", "dev"
	return &policy
}

// changes counts what changes something.
func changes(a clienttesting.Action) bool {
	verb := a.GetVerb()
	return verb == "create" || verb == "patch" || verb == "update"
}

// Every call that creates or changes something fails in turn, once without and
// once with its effect: nothing of the session is left, and what was in the
// namespace is.
func TestCreateFailsInTurn(t *testing.T) {
	defer goleak.VerifyNone(t)
	for _, mode := range []Mode{ByDeployment, ByJob} {
		for _, effect := range []bool{false, true} {
			for n := 1; ; n++ {
				failed := createFailing(t, mode, effect, n)
				if !failed {
					if n < 4 {
						t.Errorf("%s: only %d calls", mode, n-1)
					}
					break
				}
			}
		}
	}
}

// createFailing lets the n-th call fail; it tells whether there was one.
func createFailing(t *testing.T, mode Mode, effect bool, n int) bool {
	t.Helper()
	client := fake.NewClientset(defaultDeny())
	count, failed := 0, false
	client.PrependReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if !changes(a) {
			return false, nil, nil
		}
		count++
		if count != n {
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
	c := testCluster(client)
	s := c.NewShadow(testConfig("x1"), allRights(mode))
	err := s.Create(t.Context(), nil)
	what := fmt.Sprintf("%s, call %d fails, effect %v", mode, n, effect)
	if failed != (err != nil) {
		t.Errorf("%s: %v", what, err)
	}
	if err == nil {
		if err := s.Delete(t.Context()); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	left, err := c.find(t.Context(), "dev", "")
	if err != nil || len(left) > 0 {
		t.Errorf("%s: left %v, %v", what, left, err)
	}
	if _, err := client.NetworkingV1().NetworkPolicies("dev").Get(t.Context(), "default-deny", metav1.GetOptions{}); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	return failed
}

// Ctrl-C after any call leaves nothing either.
func TestCreateCancelledInTurn(t *testing.T) {
	defer goleak.VerifyNone(t)
	for _, mode := range []Mode{ByDeployment, ByJob} {
		for n := 1; n < 20; n++ {
			client := fake.NewClientset(defaultDeny())
			ctx, cancel := context.WithCancel(t.Context())
			count := 0
			client.PrependReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
				if count++; changes(a) && count >= n {
					cancel()
				}
				return false, nil, nil
			})
			c := testCluster(client)
			err := c.NewShadow(testConfig("x1"), allRights(mode)).Create(ctx, nil)
			cancelled := ctx.Err() != nil
			cancel()
			left, findErr := c.find(t.Context(), "dev", "")
			if cancelled && (!errors.Is(err, context.Canceled) || len(left) > 0 || findErr != nil) {
				t.Errorf("%s, cancelled at %d: %v, left %v, %v", mode, n, err, left, findErr)
			}
		}
	}
}

// Everything hangs on the one root, and the root on nothing.
func TestOwners(t *testing.T) {
	for mode, root := range map[Mode]string{ByDeployment: "Lease", ByJob: "Job"} {
		client := fake.NewClientset(defaultDeny())
		c := testCluster(client)
		if err := c.NewShadow(testConfig("x1"), allRights(mode)).Create(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		kinds := map[string]bool{}
		for _, k := range c.kinds("dev") {
			objects, err := k.list(t.Context(), metav1.ListOptions{LabelSelector: labelSession + "=x1"})
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range itemsOf(t, objects) {
				kinds[k.name] = true
				refs := o.GetOwnerReferences()
				if k.name == root {
					if len(refs) != 0 {
						t.Errorf("%s: the root is owned by %v", mode, refs)
					}
					continue
				}
				if len(refs) != 1 || refs[0].Kind != root || refs[0].Name != "culvert-x1" || refs[0].BlockOwnerDeletion != nil {
					t.Errorf("%s: %s is owned by %v", mode, k.name, refs)
				}
			}
		}
		want := map[Mode]int{ByDeployment: 7, ByJob: 4}[mode]
		if len(kinds) != want {
			t.Errorf("%s makes %v", mode, kinds)
		}
	}
}

// What may not be listed or deleted is left to the garbage collector.
func TestDeleteWithFewRights(t *testing.T) {
	client := fake.NewClientset()
	c := testCluster(client)
	s := c.NewShadow(testConfig("x1"), allRights(ByJob))
	if err := s.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	client.PrependReactor("*", "secrets", func(a clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "", errors.New("rbac"))
	})
	if err := s.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := client.BatchV1().Jobs("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the root: %v", err)
	}
}

// A removal that does not come to an end names what stays.
func TestDeleteNamesWhatIsLeft(t *testing.T) {
	client := fake.NewClientset()
	c := testCluster(client)
	s := c.NewShadow(testConfig("x1"), allRights(ByDeployment))
	if err := s.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	client.PrependReactor("delete", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "", errors.New("rbac"))
	})
	ctx, cancel := context.WithCancel(t.Context())
	rounds := 0
	client.PrependReactor("list", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) {
		if rounds++; rounds > 3 {
			cancel()
		}
		return false, nil, nil
	})
	err := s.Delete(ctx)
	if !errors.Is(err, ErrLeft) || !strings.Contains(err.Error(), "secret/culvert-x1") {
		t.Errorf("%v", err)
	}
}

// Credentials that are refused once are tried again, for client-go has others by
// then; refused for good, nobody waits until the limit.
func TestDeleteRefused(t *testing.T) {
	for _, test := range []struct {
		times int
		left  bool
	}{{1, false}, {refusals, false}, {1000, true}} {
		synctest.Test(t, func(t *testing.T) {
			client := fake.NewClientset()
			s := testCluster(client).NewShadow(testConfig("x1"), allRights(ByDeployment))
			if err := s.Create(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			asked := 0
			client.PrependReactor("*", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
				asked++
				return asked <= test.times, nil, apierrors.NewUnauthorized("expired")
			})
			begin := time.Now()
			err := s.Delete(t.Context())
			if left := errors.Is(err, ErrLeft); left != test.left || left != errors.Is(err, ErrUnauthorized) {
				t.Errorf("%d times: %v", test.times, err)
			}
			if took := time.Since(begin); took > deleteLimit/2 {
				t.Errorf("%d times: after %v", test.times, took)
			}
		})
	}
}

// Without the right to open what a policy shuts, that is said.
func TestPolicyThatStaysShut(t *testing.T) {
	c := testCluster(fake.NewClientset(defaultDeny()))
	rights := allRights(ByDeployment)
	delete(rights.held, "here create networking.k8s.io/networkpolicies")
	var said []string
	if err := c.NewShadow(testConfig("x1"), rights).Create(t.Context(), func(s string) { said = append(said, s) }); err != nil {
		t.Fatal(err)
	}
	if len(said) != 1 || !strings.Contains(said[0], "network policy") {
		t.Errorf("%q", said)
	}
}

func TestJudgePod(t *testing.T) {
	withStatus := func(s corev1.PodStatus) []corev1.Pod {
		return []corev1.Pod{{
			ObjectMeta: metav1.ObjectMeta{Name: "culvert-x1-a"},
			Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Image: "img"}}}, Status: s,
		}}
	}
	waiting := func(reason string) []corev1.Pod {
		return withStatus(corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: "raw words"}},
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 3, Reason: "Error", Message: "no keys\n"}},
		}}})
	}
	event := func(reason, message string) []corev1.Event {
		return []corev1.Event{{InvolvedObject: corev1.ObjectReference{Name: "culvert-x1-a"}, Reason: reason, Message: message}}
	}
	tests := []struct {
		name   string
		pods   []corev1.Pod
		events []corev1.Event
		words  string
		fails  string
		ready  bool
		unfit  bool
	}{
		{name: "none", words: "waiting for the pod to be made"},
		{name: "creating", pods: waiting("ContainerCreating"), words: "creating the container"},
		{name: "pulling", pods: waiting("ContainerCreating"), events: event("Pulling", ""), words: "pulling the image img"},
		{name: "mount", pods: waiting("ContainerCreating"), events: event("FailedMount", "secret not found"), words: "FailedMount: secret not found"},
		{name: "no image", pods: waiting("ErrImagePull"), fails: "ErrImagePull: raw words"},
		{name: "no image, again", pods: waiting("ImagePullBackOff"), fails: "raw words"},
		{name: "crash", pods: waiting("CrashLoopBackOff"), fails: "exit code 3, Error: no keys)"},
		{name: "config", pods: waiting("CreateContainerConfigError"), fails: "raw words"},
		{name: "no node", unfit: true, words: waitForNode + "0/1 nodes", pods: withStatus(corev1.PodStatus{Conditions: []corev1.PodCondition{
			{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "0/1 nodes"},
		}})},
		{name: "runs", words: "waiting for the shadow to answer", pods: withStatus(corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{
			{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}},
		}})},
		{name: "ready", ready: true, pods: withStatus(corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}})},
		{name: "evicted", words: "the pod failed: Evicted low on memory", pods: withStatus(corev1.PodStatus{Phase: corev1.PodFailed, Reason: "Evicted", Message: "low on memory"})},
		{name: "sysctl", fails: errSysctl.Error(), pods: withStatus(corev1.PodStatus{Phase: corev1.PodFailed, Reason: "SysctlForbidden"})},
	}
	for _, test := range tests {
		state, err := judgePods(test.pods, test.events)
		switch {
		case test.fails != "":
			if err == nil || !strings.Contains(err.Error(), test.fails) {
				t.Errorf("%s: %v", test.name, err)
			}
		case err != nil || state.ready != test.ready || state.unfit != test.unfit || !strings.Contains(state.words, test.words):
			t.Errorf("%s: %+v %v", test.name, state, err)
		}
	}
}

func TestRefusal(t *testing.T) {
	s := testCluster(nil).NewShadow(testConfig("x1"), allRights(ByDeployment))
	for message, want := range map[string]string{
		`pods "x" is forbidden: unable to validate against any security context constraint: [.spec.securityContext.fsGroup: Invalid value: []int64{65532}: 65532 is not an allowed group]`: errIDs.Error(),
		`pods "x" is forbidden: unable to validate against any security context constraint: []`:                                                                                            "may not be made",
		"": "", `Operation cannot be fulfilled on resourcequotas "q"`: "",
		`pods "x" is forbidden: exceeded quota: q, requested: pods=1`:      "exceeded quota",
		`admission webhook "policy" denied the request: no`:                "denied the request",
		`pods "x" is forbidden: violates PodSecurity: forbidden sysctls (`: errSysctl.Error(),
	} {
		err := s.refusal(message)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", message, err)
		}
	}
}

// One Renew serves a session from before its Lease is there until its end, and
// the Lease that is made anew too.
func TestRenewOutlivesTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		s := testCluster(client).NewShadow(testConfig("x1"), allRights(ByDeployment))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Renew(ctx) }()
		for range 2 {
			time.Sleep(3 * renewEvery)
			if err := s.Create(ctx, nil); err != nil {
				t.Fatal(err)
			}
			before := leaseOf(t, client)
			time.Sleep(2 * renewEvery)
			if after := leaseOf(t, client); !after.Spec.RenewTime.After(before.Spec.RenewTime.Time) {
				t.Errorf("not renewed: %v", after.Spec)
			}
			if err := s.Delete(ctx); err != nil {
				t.Fatal(err)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestRenew(t *testing.T) {
	client := fake.NewClientset()
	s := testCluster(client).NewShadow(testConfig("x1"), allRights(ByDeployment))
	if err := s.renew(t.Context()); !apierrors.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if err := s.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	before := leaseOf(t, client)
	if err := s.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := leaseOf(t, client)
	if !after.Spec.RenewTime.After(before.Spec.RenewTime.Time) || *after.Spec.HolderIdentity != *before.Spec.HolderIdentity {
		t.Errorf("%v, then %v", before.Spec, after.Spec)
	}
}

func leaseOf(t *testing.T, client *fake.Clientset) *coordv1.Lease {
	t.Helper()
	lease, err := client.CoordinationV1().Leases("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

// A list that fails in passing is tried again, and does not end the removal.
func TestDeleteOutlivesAFailure(t *testing.T) {
	client := fake.NewClientset()
	c := testCluster(client)
	s := c.NewShadow(testConfig("x1"), allRights(ByDeployment))
	if err := s.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for verb, resource := range map[string]string{"list": "secrets", "delete": "leases"} {
		var calls atomic.Int32
		client.PrependReactor(verb, resource, func(clienttesting.Action) (bool, runtime.Object, error) {
			return calls.Add(1) <= 2, nil, errors.New("connection reset")
		})
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	if left, err := c.find(t.Context(), "dev", ""); err == nil && len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// A cluster that wants to choose the user gets the pod without one, and with
// keys that whoever that is can read. Whose pod is ready at once asks for no events.
func TestIDsRefused(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("create", "deployments", func(a clienttesting.Action) (bool, runtime.Object, error) {
		d := a.(clienttesting.CreateAction).GetObject().(*appsv1.Deployment)
		spec := d.Spec.Template.Spec
		if spec.SecurityContext.RunAsUser != nil || spec.SecurityContext.FSGroup != nil || spec.SecurityContext.RunAsGroup != nil {
			d.Status.Conditions = []appsv1.DeploymentCondition{{Type: "ReplicaFailure", Status: corev1.ConditionTrue,
				Message: "pods is forbidden: unable to validate against any security context constraint: runAsUser: Invalid value: 65532"}}
			return false, nil, nil
		}
		if !*spec.SecurityContext.RunAsNonRoot || *spec.Volumes[0].Secret.DefaultMode != 0o444 {
			t.Errorf("%+v", spec)
		}
		return false, nil, client.Tracker().Add(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "culvert-x1-a", Namespace: "dev", Labels: d.Labels},
			Status:     corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		})
	})
	s := testCluster(client).NewShadow(testConfig("x1"), allRights(ByDeployment))
	if err := s.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	var said []string
	if err := s.WaitReady(t.Context(), func(text string) { said = append(said, text) }); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(said, "\n"), "of its own choice") || s.Pod() != "culvert-x1-a" {
		t.Errorf("%q, pod %q", said, s.Pod())
	}
	for _, a := range client.Actions() {
		if list, ok := a.(clienttesting.ListAction); ok && a.GetResource().Resource == "events" &&
			list.GetListRestrictions().Fields.String() != "involvedObject.kind=ReplicaSet,reason=FailedCreate" {
			t.Errorf("events asked for: %v", list.GetListRestrictions().Fields)
		}
	}
}

// A Job ends by itself until its pod has been found ready, however often it is made.
func TestJobBound(t *testing.T) {
	client := fake.NewClientset()
	s := testCluster(client).NewShadow(testConfig("x1"), allRights(ByJob))
	bound := func() bool {
		t.Helper()
		job, err := client.BatchV1().Jobs("dev").Get(t.Context(), "culvert-x1", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return job.Spec.ActiveDeadlineSeconds != nil
	}
	refused := errors.New("not now")
	client.PrependReactor("patch", "jobs", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if refused != nil && strings.Contains(string(a.(clienttesting.PatchAction).GetPatch()), "activeDeadlineSeconds") {
			return true, nil, refused
		}
		return false, nil, nil
	})
	for range 2 {
		if err := s.Create(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Dial(t.Context()); err == nil || !bound() {
			t.Errorf("no pod: %v, bound: %v", err, bound())
		}
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "culvert-x1-a", Namespace: "dev", Labels: map[string]string{labelSession: "x1", "app.kubernetes.io/name": "culvert-shadow"}},
			Status:     corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		}
		if _, err := client.CoreV1().Pods("dev").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		refused = errors.New("not now")
		if _, _, err := s.Dial(t.Context()); !errors.Is(err, refused) || !bound() {
			t.Errorf("refused: %v, bound: %v", err, bound())
		}
		refused = nil
		if err := s.unbound(t.Context()); err != nil || bound() {
			t.Errorf("%v, bound: %v", err, bound())
		}
		if err := client.CoreV1().Pods("dev").Delete(t.Context(), pod.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// That a session is gone shows in its root, with or without the right to get
// Deployments.
func TestDialOfWhatIsGone(t *testing.T) {
	for _, mode := range []Mode{ByDeployment, ByJob} {
		rights := allRights(mode)
		delete(rights.held, "here get apps/deployments")
		s := testCluster(fake.NewClientset()).NewShadow(testConfig("x1"), rights)
		if _, _, err := s.Dial(t.Context()); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", mode, err)
		}
		if err := s.Create(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Dial(t.Context()); err == nil || errors.Is(err, ErrGone) {
			t.Errorf("%s, not ready: %v", mode, err)
		}
	}
}
