package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// hopelessLimit is how long an image that cannot be had, or a container that
	// cannot be made, is waited for: a registry may stumble.
	hopelessLimit = 30 * time.Second
	// crashLimit is how often a container may end: it may have come before what it needs.
	crashLimit = 4
	rollEvery  = 500 * time.Millisecond
	lookLimit  = 15 * time.Second // for the questions of one look
)

// watch waits until there is enough of the template that was set, within one time for
// all of it: neither progressDeadlineSeconds nor a condition that an earlier rollout
// left is asked.
func (r *roller) watch(outer context.Context, enough func(sight) bool) error {
	ctx, cancel := context.WithTimeout(outer, r.within)
	defer cancel()
	ticker := time.NewTicker(rollEvery)
	defer ticker.Stop()
	var now sight
	hopeless := map[types.UID]since{}
	for said := ""; ; {
		seen, err := r.look(ctx)
		switch {
		case err == nil:
			now = seen
		case ctx.Err() == nil && (errors.Is(err, errMeanwhile) || !passing(err)):
			return err
		case ctx.Err() == nil:
			now.err = err // the API server is away: the pods need not be
		}
		if err == nil && enough(now) {
			r.say(now.live.words())
			return nil
		}
		if words := now.words(); words != said {
			r.say(words)
			said = words
		}
		if err == nil {
			if err := now.staysBad(hopeless); err != nil && !r.wasBroken() {
				return err
			}
			r.unstick(ctx, now)
		}
		select {
		case <-ctx.Done():
			return r.late(outer, now)
		case <-ticker.C:
		}
	}
}

// late is the end of the time, or of the caller's patience.
func (r *roller) late(outer context.Context, now sight) error {
	why := fmt.Sprintf("not done within %v", r.within)
	if outer.Err() != nil {
		why = "interrupted"
	}
	return fmt.Errorf("%s: %s%s", why, now.words(), now.troubles(r.tale))
}

// A sight is how far a rollout is.
type sight struct {
	live *rolled
	of   *Revision    // that is rolled out; nil while it is not known
	pods []corev1.Pod // of the workload
	err  error        // of the last look, where that has none of these
}

func (s sight) whole() bool { return s.live.whole() }

func (s sight) words() string {
	switch {
	case s.err != nil:
		return fmt.Sprintf("waiting for the API server: %v", s.err)
	case s.live == nil:
		return "nothing was seen of it"
	}
	return s.live.words()
}

// fresh are the pods of the revision that is rolled out.
func (s sight) fresh() (all []*corev1.Pod) {
	for i := range s.pods {
		if p := &s.pods[i]; s.of != nil && p.DeletionTimestamp == nil && s.of.has(p) {
			all = append(all, p)
		}
	}
	return all
}

// look takes the connections with it that it had to wait for too long.
func (r *roller) look(ctx context.Context) (s sight, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	defer func() { r.c.dropSlow(err) }()
	live, now, err := r.now(ctx)
	if err != nil {
		return sight{}, err
	}
	if !sameTemplate(live.template, r.ours) {
		return sight{}, errMeanwhile
	}
	s = sight{live: live}
	if live.seen && now != nil {
		s.of, r.of = now, now
	}
	if s.pods, err = r.c.podsRolled(ctx, live); err != nil {
		return sight{}, err
	}
	r.tale.tell(s, r.say)
	return s, nil
}

// podsRolled are the pods of a workload, whatever their revision.
func (c *Cluster) podsRolled(ctx context.Context, w *rolled) ([]corev1.Pod, error) {
	list, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(w.selector)})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return !w.made(&p) }), nil
}

// made tells whether a pod is of the workload, and not of another with the same labels.
func (w *rolled) made(p *corev1.Pod) bool {
	if w.Kind == "deployment" {
		return (&liveWorkload{Workload: Workload{Kind: w.Kind, Name: w.Name}}).made(p)
	}
	by := metav1.GetControllerOf(p)
	return by != nil && by.UID == w.uid
}

// staysBad is not nil when a new pod has what does not pass.
func (s sight) staysBad(known map[types.UID]since) error {
	for _, p := range s.fresh() {
		t := troubleOf(p)
		held := known[p.UID]
		long := held.holds(t.hopeless)
		known[p.UID] = held
		if long >= hopelessLimit || t.never || t.crashes >= crashLimit {
			return fmt.Errorf("%w: pod %s: %s", errStays, p.Name, t.words)
		}
	}
	return nil
}

// troubles are what keeps the new pods from being ready, the same of several once.
func (s sight) troubles(tale *tale) string {
	var order []string
	pods := map[string][]string{}
	for _, p := range s.fresh() {
		if isReady(p) {
			continue
		}
		words := troubleOf(p).words
		if warned := tale.warning(p.UID); warned != "" && !strings.Contains(words, warned) {
			words += " (" + warned + ")"
		}
		words = strings.ReplaceAll(words, p.Name, "it")
		if pods[words] == nil {
			order = append(order, words)
		}
		pods[words] = append(pods[words], p.Name)
	}
	var said strings.Builder
	for _, words := range order {
		fmt.Fprintf(&said, ": pod %s", pods[words][0])
		if more := len(pods[words]) - 1; more > 0 {
			fmt.Fprintf(&said, " and %d more", more)
		}
		said.WriteString(": " + words)
	}
	if said.Len() == 0 && s.of != nil && s.live.updated < s.live.turn {
		if warned := tale.warning(s.of.uid, s.live.uid); warned != "" {
			return ": no pod is made: " + warned
		}
	}
	return said.String()
}

// trouble is what is wrong with a pod that is not ready.
type trouble struct {
	words    string
	hopeless bool // if it holds
	never    bool // at once
	crashes  int
}

func troubleOf(p *corev1.Pod) trouble {
	if isReady(p) {
		return trouble{words: "ready"}
	}
	if c := condition(p, corev1.PodScheduled); c != nil && c.Status == corev1.ConditionFalse {
		return trouble{words: waitForNode + c.Message}
	}
	if p.Status.Phase == corev1.PodFailed {
		return trouble{words: strings.TrimSpace(fmt.Sprintf("failed: %s %s", p.Status.Reason, p.Status.Message))}
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if t := troubleIn(p, c); t.words != "" {
			return t
		}
	}
	if p.Spec.NodeName == "" {
		return trouble{words: "waits for a node"}
	}
	return trouble{words: "its containers are being made"}
}

func troubleIn(p *corev1.Pod, c corev1.ContainerStatus) trouble {
	of := "container " + c.Name + " "
	switch {
	case c.State.Waiting != nil && c.State.Waiting.Reason == "CrashLoopBackOff":
		return trouble{words: fmt.Sprintf("%sended %d times%s", of, c.RestartCount, lastWords(c)), crashes: int(c.RestartCount)}
	case c.State.Waiting != nil && hopeless(c.State.Waiting.Reason):
		w := c.State.Waiting
		return trouble{words: of + "waits: " + w.Reason + ": " + w.Message + pullSecrets(p, w.Reason), hopeless: true, never: w.Reason == "InvalidImageName"}
	case c.State.Terminated != nil && c.State.Terminated.ExitCode != 0:
		return trouble{words: of + "ended" + lastWords(c), crashes: int(c.RestartCount)}
	case c.State.Running != nil && !c.Ready && c.RestartCount > 0:
		return trouble{words: fmt.Sprintf("%sis not ready, and ended %d times%s", of, c.RestartCount, lastWords(c)), crashes: int(c.RestartCount)}
	case c.State.Running != nil && !c.Ready:
		return trouble{words: of + "runs and is not ready"}
	}
	return trouble{}
}

// unstick deletes pods of a StatefulSet that are not ready and whose turn it is to be
// replaced: its controller waits for ever until they are ready first
// (kubernetes/kubernetes#67250). They are those that were broken before the change, and
// those of a revision that is gone back from.
func (r *roller) unstick(ctx context.Context, s sight) {
	if r.before.Kind != "statefulset" || s.of == nil {
		return
	}
	for i := range s.pods {
		p := &s.pods[i]
		stuck := r.broken[p.UID] || r.bad != nil && r.bad.has(p)
		if !stuck || p.DeletionTimestamp != nil || isReady(p) || s.of.has(p) || ordinal(p) < s.live.below {
			continue
		}
		r.say(fmt.Sprintf("pod %s is not ready and of an other revision: it is deleted, for the StatefulSet would wait for it", p.Name))
		err := r.c.deletePod(ctx, p.Name, p.UID)
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			r.say(fmt.Sprintf("pod %s could not be deleted: %v", p.Name, err))
		}
	}
}

// ordinal is the number of a pod of a StatefulSet.
func ordinal(p *corev1.Pod) int {
	n, err := strconv.Atoi(p.Name[strings.LastIndex(p.Name, "-")+1:])
	if err != nil {
		return 0
	}
	return n
}

// deletePod deletes this pod, and no other that has come by its name.
func (c *Cluster) deletePod(ctx context.Context, name string, uid types.UID) error {
	ctx, cancel := callContext(ctx)
	defer cancel()
	return c.client.CoreV1().Pods(c.Namespace).Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
}

// listen has events told from now on, until the returned end is called.
func (r *roller) listen(ctx context.Context) (end func()) {
	r.tale = &tale{}
	if !r.rights.may("watch", "", "events") || !r.rights.may("list", "", "events") {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // to put back is told as well
	var running sync.WaitGroup
	begun := make(chan struct{})
	running.Go(func() { r.c.followEvents(ctx, r.tale, sync.OnceFunc(func() { close(begun) })) })
	select { // what comes after the change must not come before the watch
	case <-begun:
	case <-time.After(askLimit):
	}
	return func() { cancel(); running.Wait() }
}

// followEvents adds what comes to a tale until ctx ends. begun is called when nothing
// will be missed any more, or when it cannot be helped.
func (c *Cluster) followEvents(ctx context.Context, t *tale, begun func()) {
	defer begun()
	events := c.client.CoreV1().Events(c.Namespace)
	for ctx.Err() == nil {
		list, err := events.List(ctx, metav1.ListOptions{Limit: 1})
		if err == nil {
			watch, werr := events.Watch(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion})
			if err = werr; err == nil {
				begun()
				stop := context.AfterFunc(ctx, watch.Stop)
				for e := range watch.ResultChan() {
					if event, ok := e.Object.(*corev1.Event); ok {
						t.add(event)
					}
				}
				stop()
				watch.Stop()
			}
		}
		if err != nil && !passing(err) || pause(ctx, lookEvery) != nil {
			return
		}
	}
}

// A tale is what the cluster has said of pods, each thing once.
type tale struct {
	mu     sync.Mutex
	told   map[types.UID]bool // events
	heard  []*corev1.Event    // whose object is not known to be of the rollout, yet
	warned map[types.UID]string
}

// taleLimit bounds what is kept of a namespace that has much to say.
const taleLimit = 2000

func (t *tale) add(e *corev1.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.heard = append(t.heard, e); len(t.heard) > taleLimit {
		t.heard = slices.Clone(t.heard[1:])
	}
}

// tell says what is new of the pods that are rolled out, and of what makes them.
func (t *tale) tell(s sight, say func(string)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	about := map[types.UID]bool{s.live.uid: true}
	for _, p := range s.fresh() {
		about[p.UID] = true
	}
	if s.of != nil {
		about[s.of.uid] = true
	}
	t.heard = slices.DeleteFunc(t.heard, func(e *corev1.Event) bool {
		known := about[e.InvolvedObject.UID]
		if known {
			t.tellOne(e, say)
		}
		return known
	})
}

func (t *tale) tellOne(e *corev1.Event, say func(string)) {
	if t.told == nil {
		t.told, t.warned = map[types.UID]bool{}, map[types.UID]string{}
	}
	warning := e.Type == corev1.EventTypeWarning
	words := e.Reason + ": " + strings.TrimSpace(e.Message)
	if warning {
		t.warned[e.InvolvedObject.UID] = words
	}
	if !t.told[e.UID] && (warning || e.InvolvedObject.Kind == "Pod") {
		say(strings.ToLower(e.InvolvedObject.Kind) + " " + e.InvolvedObject.Name + ": " + words)
	}
	t.told[e.UID] = true
}

// warning is the last one of the first object that has one.
func (t *tale) warning(of ...types.UID) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, uid := range of {
		if words := t.warned[uid]; words != "" {
			return words
		}
	}
	return ""
}
