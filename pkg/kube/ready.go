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
	lookEvery          = time.Second
)

// errSysctl means that the cluster takes the pod only without its sysctl.
var errSysctl = errors.New("the cluster refuses the sysctl net.ipv4.ping_group_range")

// WaitReady waits until the shadow's pod is ready. progress is told in words
// what is waited for, whenever that changes; it may be nil. What will not get
// better by waiting ends it at once, with the cluster's own reason.
func (s *Shadow) WaitReady(ctx context.Context, progress func(string)) error {
	if progress == nil {
		progress = func(string) {}
	}
	err := s.waitReady(ctx, progress)
	if errors.Is(err, errSysctl) && !s.noPing {
		progress("the cluster refuses the sysctl for unprivileged ping: pings into the cluster will not be answered")
		s.noPing = true
		if err = s.again(ctx); err == nil {
			err = s.waitReady(ctx, progress)
		}
	}
	if err != nil {
		return fmt.Errorf("wait for the shadow in namespace %s: %w", s.cluster.Namespace, sorted(err))
	}
	return nil
}

// again makes the session anew: neither a Job nor what it owns can be changed
// in place.
func (s *Shadow) again(ctx context.Context) error {
	if err := s.Delete(ctx); err != nil {
		return err
	}
	return s.Create(ctx, nil)
}

// waitReady looks, and looks again when the watch rings or a second has gone:
// events and conditions of what makes the pod are not watched.
func (s *Shadow) waitReady(ctx context.Context, progress func(string)) error {
	var bell doorbell
	defer bell.stop()
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	var said string
	var unfit time.Time
	for {
		state, err := s.look(ctx, &bell)
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
		switch {
		case !state.unfit:
			unfit = time.Time{}
		case unfit.IsZero():
			unfit = time.Now()
		case time.Since(unfit) > unschedulableLimit:
			return fmt.Errorf("no node takes the pod: %s", strings.TrimPrefix(state.words, waitForNode))
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

// doorbell rings when a watched pod changes.
type doorbell struct{ watch watch.Interface }

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
func (s *Shadow) look(ctx context.Context, bell *doorbell) (podState, error) {
	pods := s.cluster.client.CoreV1().Pods(s.cluster.Namespace)
	list, err := pods.List(ctx, metav1.ListOptions{LabelSelector: labelSession + "=" + s.cfg.Session})
	if err != nil {
		return podState{}, err
	}
	if bell.watch == nil {
		// Without a watch the ticker alone is slower, and good enough.
		bell.watch, _ = pods.Watch(ctx, metav1.ListOptions{
			LabelSelector: labelSession + "=" + s.cfg.Session, ResourceVersion: list.ResourceVersion,
		})
	}
	events := s.events(ctx)
	if err := s.refused(ctx, len(list.Items), events); err != nil {
		return podState{}, err
	}
	return judgePods(list.Items, events)
}

// events are those of the session's objects, as far as they may be read.
func (s *Shadow) events(ctx context.Context) []corev1.Event {
	if !s.rights.may("list", "", "events") {
		return nil
	}
	list, err := s.cluster.client.CoreV1().Events(s.cluster.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(list.Items, func(e corev1.Event) bool {
		name := e.InvolvedObject.Name
		return name != s.name() && !strings.HasPrefix(name, s.name()+"-")
	})
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
		return fmt.Errorf("%w: %s %s", ErrGone, strings.ToLower(string(s.mode)), s.name())
	case err != nil && !apierrors.IsForbidden(err):
		return err
	}
	return s.refusal(message)
}

func (s *Shadow) rootRefusal(ctx context.Context) (string, error) {
	cs, ns := s.cluster.client, s.cluster.Namespace
	if s.mode == ByJob {
		_, err := cs.BatchV1().Jobs(ns).Get(ctx, s.name(), metav1.GetOptions{})
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
	ready bool
	pod   string // its name, where ready
	unfit bool   // no node takes it
	words string
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
	var newest *corev1.Pod
	for i := range pods {
		p := &pods[i]
		if p.Status.Reason == "SysctlForbidden" {
			return podState{}, fmt.Errorf("%w: %s", errSysctl, p.Status.Message)
		}
		if p.DeletionTimestamp == nil && (newest == nil || newest.CreationTimestamp.Before(&p.CreationTimestamp)) {
			newest = p
		}
	}
	if newest == nil {
		return podState{words: "waiting for the pod to be made"}, nil
	}
	return judgePod(newest, events)
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
			return podState{}, fmt.Errorf("pod %s: %s: %s%s", pod.Name, w.Reason, w.Message, lastWords(c))
		}
		if c.State.Running != nil {
			return podState{words: "waiting for the shadow to answer"}, nil
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
