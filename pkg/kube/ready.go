package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// unschedulableLimit is how long no node may fit: an autoscaler needs
	// longer, but says so, and then the pod's condition changes.
	unschedulableLimit = 45 * time.Second
	// silentLimit is how long the program may run without an answer: ours
	// answers at once, another image's never.
	silentLimit = 20 * time.Second
	lookEvery   = time.Second
	// quickPod is how long a pod may take before its events are read.
	quickPod = 2 * time.Second
)

// What the cluster takes the pod only without.
var (
	errSysctl = errors.New("the cluster refuses a sysctl of the pod")
	errIDs    = errors.New("the cluster chooses users and groups itself")
)

// WaitReady waits until the shadow's pod is ready. progress is told in words
// what is waited for, whenever that changes; it may be nil. What will not get
// better by waiting ends it at once, with the cluster's own reason.
func (s *Shadow) WaitReady(ctx context.Context, progress func(string)) error {
	if progress == nil {
		progress = func(string) {}
	}
	err := s.allReady(ctx, progress)
	for s.concede(err, progress) {
		if err = s.again(ctx); err == nil {
			err = s.allReady(ctx, progress)
		}
	}
	if err != nil {
		return fmt.Errorf("wait for the shadow in namespace %s: %w", s.cluster.Namespace, sorted(err))
	}
	return nil
}

// concede gives up what the cluster refuses, each thing once, and tells whether
// there was such a thing.
func (s *Shadow) concede(err error, progress func(string)) bool {
	switch {
	case s.joined: // it is not for us to make it anew
		return false
	case errors.Is(err, errSysctl) && !s.noPing && s.router:
		progress("the cluster refuses the sysctl for low ports: whether the router may listen on them is up to the nodes")
		s.noPing = true
	case errors.Is(err, errSysctl) && !s.noPing:
		progress("the cluster refuses the sysctl for unprivileged ping: pings into the cluster will not be answered")
		s.noPing = true
	case errors.Is(err, errIDs) && !s.noIDs:
		progress("the cluster gives the shadow a user and groups of its own choice")
		s.noIDs = true
	default:
		return false
	}
	return true
}

// again makes the session anew: neither a Job nor what it owns can be changed
// in place.
func (s *Shadow) again(ctx context.Context) error {
	if err := s.Delete(ctx); err != nil {
		return err
	}
	return s.Create(ctx, nil)
}

// allReady waits for the shadow's pod, and for stand-ins of others before.
func (s *Shadow) allReady(ctx context.Context, progress func(string)) error {
	for _, pod := range s.standing() {
		if err := s.waitReady(ctx, pod, progress); err != nil {
			return err
		}
	}
	return nil
}

// waitReady looks, and looks again when the watch rings or a second has gone:
// events and conditions of what makes the pod are not watched.
func (s *Shadow) waitReady(ctx context.Context, pod string, progress func(string)) error {
	var bell doorbell
	defer bell.stop()
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	var said string
	var unfit, silent since
	for {
		state, err := s.look(ctx, pod, &bell)
		if err != nil {
			return err
		}
		if state.ready {
			s.ways.seen(state.pod)
			return nil
		}
		if state.words != said {
			progress(state.words)
			said = state.words
		}
		if unfit.holds(state.unfit) > unschedulableLimit {
			return fmt.Errorf("no node takes the pod: %s", strings.TrimPrefix(state.words, waitForNode))
		}
		if silent.holds(state.silent) > silentLimit {
			return fmt.Errorf("what runs does not answer on port %d: %s is no shadow, or the node cannot reach it", port, s.cfg.Image)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", said, ctx.Err())
		case <-ticker.C:
		case _, ok := <-bell.rings():
			if !ok {
				bell.stop()
				bell.watch = nil
			}
		}
	}
}

// since is when something began to hold, zero while it does not.
type since time.Time

// holds is told whether it does, and tells for how long.
func (s *since) holds(now bool) time.Duration {
	switch {
	case !now:
		*s = since{}
	case time.Time(*s).IsZero():
		*s = since(time.Now())
	default:
		return time.Since(time.Time(*s))
	}
	return 0
}

// doorbell rings when a watched pod changes.
type doorbell struct {
	watch watch.Interface
	pod   since // that one is there
}

func (b *doorbell) rings() <-chan watch.Event {
	if b.watch == nil {
		return nil
	}
	return b.watch.ResultChan()
}

func (b *doorbell) stop() {
	if b.watch != nil {
		b.watch.Stop()
	}
}

// look sees how far the pod is.
func (s *Shadow) look(ctx context.Context, pod string, bell *doorbell) (podState, error) {
	pods := s.cluster.client.CoreV1().Pods(s.cluster.Namespace)
	list, err := pods.List(ctx, metav1.ListOptions{LabelSelector: s.podSelector(pod)})
	if err != nil {
		return podState{}, err
	}
	if bell.watch == nil {
		// Without a watch the ticker alone is slower, and good enough.
		bell.watch, _ = pods.Watch(ctx, metav1.ListOptions{
			LabelSelector: s.podSelector(pod), ResourceVersion: list.ResourceVersion,
		})
	}
	events := s.events(ctx, newestPod(list.Items), bell)
	if err := s.refused(ctx, len(list.Items), events); err != nil {
		return podState{}, err
	}
	return judgePods(list.Items, events)
}

// events are those that may say why there is no pod, or why the pod takes its
// time, as far as they may be read. A pod that is quick is not asked about.
func (s *Shadow) events(ctx context.Context, pod *corev1.Pod, bell *doorbell) []corev1.Event {
	there := bell.pod.holds(pod != nil)
	if pod != nil && there < quickPod || !s.rights.may("list", "", "events") {
		return nil
	}
	list, err := s.cluster.client.CoreV1().Events(s.cluster.Namespace).List(ctx, metav1.ListOptions{FieldSelector: s.eventsOf(pod)})
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(list.Items, func(e corev1.Event) bool {
		name := e.InvolvedObject.Name
		return name != s.name() && !strings.HasPrefix(name, s.name()+"-")
	})
}

// eventsOf selects the events of the pod, or of what should make one. The name
// of a ReplicaSet is not known here.
func (s *Shadow) eventsOf(pod *corev1.Pod) string {
	switch {
	case pod != nil:
		return "involvedObject.kind=Pod,involvedObject.name=" + pod.Name
	case s.mode == ByJob:
		return "involvedObject.kind=Job,involvedObject.name=" + s.name()
	}
	return "involvedObject.kind=ReplicaSet,reason=FailedCreate"
}

// refused tells whether the pod may not be made at all, as the Deployment's
// condition or an event of the ReplicaSet or the Job says, and whether what
// makes it is still there.
func (s *Shadow) refused(ctx context.Context, pods int, events []corev1.Event) error {
	if pods > 0 {
		return nil
	}
	for _, e := range events {
		if e.Reason == "FailedCreate" {
			if err := s.refusal(e.Message); err != nil {
				return err
			}
		}
	}
	message, err := s.rootRefusal(ctx)
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%w: %w", ErrGone, err)
	case err != nil && !apierrors.IsForbidden(err):
		return err
	}
	return s.refusal(message)
}

// rootRefusal is the error of asking for the root, which is not found when the
// session is gone, and what the Deployment, if there is one, says of its pods.
func (s *Shadow) rootRefusal(ctx context.Context) (string, error) {
	cs, ns := s.cluster.client, s.cluster.Namespace
	if s.mode == ByJob {
		_, err := cs.BatchV1().Jobs(ns).Get(ctx, s.name(), metav1.GetOptions{})
		return "", err
	}
	_, err := cs.CoordinationV1().Leases(ns).Get(ctx, s.name(), metav1.GetOptions{})
	if err != nil || !s.rights.may("get", "apps", "deployments") {
		return "", err
	}
	d, err := cs.AppsV1().Deployments(ns).Get(ctx, s.name(), metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	for _, c := range d.Status.Conditions {
		if c.Type == "ReplicaFailure" && c.Status == corev1.ConditionTrue {
			return c.Message, nil
		}
	}
	return "", nil
}

// refusal makes an error of a message that will stay: quota, policy, webhook.
// Others (a conflict on the quota's count, say) pass by themselves.
func (s *Shadow) refusal(message string) error {
	switch {
	case strings.Contains(message, "security context constraint") && strings.Contains(message, shadowID):
		if s.noIDs {
			return nil // an event of the first try
		}
		return fmt.Errorf("%w: %s", errIDs, message)
	case strings.Contains(message, "sysctl"):
		if s.noPing {
			return nil // an event of the first try
		}
		return fmt.Errorf("%w: %s", errSysctl, message)
	case strings.Contains(message, "forbidden"), strings.Contains(message, "denied"):
		return fmt.Errorf("the pod may not be made: %s", message)
	}
	return nil
}

// podState is how far the pod is, in words.
type podState struct {
	ready  bool
	pod    string // its name, where ready
	unfit  bool   // no node takes it
	silent bool   // it runs, and does not answer
	words  string
}

const waitForNode = "waiting for a node: "

// hopeless are the reasons for waiting that do not pass.
func hopeless(reason string) bool {
	return slices.Contains([]string{
		"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
		"CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "RunContainerError",
	}, reason)
}

// judgePods decides from the newest pod that is not on its way out.
func judgePods(pods []corev1.Pod, events []corev1.Event) (podState, error) {
	for _, p := range pods {
		if p.Status.Reason == "SysctlForbidden" {
			return podState{}, fmt.Errorf("%w: %s", errSysctl, p.Status.Message)
		}
	}
	newest := newestPod(pods)
	if newest == nil {
		return podState{words: "waiting for the pod to be made"}, nil
	}
	return judgePod(newest, events)
}

// newestPod is of those that are not on their way out, nil for none.
func newestPod(pods []corev1.Pod) *corev1.Pod {
	var newest *corev1.Pod
	for i := range pods {
		p := &pods[i]
		if p.DeletionTimestamp == nil && (newest == nil || newest.CreationTimestamp.Before(&p.CreationTimestamp)) {
			newest = p
		}
	}
	return newest
}

func judgePod(pod *corev1.Pod, events []corev1.Event) (podState, error) {
	if isReady(pod) {
		return podState{ready: true, pod: pod.Name, words: "ready"}, nil
	}
	if c := condition(pod, corev1.PodScheduled); c != nil && c.Status == corev1.ConditionFalse {
		return podState{unfit: c.Reason == corev1.PodReasonUnschedulable, words: waitForNode + c.Message}, nil
	}
	if pod.Status.Phase == corev1.PodFailed {
		return podState{words: fmt.Sprintf("the pod failed: %s %s", pod.Status.Reason, pod.Status.Message)}, nil
	}
	for _, c := range pod.Status.ContainerStatuses {
		if w := c.State.Waiting; w != nil && hopeless(w.Reason) {
			return podState{}, fmt.Errorf("pod %s: %s: %s%s%s", pod.Name, w.Reason, w.Message, pullSecrets(pod, w.Reason), lastWords(c))
		}
		if c.State.Running != nil {
			return podState{silent: true, words: "waiting for the shadow to answer"}, nil
		}
		if c.State.Terminated != nil {
			return podState{words: "the shadow ended and is started again" + lastWords(c)}, nil
		}
	}
	return podState{words: creating(pod, events)}, nil
}

// creating says what the kubelet is at, from its last event.
func creating(pod *corev1.Pod, events []corev1.Event) string {
	words := "waiting for a node"
	if pod.Spec.NodeName != "" {
		words = "creating the container"
	}
	var pulled bool
	for _, e := range events {
		if e.InvolvedObject.Name == pod.Name && e.Reason == "Pulled" {
			pulled = true
		}
	}
	for _, e := range events {
		switch {
		case e.InvolvedObject.Name != pod.Name:
		case e.Reason == "Pulling" && !pulled:
			words = "pulling the image " + pod.Spec.Containers[0].Image
		case strings.HasPrefix(e.Reason, "Failed") && e.Reason != "FailedScheduling":
			words = fmt.Sprintf("creating the container: %s: %s", e.Reason, e.Message)
		}
	}
	return words
}

// pullSecrets names those that an image was pulled with: one that does not exist
// is only passed over.
func pullSecrets(pod *corev1.Pod, reason string) string {
	var names []string
	for _, s := range pod.Spec.ImagePullSecrets {
		names = append(names, s.Name)
	}
	if len(names) == 0 || !strings.Contains(reason, "ImagePull") {
		return ""
	}
	return " (with pull secret " + strings.Join(names, ", ") + ")"
}

// lastWords are what a container said when it ended.
func lastWords(c corev1.ContainerStatus) string {
	end := c.LastTerminationState.Terminated
	if c.State.Terminated != nil {
		end = c.State.Terminated
	}
	if end == nil {
		return ""
	}
	return strings.TrimRight(fmt.Sprintf(" (exit code %d, %s: %s", end.ExitCode, end.Reason, strings.TrimSpace(end.Message)), ": ") + ")"
}

func condition(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == kind {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

func isReady(pod *corev1.Pod) bool {
	c := condition(pod, corev1.PodReady)
	return pod.DeletionTimestamp == nil && c != nil && c.Status == corev1.ConditionTrue
}
