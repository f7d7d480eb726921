package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// A Workload is what makes the pods behind a Service, where that is one thing.
// For the time of an exchange it can be scaled to nothing: see Shadow.ScaleDown.
type Workload struct {
	Kind, Name string   // Kind: "deployment" or "statefulset"
	Replicas   int      // that are asked for
	Others     []string // further Services that lead to its pods, and to nothing meanwhile
}

func (w *Workload) String() string { return w.Kind + "/" + w.Name }

// resource is the kind as the API server calls it.
func (w *Workload) resource() string { return w.Kind + "s" }

// annWorkload is on the Lease of a router: what it stands in for, "deployment/web".
const annWorkload = "culvert.dev/workload"

const (
	// readyLimit is how long pods may take to be ready before the exchange goes
	// back to what there is of them.
	readyLimit = 60 * time.Second

	// endSlack is how long a pod may take to be gone beyond the time it has to
	// end. What still is there then may be so for ever, as on a dead node.
	endSlack = 30 * time.Second
)

// liveWorkload is a workload as it is now.
type liveWorkload struct {
	Workload
	namespace string
	live      heal.LiveWorkload
	selector  *metav1.LabelSelector
	template  corev1.PodTemplateSpec
	ready     int
	seen      bool // its controller knows of its last change
	deletes   bool // the volumes of pods that are scaled away
}

func fromDeployment(d *appsv1.Deployment) liveWorkload {
	n := int(replicas(d.Spec.Replicas))
	return liveWorkload{
		Workload{Kind: "deployment", Name: d.Name, Replicas: n}, d.Namespace, heal.LiveWorkload{ResourceVersion: d.ResourceVersion, Labels: d.Labels, Replicas: n},
		d.Spec.Selector, d.Spec.Template, int(d.Status.ReadyReplicas), d.Status.ObservedGeneration >= d.Generation, false,
	}
}

func fromStatefulSet(s *appsv1.StatefulSet) liveWorkload {
	n := int(replicas(s.Spec.Replicas))
	policy := s.Spec.PersistentVolumeClaimRetentionPolicy
	deletes := policy != nil && policy.WhenScaled == appsv1.DeletePersistentVolumeClaimRetentionPolicyType
	return liveWorkload{
		Workload{Kind: "statefulset", Name: s.Name, Replicas: n}, s.Namespace, heal.LiveWorkload{ResourceVersion: s.ResourceVersion, Labels: s.Labels, Replicas: n},
		s.Spec.Selector, s.Spec.Template, int(s.Status.ReadyReplicas), s.Status.ObservedGeneration >= s.Generation, deletes,
	}
}

func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

// FindWorkload finds what makes the pods behind a Service, if all of them are
// made by the same Deployment or StatefulSet: ErrNoWorkload if not. ErrExchanged
// is that somebody has scaled it to nothing already. It changes nothing.
func (c *Cluster) FindWorkload(ctx context.Context, s *Service) (*Workload, error) {
	w, err := c.findWorkload(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("find the workload of service %s in namespace %s: %w", s.Name, c.Namespace, sorted(err))
	}
	return w, nil
}

func (c *Cluster) findWorkload(ctx context.Context, s *Service) (*Workload, error) {
	all, err := c.workloads(ctx, c.Namespace, "")
	if err != nil {
		return nil, err
	}
	own := labels.SelectorFromSet(s.Selector)
	all = slices.DeleteFunc(all, func(w liveWorkload) bool { return s.Exposed || !own.Matches(labels.Set(w.template.Labels)) })
	if len(all) != 1 {
		var names []string
		for _, w := range all {
			names = append(names, w.String())
		}
		return nil, fmt.Errorf("%w: there are %d: %s", ErrNoWorkload, len(all), strings.Join(names, ", "))
	}
	w := all[0]
	if session := w.live.Labels[heal.WorkloadLabel]; session != "" {
		return nil, heldBy(&w)
	}
	if w.Replicas == 0 {
		return nil, fmt.Errorf("%w: %s has no replicas", ErrNoWorkload, &w)
	}
	if w.deletes {
		return nil, fmt.Errorf("%w: scaling %s to nothing would delete its volumes (persistentVolumeClaimRetentionPolicy.whenScaled is Delete)", ErrNoWorkload, &w)
	}
	if err := c.onlyOf(ctx, s, w); err != nil {
		return nil, err
	}
	w.Others, err = c.alsoLeading(ctx, s, w)
	return &w.Workload, err
}

func heldBy(w *liveWorkload) error {
	return fmt.Errorf("%w: %s was scaled down by %s, session %s", ErrExchanged, w, w.live.Labels[heal.OwnerLabel], w.live.Labels[heal.WorkloadLabel])
}

// onlyOf looks for pods behind the Service that another thing made: they would go
// on answering.
func (c *Cluster) onlyOf(ctx context.Context, s *Service, w liveWorkload) error {
	selector, err := metav1.LabelSelectorAsSelector(w.selector)
	if err != nil {
		return err
	}
	pods, err := c.podsOf(ctx, s.Selector)
	if err != nil {
		return err
	}
	var others []string
	for _, p := range pods {
		if p.DeletionTimestamp == nil && !(w.made(&p) && selector.Matches(labels.Set(p.Labels))) {
			others = append(others, podOf(&p))
		}
	}
	if slices.Sort(others); len(others) > 0 {
		return fmt.Errorf("%w: not of %s, and would go on answering: %s", ErrNoWorkload, &w, strings.Join(others, ", "))
	}
	return nil
}

// podOf names a pod and what made it.
func podOf(p *corev1.Pod) string {
	if by := metav1.GetControllerOf(p); by != nil {
		return fmt.Sprintf("pod/%s (of %s/%s)", p.Name, strings.ToLower(by.Kind), by.Name)
	}
	return "pod/" + p.Name
}

// alsoLeading are other Services in front of the same pods.
func (c *Cluster) alsoLeading(ctx context.Context, s *Service, w liveWorkload) ([]string, error) {
	list, err := c.client.CoreV1().Services(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, o := range list.Items {
		takes := len(o.Spec.Selector) > 0 && labels.SelectorFromSet(o.Spec.Selector).Matches(labels.Set(w.template.Labels))
		if takes && o.Name != s.Name && o.Labels[labelManaged] != managed {
			names = append(names, o.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// workloads are those of a namespace, or of all (""), that bear a label, if one
// is given.
func (c *Cluster) workloads(ctx context.Context, namespace, label string) ([]liveWorkload, error) {
	opts := metav1.ListOptions{LabelSelector: label}
	deployments, err := c.client.AppsV1().Deployments(namespace).List(ctx, opts)
	if err != nil {
		return nil, err
	}
	sets, err := c.client.AppsV1().StatefulSets(namespace).List(ctx, opts)
	if err != nil {
		return nil, err
	}
	var all []liveWorkload
	for i := range deployments.Items {
		if deployments.Items[i].Labels[labelManaged] != managed {
			all = append(all, fromDeployment(&deployments.Items[i]))
		}
	}
	for i := range sets.Items {
		all = append(all, fromStatefulSet(&sets.Items[i]))
	}
	return all, nil
}

func (c *Cluster) getWorkload(ctx context.Context, namespace string, w Workload) (liveWorkload, error) {
	if w.Kind == "statefulset" {
		s, err := c.client.AppsV1().StatefulSets(namespace).Get(ctx, w.Name, metav1.GetOptions{})
		if err != nil {
			return liveWorkload{}, err
		}
		return fromStatefulSet(s), nil
	}
	d, err := c.client.AppsV1().Deployments(namespace).Get(ctx, w.Name, metav1.GetOptions{})
	if err != nil {
		return liveWorkload{}, err
	}
	return fromDeployment(d), nil
}

func (c *Cluster) patchWorkload(ctx context.Context, namespace string, w Workload, ops []heal.Op) error {
	patch, err := json.Marshal(ops)
	if err != nil {
		return err
	}
	call, cancel := callContext(ctx)
	defer cancel()
	opts := metav1.PatchOptions{FieldManager: managed}
	if w.Kind == "statefulset" {
		_, err = c.client.AppsV1().StatefulSets(namespace).Patch(call, w.Name, types.JSONPatchType, patch, opts)
	} else {
		_, err = c.client.AppsV1().Deployments(namespace).Patch(call, w.Name, types.JSONPatchType, patch, opts)
	}
	return err
}

// ScaleDown scales the workload that the router stands in for to nothing, and
// waits until its last pod is gone: what must not meet the original must not meet
// the rest of it. The Service must lead to the router by then. It returns the pods
// that had long enough to end and have not. Done again it changes nothing, also if
// somebody scaled the workload up meanwhile, whose pods are not waited for: see
// Scaled.
func (s *Shadow) ScaleDown(ctx context.Context, progress func(string)) (left []string, err error) {
	if s.workload == nil {
		return nil, nil
	}
	left, err = s.scaleDown(ctx, progress)
	if err != nil {
		return nil, fmt.Errorf("scale %s in namespace %s down: %w", s.workload, s.cluster.Namespace, sorted(err))
	}
	return left, nil
}

func (s *Shadow) scaleDown(ctx context.Context, progress func(string)) (left []string, err error) {
	var live liveWorkload
	err = tried(conflicts, func() (err error) {
		live, err = s.scaleDownOnce(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	for end, said := time.Now().Add(live.patience()), ""; ; {
		left, err := s.stillThere(ctx, live)
		late := time.Now().After(end)
		switch {
		case err == nil && (len(left) == 0 || late):
			return left, nil
		case err != nil && (late || !passing(err)):
			return nil, err
		}
		if words := "waiting for the end of " + strings.Join(left, ", "); err == nil && words != said {
			progress(words)
			said = words
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// patience is how long the pods may take to be gone.
func (w *liveWorkload) patience() time.Duration {
	if s := w.template.Spec.TerminationGracePeriodSeconds; s != nil {
		return time.Duration(*s)*time.Second + endSlack
	}
	return corev1.DefaultTerminationGracePeriodSeconds*time.Second + endSlack
}

// stillThere are the pods whose end is waited for; none if somebody scaled the
// workload up.
func (s *Shadow) stillThere(ctx context.Context, live liveWorkload) ([]string, error) {
	selector, err := metav1.LabelSelectorAsSelector(live.selector)
	if err != nil {
		return nil, err
	}
	left, err := s.cluster.podsMade(ctx, selector, live)
	if err != nil || len(left) == 0 {
		return nil, err
	}
	if n, _, err := s.Scaled(ctx); err != nil || n > 0 {
		return nil, err
	}
	return left, nil
}

// Scaled tells how many pods are asked for of the workload that the router stands
// in for, and whether it is still marked as scaled to nothing by this session. If
// so, and the number is not 0, somebody else has scaled it since.
func (s *Shadow) Scaled(ctx context.Context) (to int, marked bool, err error) {
	live, err := s.cluster.getWorkload(ctx, s.cluster.Namespace, *s.workload)
	return live.Replicas, live.live.Labels[heal.WorkloadLabel] == s.cfg.Session, err
}

// Workload is what the router stands in for, nil if it leaves that running.
func (s *Shadow) Workload() *Workload { return s.workload }

// passing tells of an error after which the next call may succeed.
func passing(err error) bool {
	return !apierrors.IsForbidden(err) && !apierrors.IsNotFound(err) && !apierrors.IsUnauthorized(err)
}

// made tells whether a pod is of the workload, and not, say, of a DaemonSet with
// the same labels. The ReplicaSets of a Deployment are named after it and the
// template that they are for.
func (w *liveWorkload) made(p *corev1.Pod) bool {
	by := metav1.GetControllerOf(p)
	switch {
	case by == nil:
		return false
	case w.Kind == "statefulset":
		return by.Kind == "StatefulSet" && by.Name == w.Name
	}
	return by.Kind == "ReplicaSet" && by.Name == w.Name+"-"+p.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
}

// podsMade are those that a selector takes and the workload made.
func (c *Cluster) podsMade(ctx context.Context, selector labels.Selector, w liveWorkload) ([]string, error) {
	list, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: selector.String()})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range list.Items {
		over := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed // and kept to be looked at
		if w.made(&p) && !(over && p.DeletionTimestamp == nil) {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (s *Shadow) scaleDownOnce(ctx context.Context) (liveWorkload, error) {
	live, err := s.cluster.getWorkload(ctx, s.cluster.Namespace, *s.workload)
	if apierrors.IsNotFound(err) {
		return live, fmt.Errorf("%w: %w", ErrNoTarget, err)
	}
	if err != nil {
		return live, err
	}
	switch session := live.live.Labels[heal.WorkloadLabel]; {
	case session == s.cfg.Session:
		return live, nil
	case session != "":
		return live, heldBy(&live)
	case live.Replicas == 0:
		return live, nil // somebody else's will, not to be undone by us
	}
	s.readyBefore = live.ready
	return live, s.cluster.patchWorkload(ctx, s.cluster.Namespace, *s.workload, heal.Empty(live.live, s.cfg.Session, labelValue(s.holder.Owner())))
}

// ScaleUp gives the workload its pods again, and waits until as many are ready as
// were before, but not for long. It may be called at any time and more than once,
// and tells whether there was anything to do.
func (s *Shadow) ScaleUp(ctx context.Context, progress func(string)) (changed bool, err error) {
	if s.workload == nil {
		return false, nil
	}
	for {
		changed, err = s.cluster.restoreWorkload(ctx, s.cluster.Namespace, *s.workload, s.cfg.Session)
		if changed {
			s.awaitPods(ctx, progress)
		}
		if err == nil || refused(err) || pause(ctx, restoreEvery) != nil {
			return changed, err
		}
	}
}

func (s *Shadow) awaitPods(ctx context.Context, progress func(string)) {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	for said := ""; ; {
		live, err := s.cluster.getWorkload(ctx, s.cluster.Namespace, *s.workload)
		want := live.Replicas
		if s.readyBefore > 0 {
			want = min(want, s.readyBefore)
		}
		if apierrors.IsNotFound(err) || err == nil && live.seen && live.ready >= want {
			return
		}
		if words := fmt.Sprintf("waiting for the pods of %s: %d of %d are ready", s.workload, live.ready, want); err == nil && words != said {
			progress(words)
			said = words
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			return
		}
	}
}

// restoreWorkload puts back what a session scaled to nothing.
func (c *Cluster) restoreWorkload(ctx context.Context, namespace string, w Workload, session string) (changed bool, err error) {
	err = tried(conflicts, func() error {
		live, err := c.getWorkload(ctx, namespace, w)
		if err != nil {
			return err
		}
		ops := heal.Refill(live.live, session)
		if changed = ops != nil; !changed {
			return nil
		}
		return c.patchWorkload(ctx, namespace, w, ops)
	})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("scale %s in namespace %s up again: %w", &w, namespace, sorted(err))
	}
	return changed, nil
}

// parseWorkload reads the annotation of a Lease.
func parseWorkload(text string) *Workload {
	kind, name, ok := strings.Cut(text, "/")
	if !ok {
		return nil
	}
	return &Workload{Kind: kind, Name: name}
}

// takenWorkloads are those that were scaled to nothing, by session. Who may not
// list workloads has scaled none.
func (c *Cluster) takenWorkloads(ctx context.Context, namespace string) (map[id][]liveWorkload, error) {
	all, err := c.workloads(ctx, namespace, heal.WorkloadLabel)
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, fmt.Errorf("look for workloads that were scaled down: %w", sorted(err))
	}
	taken := map[id][]liveWorkload{}
	for _, w := range all {
		if session := w.live.Labels[heal.WorkloadLabel]; sessionName.MatchString(session) {
			key := id{w.namespace, session}
			taken[key] = append(taken[key], w)
		}
	}
	return taken, nil
}
