package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// rolledKinds are what ParseWorkload reads.
var rolledKinds = map[string]string{
	"deploy": "deployment", "deployment": "deployment", "deployments": "deployment",
	"sts": "statefulset", "statefulset": "statefulset", "statefulsets": "statefulset",
	"ds": "daemonset", "daemonset": "daemonset", "daemonsets": "daemonset",
}

// ParseWorkload reads what can be rolled out, in kubectl's form: "deployment/shop",
// also of a statefulset or a daemonset.
func ParseWorkload(text string) (Target, error) {
	kind, name, _ := strings.Cut(text, "/")
	t := Target{rolledKinds[strings.ToLower(kind)], name}
	if t.Kind == "" {
		return Target{}, fmt.Errorf("workload %q is none of deployment/NAME, statefulset/NAME, daemonset/NAME", text)
	}
	if wrong := validation.IsDNS1123Subdomain(name); len(wrong) > 0 {
		return Target{}, fmt.Errorf("workload %q: %s", text, wrong[0])
	}
	return t, nil
}

// rolled is a workload as a rollout sees it.
type rolled struct {
	Target
	uid      types.UID
	version  string
	template corev1.PodTemplateSpec
	selector *metav1.LabelSelector
	revision string // Deployment: its number; StatefulSet: its name; else ""
	frozen   string // why a new template would change nothing; "" where it would
	below    int    // StatefulSet: pods with a lower number keep what they have
	minReady time.Duration
	tally
}

// A tally is what the controller says of the pods.
type tally struct {
	seen      bool // it knows of the last change
	wanted    int
	turn      int // of wanted, whose turn it is to be new
	total     int
	updated   int
	available int
}

// whole tells whether all that should be new is, and nothing else is left.
func (n tally) whole() bool { return n.turned() && n.available >= n.wanted }

// turned tells whether all pods are new, whatever they do.
func (n tally) turned() bool { return n.seen && n.updated >= n.turn && n.total <= n.wanted }

func (n tally) words() string {
	if !n.seen {
		return "waiting for its controller"
	}
	return fmt.Sprintf("%d of %d pods are new, %d available", n.updated, n.turn, n.available)
}

// getRolled tells whether it is the namespace that is not there.
func (c *Cluster) getRolled(ctx context.Context, t Target) (*rolled, error) {
	w, err := c.getOne(ctx, t)
	if apierrors.IsNotFound(err) {
		if _, asked := c.client.CoreV1().Namespaces().Get(ctx, c.Namespace, metav1.GetOptions{}); apierrors.IsNotFound(asked) {
			err = fmt.Errorf("%w: %q: %w", ErrNamespace, c.Namespace, err)
		}
	}
	return w, err
}

func (c *Cluster) getOne(ctx context.Context, t Target) (*rolled, error) {
	apps, opts := c.client.AppsV1(), metav1.GetOptions{}
	switch t.Kind {
	case "deployment":
		d, err := apps.Deployments(c.Namespace).Get(ctx, t.Name, opts)
		if err != nil {
			return nil, err
		}
		return rolledDeployment(d), nil
	case "statefulset":
		s, err := apps.StatefulSets(c.Namespace).Get(ctx, t.Name, opts)
		if err != nil {
			return nil, err
		}
		return rolledStatefulSet(s), nil
	case "daemonset":
		d, err := apps.DaemonSets(c.Namespace).Get(ctx, t.Name, opts)
		if err != nil {
			return nil, err
		}
		return rolledDaemonSet(d), nil
	}
	return nil, fmt.Errorf("%w: kind %q", ErrNoTarget, t.Kind)
}

const annRevision = "deployment.kubernetes.io/revision"

func rolledDeployment(d *appsv1.Deployment) *rolled {
	n := int(replicas(d.Spec.Replicas))
	w := &rolled{
		Target: Target{"deployment", d.Name}, uid: d.UID, version: d.ResourceVersion, template: d.Spec.Template, selector: d.Spec.Selector,
		revision: d.Annotations[annRevision], minReady: seconds(d.Spec.MinReadySeconds),
		tally: tally{
			seen: d.Status.ObservedGeneration >= d.Generation, wanted: n, turn: n, total: int(d.Status.Replicas),
			updated: int(d.Status.UpdatedReplicas), available: int(d.Status.AvailableReplicas),
		},
	}
	if d.Spec.Paused {
		w.frozen = "it is paused"
	}
	return w
}

func rolledStatefulSet(s *appsv1.StatefulSet) *rolled {
	n := int(replicas(s.Spec.Replicas))
	w := &rolled{
		Target: Target{"statefulset", s.Name}, uid: s.UID, version: s.ResourceVersion, template: s.Spec.Template, selector: s.Spec.Selector,
		revision: s.Status.UpdateRevision, minReady: seconds(s.Spec.MinReadySeconds),
		tally: tally{
			seen: s.Status.ObservedGeneration >= s.Generation, wanted: n, turn: n, total: int(s.Status.Replicas),
			updated: int(s.Status.UpdatedReplicas), available: int(s.Status.AvailableReplicas),
		},
	}
	strategy := s.Spec.UpdateStrategy
	if r := strategy.RollingUpdate; r != nil && r.Partition != nil {
		w.below = int(*r.Partition)
		w.turn = max(n-w.below, 0)
	}
	if strategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
		w.frozen = "its update strategy is OnDelete"
	}
	return w
}

func rolledDaemonSet(d *appsv1.DaemonSet) *rolled {
	n := int(d.Status.DesiredNumberScheduled)
	w := &rolled{
		Target: Target{"daemonset", d.Name}, uid: d.UID, version: d.ResourceVersion, template: d.Spec.Template, selector: d.Spec.Selector,
		minReady: seconds(d.Spec.MinReadySeconds),
		tally: tally{
			seen: d.Status.ObservedGeneration >= d.Generation, wanted: n, turn: n, total: n, // misscheduled ones are none of its wanted
			updated: int(d.Status.UpdatedNumberScheduled), available: int(d.Status.NumberAvailable),
		},
	}
	if d.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType {
		w.frozen = "its update strategy is OnDelete"
	}
	return w
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// patchRolled changes the version that was looked at, and returns it as it is then.
func (c *Cluster) patchRolled(ctx context.Context, w *rolled, ops []heal.Op) (*rolled, error) {
	patch, err := json.Marshal(slices.Concat([]heal.Op{{Op: "test", Path: "/metadata/resourceVersion", Value: w.version}}, ops))
	if err != nil {
		return nil, err
	}
	ctx, cancel := callContext(ctx)
	defer cancel()
	apps, opts := c.client.AppsV1(), metav1.PatchOptions{FieldManager: managed}
	switch w.Kind {
	case "deployment":
		d, err := apps.Deployments(c.Namespace).Patch(ctx, w.Name, types.JSONPatchType, patch, opts)
		if err != nil {
			return nil, err
		}
		return rolledDeployment(d), nil
	case "statefulset":
		s, err := apps.StatefulSets(c.Namespace).Patch(ctx, w.Name, types.JSONPatchType, patch, opts)
		if err != nil {
			return nil, err
		}
		return rolledStatefulSet(s), nil
	}
	d, err := apps.DaemonSets(c.Namespace).Patch(ctx, w.Name, types.JSONPatchType, patch, opts)
	if err != nil {
		return nil, err
	}
	return rolledDaemonSet(d), nil
}

// A Revision is one that the cluster keeps of a workload: a ReplicaSet of a
// Deployment, or a ControllerRevision.
type Revision struct {
	Name    string    `json:"name"`
	Number  int64     `json:"number"` // the highest was rolled out last; a revision that is rolled out again gets a new one
	Images  []string  `json:"images"`
	Current bool      `json:"current"`
	Mark    *Mark     `json:"mark,omitempty"` // nil: culvert has not rolled it out, nor seen it whole
	Made    time.Time `json:"made"`

	uid      types.UID
	label    string // the pods' of it, where they are not owned by it
	template corev1.PodTemplateSpec
}

// A Mark is written on a Revision when it is known how it went.
type Mark struct {
	Revision string    `json:"revision"`     // whose it is: controllers and kubectl copy annotations
	Good     bool      `json:"good"`         // it was whole once, and was not gone back from
	As       string    `json:"as,omitempty"` // the caller's name of the release
	By       string    `json:"by,omitempty"`
	At       time.Time `json:"at"`
}

// annMark is on ReplicaSets and ControllerRevisions.
const annMark = "culvert.dev/released"

func markOf(object *metav1.ObjectMeta) *Mark {
	var m Mark
	if json.Unmarshal([]byte(object.Annotations[annMark]), &m) != nil || m.Revision != object.Name {
		return nil
	}
	return &m
}

// Revisions are those that the cluster keeps of a workload, the newest first.
func (c *Cluster) Revisions(ctx context.Context, t Target) ([]Revision, error) {
	w, err := c.getRolled(ctx, t)
	var all []Revision
	if err == nil {
		all, err = c.revisions(ctx, w)
	}
	if err != nil {
		return nil, fmt.Errorf("list the revisions of %s in namespace %s: %w", t, c.Namespace, noTarget(err))
	}
	return all, nil
}

func (c *Cluster) revisions(ctx context.Context, w *rolled) (all []Revision, err error) {
	opts := metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(w.selector)}
	if w.Kind == "deployment" {
		list, err := c.client.AppsV1().ReplicaSets(c.Namespace).List(ctx, opts)
		if err != nil {
			return nil, err
		}
		for i := range list.Items {
			if r := ofReplicaSet(&list.Items[i]); metav1.IsControlledBy(&list.Items[i], &metav1.ObjectMeta{UID: w.uid}) && r.Number > 0 {
				all = append(all, r)
			}
		}
	} else {
		list, err := c.client.AppsV1().ControllerRevisions(c.Namespace).List(ctx, opts)
		if err != nil {
			return nil, err
		}
		for i := range list.Items {
			if metav1.IsControlledBy(&list.Items[i], &metav1.ObjectMeta{UID: w.uid}) {
				all = append(all, ofControllerRevision(&list.Items[i]))
			}
		}
	}
	slices.SortFunc(all, func(a, b Revision) int { return cmp.Compare(b.Number, a.Number) })
	if i := currentOf(w, all); i >= 0 {
		all[i].Current = true
	}
	return all, nil
}

func ofReplicaSet(s *appsv1.ReplicaSet) Revision {
	r := Revision{Name: s.Name, Mark: markOf(&s.ObjectMeta), Made: s.CreationTimestamp.Time, uid: s.UID, template: *s.Spec.Template.DeepCopy()}
	r.Number, _ = strconv.ParseInt(s.Annotations[annRevision], 10, 64)
	delete(r.template.Labels, appsv1.DefaultDeploymentUniqueLabelKey) // the controller's, and not the Deployment's
	r.Images = images(r.template)
	return r
}

func ofControllerRevision(s *appsv1.ControllerRevision) Revision {
	var data struct {
		Spec struct {
			Template corev1.PodTemplateSpec `json:"template"`
		} `json:"spec"`
	}
	_ = json.Unmarshal(s.Data.Raw, &data) // what cannot be read is equal to nothing
	return Revision{
		Name: s.Name, Number: s.Revision, Mark: markOf(&s.ObjectMeta), Made: s.CreationTimestamp.Time, uid: s.UID,
		label:    cmp.Or(s.Labels[appsv1.ControllerRevisionHashLabelKey], s.Name), // a DaemonSet's pods bear the hash alone
		template: data.Spec.Template, Images: images(data.Spec.Template),
	}
}

func images(t corev1.PodTemplateSpec) (all []string) {
	for _, c := range t.Spec.Containers {
		all = append(all, c.Image)
	}
	return all
}

// currentOf is the one that has the workload's template. An API server of another
// version may have filled in more than was kept: then it is what the controller says,
// if it has seen the last change. -1 is none.
func currentOf(w *rolled, all []Revision) int {
	i := slices.IndexFunc(all, func(r Revision) bool { return sameTemplate(r.template, w.template) })
	if i >= 0 || !w.seen {
		return i
	}
	return slices.IndexFunc(all, func(r Revision) bool {
		return w.revision == "" || w.revision == r.Name || w.revision == strconv.FormatInt(r.Number, 10)
	})
}

func sameTemplate(a, b corev1.PodTemplateSpec) bool {
	a.CreationTimestamp, b.CreationTimestamp = metav1.Time{}, metav1.Time{}
	return equality.Semantic.DeepEqual(a, b)
}

// has tells whether a pod is of the revision.
func (r *Revision) has(p *corev1.Pod) bool {
	by := metav1.GetControllerOf(p)
	if by == nil {
		return false
	}
	label := p.Labels[appsv1.ControllerRevisionHashLabelKey]
	return by.UID == r.uid || r.label != "" && (label == r.label || label == r.Name)
}

// words name a revision to a person.
func (r *Revision) words() string {
	return fmt.Sprintf("revision %d (%s)", r.Number, strings.Join(r.Images, ", "))
}

// mark writes how a revision went.
func (c *Cluster) mark(ctx context.Context, t Target, r *Revision, m Mark) error {
	m.Revision, m.At = r.Name, time.Now().UTC().Truncate(time.Second)
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{annMark: string(text)}}})
	if err != nil {
		return err
	}
	ctx, cancel := callContext(ctx)
	defer cancel()
	opts := metav1.PatchOptions{FieldManager: managed}
	if t.Kind == "deployment" {
		_, err = c.client.AppsV1().ReplicaSets(c.Namespace).Patch(ctx, r.Name, types.MergePatchType, patch, opts)
	} else {
		_, err = c.client.AppsV1().ControllerRevisions(c.Namespace).Patch(ctx, r.Name, types.MergePatchType, patch, opts)
	}
	if err == nil {
		r.Mark = &m
	}
	return err
}

// goBack chooses what a rollback leads to: the one that is named, by its number, its
// own name or that of its release; or the newest good one before the current. Where
// nothing is marked at all it is the one before, good or not.
func goBack(all []Revision, to string) (*Revision, error) {
	now := slices.IndexFunc(all, func(r Revision) bool { return r.Current })
	if now < 0 {
		return nil, fmt.Errorf("none of its %d revisions is the current one", len(all))
	}
	if to != "" {
		return byName(all, to)
	}
	before := all[now+1:]
	if i := slices.IndexFunc(before, func(r Revision) bool { return r.Mark != nil && r.Mark.Good }); i >= 0 {
		return &before[i], nil
	}
	if len(before) == 0 || slices.ContainsFunc(all, func(r Revision) bool { return r.Mark != nil }) {
		return nil, fmt.Errorf("no revision before %s is known to be good, name one", all[now].words())
	}
	return &before[0], nil
}

func byName(all []Revision, to string) (*Revision, error) {
	var known []string
	for i, r := range all {
		number := strconv.FormatInt(r.Number, 10)
		if to == number || to == r.Name || r.Mark != nil && to == r.Mark.As {
			return &all[i], nil
		}
		known = append(known, number)
	}
	return nil, fmt.Errorf("no revision %q, there are %s", to, strings.Join(known, ", "))
}
