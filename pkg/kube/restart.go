package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// A RestartConfig says whose pods are restarted, one by one.
type RestartConfig struct {
	Target Target        // a deployment, statefulset or daemonset
	Within time.Duration // for each pod, from its end until its replacement passed the gate; 0 is 5 minutes

	// Gate, if set, is asked of each new pod that is ready, again and again until
	// it says nil or the time is over.
	Gate func(ctx context.Context, pod RunningPod) error
	Say  func(string) // may be nil
}

// A RunningPod is one that is ready.
type RunningPod struct {
	Name, UID, Node string
	Address         string   // the first of Addresses, as its Services have it
	Addresses       []string // at most one of IPv4 and one of IPv6
}

// A RestartPlan is what a restart would do.
type RestartPlan struct {
	Target  Target
	Pods    []string // in the order of their turn
	Notices []string

	rights *Rights
	pods   []corev1.Pod
	live   *rolled
}

// PlanRestart finds the pods and asks for the rights. It changes nothing.
func (c *Cluster) PlanRestart(ctx context.Context, t Target) (*RestartPlan, error) {
	plan, err := c.planRestart(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("plan the restart of %s in namespace %s: %w", t, c.Namespace, noTarget(err))
	}
	return plan, nil
}

func (c *Cluster) planRestart(ctx context.Context, t Target) (*RestartPlan, error) {
	rights, err := c.demand(ctx, restartRights(t.Kind))
	if err != nil {
		return nil, err
	}
	plan := &RestartPlan{Target: t, rights: rights, Notices: rights.Notices}
	if !plan.evicts() && !rights.may("delete", "", "pods") {
		return nil, fmt.Errorf("%w: to create pods/eviction, or to delete pods", ErrForbidden)
	}
	if plan.live, err = c.getRolled(ctx, t); err != nil {
		return nil, err
	}
	if plan.pods, err = c.podsRolled(ctx, plan.live); err != nil {
		return nil, err
	}
	plan.pods = slices.DeleteFunc(plan.pods, func(p corev1.Pod) bool { return over(&p) })
	slices.SortFunc(plan.pods, turns)
	for _, p := range plan.pods {
		plan.Pods = append(plan.Pods, p.Name)
	}
	if len(plan.pods) == 0 {
		return nil, fmt.Errorf("%w: %s has none", ErrNoPod, t)
	}
	if plan.live.wanted == 1 && t.Kind != "daemonset" {
		plan.Notices = append(plan.Notices, "it has one pod only: nothing answers while that is replaced")
	}
	return plan, nil
}

// Ready are the pods of a plan that are ready now.
func (p *RestartPlan) Ready() (all []RunningPod) {
	for i := range p.pods {
		if isReady(&p.pods[i]) {
			all = append(all, asRunning(&p.pods[i]))
		}
	}
	return all
}

func (p *RestartPlan) evicts() bool { return p.rights.may("create", "", "pods/eviction") }

// turns puts first what does not work anyway; of a StatefulSet the last pod is
// first, as its controller has it.
func turns(a, b corev1.Pod) int {
	if x, y := isReady(&a), isReady(&b); x != y {
		if y {
			return -1
		}
		return 1
	}
	if by := metav1.GetControllerOf(&a); by != nil && by.Kind == "StatefulSet" {
		return cmp.Compare(ordinal(&b), ordinal(&a))
	}
	return strings.Compare(a.Name, b.Name)
}

// RestartPods replaces the pods of a workload one by one: the next one's turn comes
// when the replacement of the last, which is another pod and not the old one that
// still answers, is available and has passed the gate. The last one is waited for
// like all. A pod that does not come back ends it with an error, and those whose turn
// has not come stay as they are.
func (c *Cluster) RestartPods(ctx context.Context, cfg RestartConfig) error {
	plan, err := c.PlanRestart(ctx, cfg.Target)
	if err != nil {
		return err
	}
	r := &restarter{c: c, cfg: cfg, plan: plan, old: map[types.UID]bool{}, ready: map[types.UID]since{}, passed: map[types.UID]bool{}}
	r.cfg.Within = cmp.Or(cfg.Within, rollLimit)
	if r.cfg.Say == nil {
		r.cfg.Say = func(string) {}
	}
	for i := range plan.pods {
		r.old[plan.pods[i].UID] = isReady(&plan.pods[i])
	}
	for i := range plan.pods {
		if err := r.replace(ctx, i, &plan.pods[i]); err != nil {
			return fmt.Errorf("restart %s in namespace %s: pod %d of %d, %s: %w", cfg.Target, c.Namespace, i+1, len(plan.pods), plan.pods[i].Name, sorted(err))
		}
	}
	return nil
}

type restarter struct {
	c    *Cluster
	cfg  RestartConfig
	plan *RestartPlan

	old    map[types.UID]bool  // those whose turn it is, or will be; true for one that was ready
	ready  map[types.UID]since // new ones that are ready now
	passed map[types.UID]bool  // new ones that the gate said yes to
}

// replace is one turn.
func (r *restarter) replace(ctx context.Context, i int, p *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Within)
	defer cancel()
	r.cfg.Say(fmt.Sprintf("%d of %d: pod %s ends", i+1, len(r.plan.pods), p.Name))
	if err := r.end(ctx, p); err != nil {
		return err
	}
	ticker := time.NewTicker(rollEvery)
	defer ticker.Stop()
	for said := ""; ; {
		words, done, err := r.look(ctx, i+1, p)
		switch {
		case done:
			r.cfg.Say(fmt.Sprintf("%d of %d: %s", i+1, len(r.plan.pods), words))
			return nil
		case err != nil && ctx.Err() == nil && !passing(err):
			return err
		case err != nil && ctx.Err() == nil:
			words = fmt.Sprintf("waiting for the API server: %v", err)
		}
		if words != said && words != "" && (ctx.Err() == nil || said == "") { // what is cut off says less
			r.cfg.Say(words)
			said = words
		}
		select {
		case <-ctx.Done():
			return stopped(ctx, r.cfg.Within, said)
		case <-ticker.C:
		}
	}
}

// stopped is why a turn ended before its time, or at it.
func stopped(ctx context.Context, within time.Duration, words string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("it did not come back within %v: %s", within, words)
	}
	return fmt.Errorf("%w: %s", ctx.Err(), words)
}

// end evicts a pod, for as long as a disruption budget forbids it, or deletes it
// where it may not be evicted. One that is gone has had its end.
func (r *restarter) end(ctx context.Context, p *corev1.Pod) error {
	for said := false; r.plan.evicts(); {
		err := r.c.evictPod(ctx, p.Name, p.UID)
		switch {
		case apierrors.IsTooManyRequests(err):
			if !said {
				r.cfg.Say(fmt.Sprintf("pod %s may not be evicted yet: %v", p.Name, err))
				said = true
			}
			if pause(ctx, lookEvery) != nil {
				return fmt.Errorf("it may not be evicted: %w", err)
			}
			continue
		case err == nil, apierrors.IsNotFound(err), apierrors.IsConflict(err):
			return nil // of a conflict: another pod has its name by now
		case !r.plan.rights.may("delete", "", "pods") || !apierrors.IsForbidden(err) && !apierrors.IsMethodNotSupported(err):
			return err
		}
		break
	}
	err := r.c.deletePod(ctx, p.Name, p.UID)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}

// evictPod asks disruption budgets as well.
func (c *Cluster) evictPod(ctx context.Context, name string, uid types.UID) error {
	ctx, cancel := callContext(ctx)
	defer cancel()
	return c.client.PolicyV1().Evictions(c.Namespace).Evict(ctx, &policyv1.Eviction{
		ObjectMeta:    metav1.ObjectMeta{Name: name, Namespace: c.Namespace},
		DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}},
	})
}

// PodAt finds the pod of a workload that has an address; ErrNoPod is that none has it.
func (c *Cluster) PodAt(ctx context.Context, t Target, address string) (RunningPod, error) {
	p, err := c.podAt(ctx, t, address)
	if err != nil {
		return RunningPod{}, fmt.Errorf("find the pod of %s at %s in namespace %s: %w", t, address, c.Namespace, noTarget(err))
	}
	return asRunning(p), nil
}

func (c *Cluster) podAt(ctx context.Context, t Target, address string) (*corev1.Pod, error) {
	live, err := c.getRolled(ctx, t)
	if err != nil {
		return nil, err
	}
	pods, err := c.podsRolled(ctx, live)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(pods, func(p corev1.Pod) bool {
		return !over(&p) && slices.Contains(append(p.Status.PodIPs, corev1.PodIP{IP: p.Status.PodIP}), corev1.PodIP{IP: address})
	})
	if i < 0 {
		return nil, ErrNoPod
	}
	return &pods[i], nil
}

// EndPod ends the pod of a workload that has an address, as RestartPods would, and does
// not wait for the one in its place.
func (c *Cluster) EndPod(ctx context.Context, t Target, address string) error {
	plan, err := c.PlanRestart(ctx, t)
	if err != nil {
		return err
	}
	p, err := c.podAt(ctx, t, address)
	if err == nil {
		r := &restarter{c: c, cfg: RestartConfig{Say: func(string) {}}, plan: plan}
		err = r.end(ctx, p)
	}
	if err != nil {
		return fmt.Errorf("end the pod of %s at %s in namespace %s: %w", t, address, c.Namespace, sorted(err))
	}
	return nil
}

func asRunning(p *corev1.Pod) RunningPod {
	r := RunningPod{Name: p.Name, UID: string(p.UID), Node: p.Spec.NodeName, Address: p.Status.PodIP}
	for _, a := range p.Status.PodIPs {
		r.Addresses = append(r.Addresses, a.IP)
	}
	return r
}

// look tells whether as many new pods are well as have had their end, and none of the
// others is missing: one that ended by itself is waited for, too.
func (r *restarter) look(ctx context.Context, turns int, old *corev1.Pod) (words string, done bool, err error) {
	live, err := r.c.getRolled(ctx, r.cfg.Target)
	if err != nil {
		return "", false, noTarget(err)
	}
	pods, err := r.c.podsRolled(ctx, live)
	if err != nil {
		return "", false, err
	}
	pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return over(&p) })
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	fine, last := 0, ""
	for i := range pods {
		lacks, isNew := r.judge(ctx, live, &pods[i])
		switch {
		case lacks != "":
			words = "waiting for pod " + pods[i].Name + ": " + lacks
		case isNew:
			fine, last = fine+1, pods[i].Name
		}
	}
	switch wanted := live.wanted; { // it may have been scaled meanwhile
	case words != "":
	case len(pods) < wanted || fine < min(turns, wanted):
		words = "waiting for a pod in place of " + old.Name
	default:
		return "pod " + last + " is well", true, nil
	}
	return words, false, nil
}

// judge tells what a pod lacks, "" for nothing.
func (r *restarter) judge(ctx context.Context, live *rolled, p *corev1.Pod) (lacks string, isNew bool) {
	wasReady, isOld := r.old[p.UID]
	switch {
	case isOld && wasReady && !isReady(p):
		return troubleOf(p).words + ", and its turn has not come", false
	case isOld:
		return "", false
	case !r.available(live, p):
		return troubleOf(p).words, true
	}
	if err := r.pass(ctx, p); err != nil {
		return fmt.Sprintf("ready, but %v", err), true
	}
	return "", true
}

// available tells whether a pod has been ready for as long as the workload wants, and is known
// to every node: who has ended the next one before left a Service without any for a moment.
func (r *restarter) available(live *rolled, p *corev1.Pod) bool {
	held := r.ready[p.UID]
	long := held.holds(isReady(p))
	r.ready[p.UID] = held
	return isReady(p) && long >= max(live.minReady, heal.HeardOf)
}

// pass asks the gate, of each pod until it has said yes.
func (r *restarter) pass(ctx context.Context, p *corev1.Pod) error {
	if r.cfg.Gate == nil || r.passed[p.UID] {
		return nil
	}
	err := r.cfg.Gate(ctx, asRunning(p))
	r.passed[p.UID] = err == nil
	return err
}

// DialPort connects to a port of a pod by a port-forward, which ends in the pod's own
// network: neither a Service nor an Ingress is needed, and it is this pod that answers.
// ctx bounds the dial only.
func (c *Cluster) DialPort(ctx context.Context, pod string, port int) (net.Conn, error) {
	var errs []error
	for _, way := range []Way{WebSocket, SPDY} {
		conn, err := c.dialWay(ctx, way, door{pod: pod, port: port})
		if err == nil {
			return conn, nil
		}
		errs = append(errs, fmt.Errorf("by %s: %w", way, sorted(err)))
		if ctx.Err() != nil || notReached(err) {
			break
		}
	}
	return nil, fmt.Errorf("dial port %d of pod %s in namespace %s: %w", port, pod, c.Namespace, errors.Join(errs...))
}
