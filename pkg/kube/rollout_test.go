package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// rollWorld is the fake API server with as much of the controllers as a rollout asks:
// a change of a template is observed, and pods of it come and get ready, or do not.
type rollWorld struct {
	t      *testing.T
	client *fake.Clientset
	c      *Cluster
	target Target
	denied []string // "verb resource"

	mu    sync.Mutex
	bad   map[string]corev1.ContainerState // of images that do not run
	made  int
	said  []string
	ended []string // pods, in their order
}

func newRollWorld(t *testing.T, kind string, n int32) *rollWorld {
	w := &rollWorld{t: t, target: Target{kind, "web"}, bad: map[string]corev1.ContainerState{}}
	d := testDeployment("web", "web", n)
	d.UID, d.Generation, d.Status = "w", 1, appsv1.DeploymentStatus{}
	meta, spec := d.ObjectMeta, d.Spec
	spec.Template.Spec.Containers = []corev1.Container{{Name: "app", Image: "shop:1", Env: []corev1.EnvVar{{Name: "VERSION", Value: "1"}}}}
	switch kind {
	case "deployment":
		d.Spec = spec
		w.client = fake.NewClientset(d)
	case "statefulset":
		w.client = fake.NewClientset(&appsv1.StatefulSet{ObjectMeta: meta, Spec: appsv1.StatefulSetSpec{Replicas: &n, Selector: spec.Selector, Template: spec.Template}})
	case "daemonset":
		w.client = fake.NewClientset(&appsv1.DaemonSet{
			ObjectMeta: meta, Spec: appsv1.DaemonSetSpec{Selector: spec.Selector, Template: spec.Template},
			Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: n},
		})
	}
	w.check(w.client.Tracker().Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "dev"}}))
	w.client.PrependReactor("create", "selfsubjectaccessreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		r := a.(clienttesting.CreateAction).GetObject().(*authv1.SelfSubjectAccessReview)
		at := r.Spec.ResourceAttributes
		r.Status.Allowed = !slices.Contains(w.denied, at.Verb+" "+strings.TrimSuffix(at.Resource+"/"+at.Subresource, "/"))
		return true, r, nil
	})
	w.client.PrependReactor("patch", kind+"s", w.patched)
	w.client.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "eviction" {
			return false, nil, nil
		}
		name := a.(clienttesting.CreateAction).GetObject().(metav1.Object).GetName()
		return true, nil, w.client.Tracker().Delete(podsResource, "dev", name)
	})
	w.client.PrependReactor("*", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetVerb() == "delete" {
			w.ended = append(w.ended, a.(clienttesting.DeleteAction).GetName())
		}
		return false, nil, nil
	})
	w.c = testCluster(w.client)
	return w
}

var podsResource = schema.GroupVersionResource{Version: "v1", Resource: "pods"}

func (w *rollWorld) resource() schema.GroupVersionResource {
	return appsv1.SchemeGroupVersion.WithResource(w.target.Kind + "s")
}

// patched is a patch, after which the API server counts the generation and the version.
func (w *rollWorld) patched(a clienttesting.Action) (bool, runtime.Object, error) {
	if a.GetSubresource() == "status" {
		return false, nil, nil
	}
	_, object, err := clienttesting.ObjectReaction(w.client.Tracker())(a)
	if err != nil {
		return true, nil, apierrors.NewInvalid(schema.GroupKind{}, "web", nil) // of a failed test
	}
	m, err := meta.Accessor(object)
	if err != nil {
		return true, nil, err
	}
	version, _ := strconv.Atoi(m.GetResourceVersion())
	m.SetGeneration(m.GetGeneration() + 1)
	m.SetResourceVersion(strconv.Itoa(version + 1))
	return true, object, w.client.Tracker().Update(w.resource(), object, "dev")
}

// control does what controllers and kubelets do, until the test ends.
func (w *rollWorld) control(ctx context.Context) {
	for pause(ctx, 500*time.Millisecond) == nil {
		w.mu.Lock()
		w.sync()
		w.mu.Unlock()
	}
}

func (w *rollWorld) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Error(err)
	}
}

// sync makes one step.
func (w *rollWorld) sync() {
	object, err := w.client.Tracker().Get(w.resource(), "dev", "web")
	if err != nil {
		return
	}
	var live *rolled
	switch o := object.(type) {
	case *appsv1.Deployment:
		live = rolledDeployment(o)
	case *appsv1.StatefulSet:
		live = rolledStatefulSet(o)
	case *appsv1.DaemonSet:
		live = rolledDaemonSet(o)
	}
	own := w.revise(live)
	w.pods(live, own)
	w.count(object, own)
}

// revise finds or makes the revision of the template, and gives it the highest number.
func (w *rollWorld) revise(live *rolled) *Revision {
	ctx := context.Background()
	all, err := w.c.revisions(ctx, live)
	w.check(err)
	highest := int64(0)
	for _, r := range all {
		highest = max(highest, r.Number)
	}
	i := slices.IndexFunc(all, func(r Revision) bool { return sameTemplate(r.template, live.template) })
	if i >= 0 && all[i].Number == highest {
		return &all[i]
	}
	yes, number := true, highest+1
	m := metav1.ObjectMeta{
		Name: fmt.Sprintf("web-%d", number), UID: types.UID(fmt.Sprintf("r%d", number)), Namespace: "dev", Labels: map[string]string{"app": "web"},
		Annotations:     map[string]string{annRevision: strconv.FormatInt(number, 10)},
		OwnerReferences: []metav1.OwnerReference{{UID: live.uid, Controller: &yes}},
	}
	apps := w.client.AppsV1()
	if live.Kind == "deployment" {
		sets := apps.ReplicaSets("dev")
		if i >= 0 {
			s, err := sets.Get(ctx, all[i].Name, metav1.GetOptions{})
			w.check(err)
			s.Annotations[annRevision] = m.Annotations[annRevision]
			_, err = sets.Update(ctx, s, metav1.UpdateOptions{})
			w.check(err)
		} else {
			template := *live.template.DeepCopy()
			template.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = m.Name[4:]
			_, err := sets.Create(ctx, &appsv1.ReplicaSet{ObjectMeta: m, Spec: appsv1.ReplicaSetSpec{Template: template}}, metav1.CreateOptions{})
			w.check(err)
		}
		return w.revise(live)
	}
	kept := apps.ControllerRevisions("dev")
	if i >= 0 {
		s, err := kept.Get(ctx, all[i].Name, metav1.GetOptions{})
		w.check(err)
		s.Revision = number
		_, err = kept.Update(ctx, s, metav1.UpdateOptions{})
		w.check(err)
	} else {
		data, err := json.Marshal(map[string]any{"spec": map[string]any{"template": live.template}})
		w.check(err)
		_, err = kept.Create(ctx, &appsv1.ControllerRevision{ObjectMeta: m, Revision: number, Data: runtime.RawExtension{Raw: data}}, metav1.CreateOptions{})
		w.check(err)
	}
	return w.revise(live)
}

// pods ends one that is not of the revision, or makes one that is missing.
func (w *rollWorld) pods(live *rolled, own *Revision) {
	ctx := context.Background()
	pods, err := w.c.podsRolled(ctx, live)
	w.check(err)
	old, unready := -1, 0
	for i := range pods {
		if !isReady(&pods[i]) {
			unready++
		}
		if !own.has(&pods[i]) {
			old = i
		}
	}
	switch {
	case len(pods) < live.wanted:
		w.made++
		name := fmt.Sprintf("web-%s-%d", own.Name[4:], w.made)
		if live.Kind == "statefulset" {
			for i := 0; ; i++ {
				if name = fmt.Sprintf("web-%d", i); !slices.ContainsFunc(pods, func(p corev1.Pod) bool { return p.Name == name }) {
					break
				}
			}
		}
		p := madePod(name, "web", map[string]string{"deployment": "ReplicaSet", "statefulset": "StatefulSet", "daemonset": "DaemonSet"}[live.Kind], own.Name)
		p.UID = types.UID(fmt.Sprintf("p%d", w.made))
		p.OwnerReferences[0].UID = live.uid
		p.Spec.NodeName = "node"
		p.Labels[appsv1.ControllerRevisionHashLabelKey] = own.Name
		if live.Kind == "deployment" {
			p.OwnerReferences[0].UID = own.uid
		}
		image := live.template.Spec.Containers[0].Image
		state, isBad := w.bad[image]
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{Name: "app", State: state}}}
		if !isBad {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		}
		_, err := w.client.CoreV1().Pods("dev").Create(ctx, p, metav1.CreateOptions{})
		w.check(err)
		for range 2 { // the second is the same event, seen again
			e := &corev1.Event{
				ObjectMeta: metav1.ObjectMeta{Name: p.Name + ".1", UID: p.UID + "e", Namespace: "dev"}, Type: corev1.EventTypeNormal, Reason: "Pulling", Message: "Pulling " + image,
				InvolvedObject: corev1.ObjectReference{Kind: "Pod", Name: p.Name, UID: p.UID},
			}
			if _, err := w.client.CoreV1().Events("dev").Create(ctx, e, metav1.CreateOptions{}); err != nil {
				_, err = w.client.CoreV1().Events("dev").Update(ctx, e, metav1.UpdateOptions{})
				w.check(err)
			}
		}
	case old >= 0 && unready > 0 && live.Kind == "statefulset": // it waits
	case old >= 0 && (unready == 0 || !isReady(&pods[old])):
		w.check(w.client.Tracker().Delete(podsResource, "dev", pods[old].Name))
	}
}

func (w *rollWorld) count(object runtime.Object, own *Revision) {
	list, err := w.client.CoreV1().Pods("dev").List(context.Background(), metav1.ListOptions{})
	w.check(err)
	var total, updated, ready int32
	for i := range list.Items {
		total++
		if own.has(&list.Items[i]) {
			updated++
		}
		if isReady(&list.Items[i]) {
			ready++
		}
	}
	var status any
	switch o := object.(type) {
	case *appsv1.Deployment:
		status = appsv1.DeploymentStatus{ObservedGeneration: o.Generation, Replicas: total, UpdatedReplicas: updated, AvailableReplicas: ready}
	case *appsv1.StatefulSet:
		status = appsv1.StatefulSetStatus{ObservedGeneration: o.Generation, Replicas: total, UpdatedReplicas: updated, AvailableReplicas: ready, UpdateRevision: own.Name}
	case *appsv1.DaemonSet:
		o.Status.ObservedGeneration, o.Status.UpdatedNumberScheduled, o.Status.NumberAvailable = o.Generation, updated, ready
		status = o.Status
	}
	patch, err := json.Marshal([]heal.Op{{Op: "add", Path: "/status", Value: status}})
	w.check(err)
	_, err = w.client.Invokes(clienttesting.NewPatchSubresourceAction(w.resource(), "dev", "web", types.JSONPatchType, patch, "status"), object)
	w.check(err)
}

// spoil has an image not run.
func (w *rollWorld) spoil(image string, state corev1.ContainerState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bad[image] = state
}

// react is PrependReactor while the controllers work.
func (w *rollWorld) react(verb, resource string, reaction clienttesting.ReactionFunc) {
	w.client.Lock()
	defer w.client.Unlock()
	w.client.PrependReactor(verb, resource, reaction)
}

func (w *rollWorld) say(line string) { w.said = append(w.said, line) }

func (w *rollWorld) talk() string { return strings.Join(w.said, "\n") }

func (w *rollWorld) rollOut(ctx context.Context, image string) (RolledOut, error) {
	w.said = nil
	return w.c.RollOut(ctx, RollOutConfig{Target: w.target, Image: image, Within: time.Minute, As: "release of " + image, By: "joe", Say: w.say})
}

func (w *rollWorld) image() string {
	live, err := w.c.getRolled(context.Background(), w.target)
	w.check(err)
	return live.template.Spec.Containers[0].Image
}

// letThemWork lets the controllers work.
func letThemWork() { time.Sleep(10 * time.Second) } // of the bubble's clock

func inRollWorld(t *testing.T, kind string, n int32, do func(w *rollWorld)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newRollWorld(t, kind, n)
		ctx, cancel := context.WithCancel(w.t.Context())
		go w.control(ctx)
		letThemWork()
		do(w)
		cancel()
		synctest.Wait()
	})
}

var noImage = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: `Back-off pulling image "shop:bad"`}}

func TestRollOutKinds(t *testing.T) {
	for _, kind := range []string{"deployment", "statefulset", "daemonset"} {
		t.Run(kind, func(t *testing.T) {
			inRollWorld(t, kind, 3, func(w *rollWorld) {
				done, err := w.rollOut(w.t.Context(), "shop:2")
				if err != nil || !done.Changed || done.PutBack || w.image() != "shop:2" || !strings.Contains(done.Runs, "shop:2") {
					t.Errorf("%+v, %v, runs %s", done, err, w.image())
				}
				for _, line := range []string{kind + "/web: image of container app from shop:1 to shop:2", "Pulling shop:2", "3 of 3 pods are new, 3 available"} {
					if !strings.Contains(w.talk(), line) {
						t.Errorf("not said: %s\n%s", line, w.talk())
					}
				}
				for _, line := range w.said {
					if n := strings.Count("\n"+w.talk()+"\n", "\n"+line+"\n"); strings.HasPrefix(line, "pod ") && n != 1 {
						t.Errorf("%d times: %s", n, line)
					}
				}
				if done, err := w.rollOut(w.t.Context(), "shop:2"); err != nil || done.Changed || !strings.Contains(w.talk(), "already: nothing is changed") {
					t.Errorf("%+v, %v\n%s", done, err, w.talk())
				}

				w.spoil("shop:bad", noImage)
				done, err = w.rollOut(w.t.Context(), "shop:bad")
				if err == nil || done.Changed || !done.PutBack || w.image() != "shop:2" || errors.Is(err, ErrNotBack) {
					t.Errorf("%+v, %v, runs %s", done, err, w.image())
				}
				for _, part := range []string{"ImagePullBackOff", `Back-off pulling image "shop:bad"`, "it was put back and runs revision 4 (shop:2), 3 of 3 pods are new, 3 available"} {
					if !strings.Contains(fmt.Sprint(err), part) {
						t.Errorf("not in the error: %s: %v", part, err)
					}
				}
				if deleted := len(w.ended) > 0; deleted != (kind == "statefulset") {
					t.Errorf("deleted: %v", w.ended)
				}

				_, err = w.rollOut(w.t.Context(), "shop:3")
				w.check(err)
				for i, image := range []string{"shop:2", "shop:1"} { // never back to what was gone back from, or was bad
					done, err := w.c.RollBack(w.t.Context(), RollBackConfig{Target: w.target, Within: time.Minute, Say: w.say})
					if err != nil || w.image() != image || !done.Changed {
						t.Errorf("rollback %d: %+v, %v, runs %s", i, done, err, w.image())
					}
				}
				if _, err := w.c.RollBack(w.t.Context(), RollBackConfig{Target: w.target, Within: time.Minute}); err == nil || !strings.Contains(err.Error(), "no revision before") {
					t.Error(err)
				}
				_, err = w.c.RollBack(w.t.Context(), RollBackConfig{Target: w.target, To: "release of shop:3", Within: time.Minute})
				if err != nil || w.image() != "shop:3" {
					t.Errorf("%v, runs %s", err, w.image())
				}
			})
		})
	}
}

func TestRollOutFails(t *testing.T) {
	crash := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 3, Reason: "Error", Message: "no database"}}
	unready := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	for name, test := range map[string]struct {
		state corev1.ContainerState
		says  string
	}{
		"crash":     {crash, "container app ended (exit code 3, Error: no database)"},
		"not ready": {unready, "not done within 1m0s: 1 of 2 pods are new, 1 available: pod web-2-3: container app runs and is not ready"},
	} {
		t.Run(name, func(t *testing.T) {
			inRollWorld(t, "deployment", 2, func(w *rollWorld) {
				w.spoil("shop:bad", test.state)
				if _, err := w.rollOut(w.t.Context(), "shop:bad"); err == nil || !strings.Contains(err.Error(), test.says) || w.image() != "shop:1" {
					t.Errorf("%v, runs %s", err, w.image())
				}
			})
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		inRollWorld(t, "deployment", 2, func(w *rollWorld) {
			w.spoil("shop:bad", unready)
			ctx, cancel := context.WithTimeoutCause(w.t.Context(), 10*time.Second, nil)
			defer cancel()
			done, err := w.rollOut(ctx, "shop:bad")
			if err == nil || !strings.Contains(err.Error(), "interrupted") || !done.PutBack || w.image() != "shop:1" {
				t.Errorf("%+v, %v, runs %s", done, err, w.image())
			}
		})
	})
	t.Run("cannot be put back", func(t *testing.T) {
		inRollWorld(t, "deployment", 2, func(w *rollWorld) {
			w.spoil("shop:bad", noImage)
			w.spoil("shop:1", noImage) // its registry has lost it, too
			done, err := w.rollOut(w.t.Context(), "shop:bad")
			if !errors.Is(err, ErrNotBack) || !done.PutBack || w.image() != "shop:1" {
				t.Errorf("%+v, %v", done, err)
			}
		})
	})
	t.Run("was broken before", func(t *testing.T) {
		inRollWorld(t, "statefulset", 2, func(w *rollWorld) {
			w.spoil("shop:2", noImage)
			w.spoil("shop:4", noImage)
			_, err := w.client.AppsV1().StatefulSets("dev").Patch(w.t.Context(), "web", types.JSONPatchType,
				[]byte(`[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"shop:2"}]`), metav1.PatchOptions{})
			w.check(err)
			letThemWork()
			if _, err := w.rollOut(w.t.Context(), "shop:4"); err == nil || errors.Is(err, ErrNotBack) || w.image() != "shop:2" {
				t.Errorf("%v, runs %s", err, w.image())
			}
			if _, err := w.rollOut(w.t.Context(), "shop:3"); err != nil || w.image() != "shop:3" {
				t.Errorf("%v, runs %s", err, w.image())
			}
		})
	})
	t.Run("killed", func(t *testing.T) {
		inRollWorld(t, "statefulset", 2, func(w *rollWorld) {
			w.spoil("shop:bad", noImage)
			for _, image := range []string{"shop:2", "shop:bad"} { // the patch is as far as it came
				_, err := w.client.AppsV1().StatefulSets("dev").Patch(w.t.Context(), "web", types.JSONPatchType,
					[]byte(`[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"`+image+`"}]`), metav1.PatchOptions{})
				w.check(err)
				done, err := w.rollOut(w.t.Context(), image)
				if w.image() != "shop:2" || (err == nil) != (image == "shop:2") || done.PutBack != (image == "shop:bad") || errors.Is(err, ErrNotBack) {
					t.Errorf("%s: %+v, %v, runs %s", image, done, err, w.image())
				}
			}
		})
	})
	t.Run("somebody else's", func(t *testing.T) {
		inRollWorld(t, "deployment", 2, func(w *rollWorld) {
			w.spoil("shop:bad", unready)
			go func() {
				time.Sleep(10 * time.Second) // of the bubble's clock
				_, err := w.client.AppsV1().Deployments("dev").Patch(context.Background(), "web", types.JSONPatchType,
					[]byte(`[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"shop:9"}]`), metav1.PatchOptions{})
				w.check(err)
			}()
			done, err := w.rollOut(w.t.Context(), "shop:bad")
			if !errors.Is(err, errMeanwhile) || done.PutBack || w.image() != "shop:9" {
				t.Errorf("%+v, %v, runs %s", done, err, w.image())
			}
		})
	})
}

// Others write to the object all the time; only a template of theirs is in the way.
func TestRollOutRetries(t *testing.T) {
	inRollWorld(t, "deployment", 2, func(w *rollWorld) {
		left := 3
		w.react("patch", "deployments", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if a.GetSubresource() == "status" {
				return false, nil, nil // not the rollout's
			}
			left--
			return left >= 0, nil, apierrors.NewConflict(schema.GroupResource{Resource: "deployments"}, "web", errors.New("changed"))
		})
		if _, err := w.rollOut(w.t.Context(), "shop:2"); err != nil || w.image() != "shop:2" {
			t.Error(err)
		}
	})
}

func TestPlanRollOut(t *testing.T) {
	for _, test := range []struct {
		name   string
		cfg    RollOutConfig
		change func(d *appsv1.Deployment)
		denied []string
		want   string // of what, from, to
		notice string
		err    error
		says   string
	}{
		{name: "image", cfg: RollOutConfig{Image: "shop:2"}, want: "image shop:1 shop:2"},
		{name: "same", cfg: RollOutConfig{Image: "shop:1"}, want: "image shop:1 shop:1 same"},
		{name: "variable", cfg: RollOutConfig{Env: "VERSION=2=b"}, want: "VERSION 1 2=b"},
		{name: "new variable", cfg: RollOutConfig{Env: "COMMIT=abc"}, want: "COMMIT  abc"},
		{name: "no variable", cfg: RollOutConfig{Env: "COMMIT"}, says: "is not NAME=VALUE"},
		{name: "both", cfg: RollOutConfig{Env: "A=b", Image: "c"}, says: "either an image or a variable"},
		{name: "neither", says: "either an image or a variable"},
		{name: "from elsewhere", cfg: RollOutConfig{Env: "VERSION=2"}, says: "comes from elsewhere", change: func(d *appsv1.Deployment) {
			d.Spec.Template.Spec.Containers[0].Env[0] = corev1.EnvVar{Name: "VERSION", ValueFrom: &corev1.EnvVarSource{}}
		}},
		{name: "no such container", cfg: RollOutConfig{Image: "a", Container: "ap"}, err: ErrNoTarget, says: `no container "ap", there are app`},
		{name: "several", cfg: RollOutConfig{Image: "a"}, err: ErrNoTarget, says: "name one: app, aside", change: func(d *appsv1.Deployment) {
			d.Spec.Template.Spec.Containers = append(d.Spec.Template.Spec.Containers, corev1.Container{Name: "aside"})
		}},
		{name: "init container", cfg: RollOutConfig{Image: "a", Container: "migrate"}, want: "image m:1 a", change: func(d *appsv1.Deployment) {
			d.Spec.Template.Spec.InitContainers = []corev1.Container{{Name: "migrate", Image: "m:1"}}
		}},
		{name: "paused", cfg: RollOutConfig{Image: "a"}, says: "it is paused", change: func(d *appsv1.Deployment) { d.Spec.Paused = true }},
		{name: "nothing runs", cfg: RollOutConfig{Image: "a"}, want: "image shop:1 a", notice: "it has no pods", change: func(d *appsv1.Deployment) { d.Spec.Replicas = new(int32) }},
		{name: "may not patch", cfg: RollOutConfig{Image: "a"}, denied: []string{"patch deployments"}, err: ErrForbidden, says: "to patch deployments.apps in namespace dev"},
		{name: "may not mark", cfg: RollOutConfig{Image: "a"}, denied: []string{"patch replicasets", "watch events"}, want: "image shop:1 a", notice: "which revisions were good is not written down"},
		{name: "is not there", cfg: RollOutConfig{Image: "a", Target: Target{"statefulset", "web"}}, err: ErrNoTarget},
		{name: "no namespace", cfg: RollOutConfig{Image: "a"}, err: ErrNamespace, says: "no such namespace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newRollWorld(t, "deployment", 2)
			w.denied = test.denied
			if test.says == "no such namespace" {
				w.c.Namespace = "elsewhere"
			}
			if test.change != nil {
				d, err := w.client.AppsV1().Deployments("dev").Get(w.t.Context(), "web", metav1.GetOptions{})
				w.check(err)
				test.change(d)
				w.check(w.client.Tracker().Update(w.resource(), d, "dev"))
			}
			if test.cfg.Target.Kind == "" {
				test.cfg.Target = w.target
			}
			w.client.ClearActions()
			p, err := w.c.PlanRollOut(w.t.Context(), test.cfg)
			for _, a := range w.client.Actions() {
				if !slices.Contains([]string{"get", "list", "watch"}, a.GetVerb()) && a.GetResource().Resource != "selfsubjectaccessreviews" {
					t.Errorf("the plan has done: %s %s", a.GetVerb(), a.GetResource().Resource)
				}
			}
			if test.want == "" {
				if err == nil || !strings.Contains(err.Error(), test.says) || test.err != nil && !errors.Is(err, test.err) {
					t.Error(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join([]string{p.What, p.From, p.To}, " ")
			if p.Same {
				got += " same"
			}
			if got != test.want || !strings.Contains(strings.Join(p.Notices, "\n"), test.notice) {
				t.Errorf("%q, %q", got, p.Notices)
			}
		})
	}
}

// When a rollout is over, by the kind's own way of counting.
func TestWhole(t *testing.T) {
	two, part := int32(2), int32(1)
	for _, test := range []struct {
		name string
		w    *rolled
		want bool
	}{
		{"done", rolledDeployment(&appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: &two}, Status: appsv1.DeploymentStatus{Replicas: 2, UpdatedReplicas: 2, AvailableReplicas: 2}}), true},
		{"not observed", rolledDeployment(&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Generation: 2}, Spec: appsv1.DeploymentSpec{Replicas: &two}, Status: appsv1.DeploymentStatus{ObservedGeneration: 1, Replicas: 2, UpdatedReplicas: 2, AvailableReplicas: 2}}), false},
		{"an old one is left", rolledDeployment(&appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: &two}, Status: appsv1.DeploymentStatus{Replicas: 3, UpdatedReplicas: 2, AvailableReplicas: 3}}), false},
		{"an old condition", rolledDeployment(&appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: &two}, Status: appsv1.DeploymentStatus{Replicas: 2, UpdatedReplicas: 2, AvailableReplicas: 2, Conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentProgressing, Status: corev1.ConditionFalse, Reason: "ProgressDeadlineExceeded"}}}}), true},
		{"not available", rolledStatefulSet(&appsv1.StatefulSet{Spec: appsv1.StatefulSetSpec{Replicas: &two}, Status: appsv1.StatefulSetStatus{Replicas: 2, UpdatedReplicas: 2, ReadyReplicas: 2, AvailableReplicas: 1}}), false},
		{"partition", rolledStatefulSet(&appsv1.StatefulSet{Spec: appsv1.StatefulSetSpec{Replicas: &two, UpdateStrategy: appsv1.StatefulSetUpdateStrategy{RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: &part}}}, Status: appsv1.StatefulSetStatus{Replicas: 2, UpdatedReplicas: 1, AvailableReplicas: 2}}), true},
		{"a node is missing", rolledDaemonSet(&appsv1.DaemonSet{Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 3, UpdatedNumberScheduled: 2, NumberAvailable: 3}}), false},
		{"all nodes", rolledDaemonSet(&appsv1.DaemonSet{Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 3, UpdatedNumberScheduled: 3, NumberAvailable: 3}}), true},
	} {
		if got := test.w.whole(); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

func TestRestartPods(t *testing.T) {
	for _, kind := range []string{"deployment", "statefulset", "daemonset"} {
		t.Run(kind, func(t *testing.T) {
			inRollWorld(t, kind, 3, func(w *rollWorld) {
				before := podUIDs(w)
				asked := map[string]int{}
				err := w.c.RestartPods(w.t.Context(), RestartConfig{Target: w.target, Within: time.Minute, Say: w.say, Gate: func(_ context.Context, p RunningPod) error {
					asked[p.UID]++
					if slices.Contains(before, p.UID) {
						t.Errorf("the old %s is asked", p.Name)
					}
					if asked[p.UID] < 3 {
						return errors.New("warming up")
					}
					return nil
				}})
				after := podUIDs(w)
				if err != nil || len(after) != 3 || slices.ContainsFunc(after, func(uid string) bool { return slices.Contains(before, uid) || asked[uid] != 3 }) {
					t.Errorf("%v: %v, then %v; asked %v\n%s", err, before, after, asked, w.talk())
				}
			})
		})
	}
}

func podUIDs(w *rollWorld) (all []string) {
	list, err := w.client.CoreV1().Pods("dev").List(context.Background(), metav1.ListOptions{})
	w.check(err)
	for _, p := range list.Items {
		all = append(all, string(p.UID))
	}
	return all
}

// The first that does not come back is the last that is ended.
func TestRestartStops(t *testing.T) {
	for name, test := range map[string]struct {
		bad  bool // the new pods
		gate func(context.Context, RunningPod) error
		says string
	}{
		"never ready": {true, nil, "pod 1 of 3, web-1-1: it did not come back within 1m0s: waiting for pod web-1-4: container app waits: ImagePullBackOff"},
		"never well":  {false, func(context.Context, RunningPod) error { return errors.New("503") }, "it did not come back within 1m0s: waiting for pod web-1-4: ready, but 503"},
	} {
		t.Run(name, func(t *testing.T) {
			inRollWorld(t, "deployment", 3, func(w *rollWorld) {
				before := podUIDs(w)
				if test.bad {
					w.spoil("shop:1", noImage)
				}
				err := w.c.RestartPods(w.t.Context(), RestartConfig{Target: w.target, Within: time.Minute, Gate: test.gate})
				left := slices.DeleteFunc(podUIDs(w), func(uid string) bool { return !slices.Contains(before, uid) })
				if err == nil || !strings.Contains(err.Error(), test.says) || len(left) != 2 {
					t.Errorf("%v; left %v of %v", err, left, before)
				}
			})
		})
	}
}

func TestRestartEvicts(t *testing.T) {
	for _, test := range []struct {
		name, says, err string
		denied          []string
		answer          error
		times           int
		deleted         int
	}{
		{name: "a budget forbids it for a while", answer: apierrors.NewTooManyRequests("it would violate the budget", 0), times: 5, says: "may not be evicted yet"},
		{name: "a budget forbids it", answer: apierrors.NewTooManyRequests("it would violate the budget", 0), times: 1 << 30, err: "it may not be evicted: it would violate the budget"},
		{name: "no right", denied: []string{"create pods/eviction"}, deleted: 2},
		{name: "neither right", denied: []string{"create pods/eviction", "delete pods"}, err: "not permitted: to create pods/eviction, or to delete pods"},
		{name: "refused after all", answer: apierrors.NewForbidden(schema.GroupResource{}, "web", nil), times: 1 << 30, deleted: 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			inRollWorld(t, "deployment", 2, func(w *rollWorld) {
				w.client.Lock()
				w.denied = test.denied
				w.client.Unlock()
				left := test.times
				w.react("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
					left--
					return a.GetSubresource() == "eviction" && left >= 0, nil, test.answer
				})
				err := w.c.RestartPods(w.t.Context(), RestartConfig{Target: w.target, Within: time.Minute, Say: w.say})
				if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
					t.Error(err)
				}
				if !strings.Contains(w.talk(), test.says) || len(w.ended) != test.deleted {
					t.Errorf("deleted %v, said\n%s", w.ended, w.talk())
				}
			})
		})
	}
}

// What is asked for and what `culvert rbac --for deploy` prints is the same: a Role to
// deploy, and one beside it for a gate that goes by a shadow.
func TestRBACToRoll(t *testing.T) {
	text, err := RBAC("dev", false, Rolling)
	if err != nil {
		t.Fatal(err)
	}
	docs := strings.Split(text, "\n---\n")
	if len(docs) != 2 {
		t.Fatalf("%d documents", len(docs))
	}
	for i, need := range []Need{Rolling, Inside} {
		var role rbacv1.Role
		if err := yaml.UnmarshalStrict([]byte(docs[i]), &role); err != nil {
			t.Fatal(err)
		}
		var asked []string
		for _, r := range rightsFor([]Need{need}) {
			for _, verb := range r.verbs {
				asked = append(asked, strings.Join([]string{verb, r.group, r.resource, r.name}, " "))
			}
		}
		slices.Sort(asked)
		same(t, "Role "+role.Name, slices.Compact(asked), ruleLines(role.Rules))
	}
}

func TestParseWorkload(t *testing.T) {
	for text, want := range map[string]string{
		"deploy/web": "deployment/web", "sts/db": "statefulset/db", "DaemonSet/log": "daemonset/log",
		"web": "", "svc/web": "", "deploy/": "", "deploy/A b": "",
	} {
		got, err := ParseWorkload(text)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}
