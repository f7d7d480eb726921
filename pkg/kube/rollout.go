package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// rollLimit is how long pods may take where nobody says.
const rollLimit = 5 * time.Minute

// A RollOutConfig is one change of one workload: either Image or Env.
type RollOutConfig struct {
	Target    Target // a deployment, statefulset or daemonset
	Container string // whose image or variable; "" is the only one
	Image     string
	Env       string        // NAME=VALUE
	Within    time.Duration // for all the new pods to be available, and as long again to go back; 0 is 5 minutes
	As, By    string        // the release's name and who rolls it out, to be written on the revision; may be ""
	Say       func(string)  // is told what happens, a line at a time; may be nil

	// Planned, if set, was made before, perhaps elsewhere: this rollout has to be that. Of it
	// Base, What, From, To and Set are asked.
	Planned *RollOutPlan
}

// A RollOutPlan is what a rollout would change. Making it changes nothing.
type RollOutPlan struct {
	Target    Target
	Container string
	What      string // "image", or the name of a variable
	From, To  string
	Set       bool // From is there: a variable need not be
	Same      bool // To is what it has already
	Pods      int  // that would be new
	Revision  string
	Base      string   // a digest of the workload and all of its template but From
	Notices   []string // a line for each thing that will be less good

	before *rolled
	ops    []heal.Op
	rights *Rights
}

// RolledOut is what a rollout or a rollback led to.
type RolledOut struct {
	Changed bool   // the workload has another template than before
	PutBack bool   // it had one, and has its old one again
	Runs    string // what runs now, in words
}

// PlanRollOut finds what would change and asks for the rights. ErrNoTarget is that
// there is no such workload or container, ErrForbidden that a right is missing.
func (c *Cluster) PlanRollOut(ctx context.Context, cfg RollOutConfig) (*RollOutPlan, error) {
	plan, err := c.planRollOut(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("plan the rollout of %s in namespace %s: %w", cfg.Target, c.Namespace, noTarget(err))
	}
	return plan, nil
}

func (c *Cluster) planRollOut(ctx context.Context, cfg RollOutConfig) (*RollOutPlan, error) {
	if (cfg.Image == "") == (cfg.Env == "") {
		return nil, errors.New("either an image or a variable is set")
	}
	rights, err := c.rollOutRights(ctx, cfg.Target.Kind)
	if err != nil {
		return nil, err
	}
	before, err := c.getRolled(ctx, cfg.Target)
	if err != nil {
		return nil, err
	}
	plan := &RollOutPlan{Target: cfg.Target, Pods: before.turn, Notices: rights.Notices, before: before, rights: rights}
	if err := plan.change(cfg); err != nil {
		return nil, err
	}
	if plan.Base, err = plan.base(cfg.Image != ""); err != nil {
		return nil, err
	}
	if err := plan.is(cfg.Planned); err != nil {
		return nil, err
	}
	if before.frozen != "" && !plan.Same {
		return nil, fmt.Errorf("%s: its pods would stay as they are", before.frozen)
	}
	if all, err := c.revisions(ctx, before); err == nil {
		if i := currentOf(before, all); i >= 0 {
			plan.Revision = all[i].words()
		}
	} else if passing(err) {
		return nil, err
	}
	if before.turn < before.wanted {
		plan.Notices = append(plan.Notices, fmt.Sprintf("its partition keeps %d of %d pods as they are", before.wanted-before.turn, before.wanted))
	}
	if before.wanted == 0 {
		plan.Notices = append(plan.Notices, "it has no pods: nothing will show whether the new ones would run")
	}
	return plan, nil
}

// noTarget is sorted, for a call that asks for one thing by its name.
func noTarget(err error) error {
	if apierrors.IsNotFound(err) && !errors.Is(err, ErrNamespace) {
		return fmt.Errorf("%w: %w", ErrNoTarget, err)
	}
	return sorted(err)
}

// change finds the container, what it has, and the patch.
func (p *RollOutPlan) change(cfg RollOutConfig) error {
	path, container, err := rolledContainer(&p.before.template.Spec, cfg.Container)
	if err != nil {
		return err
	}
	p.Container = container.Name
	if cfg.Image != "" {
		p.What, p.From, p.To, p.Set = "image", container.Image, cfg.Image, true
		p.Same = p.From == p.To
		p.ops = []heal.Op{{Op: "replace", Path: path + "/image", Value: cfg.Image}}
		return nil
	}
	name, value, both := strings.Cut(cfg.Env, "=")
	if !both || name == "" {
		return fmt.Errorf("variable %q is not NAME=VALUE", cfg.Env)
	}
	p.What, p.To = name, value
	return p.changeEnv(path, container.Env)
}

func (p *RollOutPlan) changeEnv(path string, have []corev1.EnvVar) error {
	set := corev1.EnvVar{Name: p.What, Value: p.To}
	i := slices.IndexFunc(have, func(v corev1.EnvVar) bool { return v.Name == p.What })
	switch {
	case i >= 0 && have[i].ValueFrom != nil:
		return fmt.Errorf("variable %s of container %s comes from elsewhere (valueFrom)", p.What, p.Container)
	case i >= 0:
		p.From, p.Set, p.Same = have[i].Value, true, have[i].Value == p.To
		p.ops = []heal.Op{{Op: "replace", Path: fmt.Sprintf("%s/env/%d", path, i), Value: set}}
	case len(have) == 0:
		p.ops = []heal.Op{{Op: "add", Path: path + "/env", Value: []corev1.EnvVar{set}}}
	default:
		p.ops = []heal.Op{{Op: "add", Path: path + "/env/-", Value: set}}
	}
	return nil
}

// base is the same before a rollout and after it, for as long as nobody changes anything
// else of the template.
func (p *RollOutPlan) base(ofImage bool) (string, error) {
	template := p.before.template.DeepCopy()
	_, container, err := rolledContainer(&template.Spec, p.Container)
	if err != nil {
		return "", err
	}
	if ofImage {
		container.Image = ""
	} else {
		container.Env = slices.DeleteFunc(container.Env, func(v corev1.EnvVar) bool { return v.Name == p.What })
	}
	text, err := json.Marshal(template)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %s", p.before.uid, p.Container, text))
	return hex.EncodeToString(sum[:]), nil
}

// is tells whether a plan is what another was, nil for none. That was begun already where
// the workload has what it would set.
func (p *RollOutPlan) is(other *RollOutPlan) error {
	switch {
	case other == nil:
		return nil
	case p.What != other.What || p.To != other.To:
		return fmt.Errorf("%s=%s was planned, and not %s=%s: plan again", other.What, other.To, p.What, p.To)
	case p.Base != other.Base:
		return errors.New("its template is not what it was when that was planned: plan again")
	case p.Same, p.From == other.From && p.Set == other.Set:
		return nil
	}
	return fmt.Errorf("its %s was %s when that was planned, and is %s now: plan again", p.What, quoted(other), quoted(p))
}

// rolledContainer finds one by name, and where a JSON patch finds it.
func rolledContainer(pod *corev1.PodSpec, name string) (path string, found *corev1.Container, err error) {
	var names []string
	for i := range pod.Containers {
		names = append(names, pod.Containers[i].Name)
		if c := &pod.Containers[i]; c.Name == name || name == "" && len(pod.Containers) == 1 {
			return fmt.Sprintf("/spec/template/spec/containers/%d", i), c, nil
		}
	}
	for i := range pod.InitContainers {
		if c := &pod.InitContainers[i]; name != "" && c.Name == name {
			return fmt.Sprintf("/spec/template/spec/initContainers/%d", i), c, nil
		}
	}
	if name == "" {
		return "", nil, fmt.Errorf("%w: it has several containers, name one: %s", ErrNoTarget, strings.Join(names, ", "))
	}
	return "", nil, fmt.Errorf("%w: no container %q, there are %s", ErrNoTarget, name, strings.Join(names, ", "))
}

// RollOut changes a workload and waits until all its new pods are available. If they
// are not within the time, or can never be, or ctx ends, the workload gets the
// template that it had before, and that is waited for as well; the error then says
// what was wrong with the new pods and what runs now. It is ErrNotBack where even that
// could not be had. A workload that has the image already is left as it is, but
// waited for.
//
// What others change meanwhile stays, except that a template of somebody else's ends
// the rollout and is not replaced. The same line again goes on where one was killed.
func (c *Cluster) RollOut(ctx context.Context, cfg RollOutConfig) (RolledOut, error) {
	plan, err := c.PlanRollOut(ctx, cfg)
	if err != nil {
		return RolledOut{}, err
	}
	r := c.newRoller(plan.before, plan.rights, cfg.Within, cfg.Say)
	r.as, r.by = cfg.As, cfg.By
	if plan.Same {
		err = r.resume(ctx, fmt.Sprintf("%s of container %s is %s already: nothing is changed", plan.What, plan.Container, plan.To))
	} else {
		r.say(fmt.Sprintf("%s: %s of container %s from %s to %s", cfg.Target, plan.What, plan.Container, quoted(plan), plan.To))
		err = r.roll(ctx, plan.ops)
	}
	if err != nil {
		return r.done, fmt.Errorf("roll out %s in namespace %s: %w", cfg.Target, c.Namespace, sorted(err))
	}
	return r.done, nil
}

func quoted(p *RollOutPlan) string {
	if !p.Set {
		return "nothing"
	}
	return cmp.Or(p.From, `""`)
}

// A RollBackConfig says which revision a workload gets again.
type RollBackConfig struct {
	Target Target
	To     string // its number, its own name, or that of its release; "" is the newest good one before
	Within time.Duration
	By     string
	Say    func(string)
}

// PlanRollBack chooses the revision that RollBack would lead to.
func (c *Cluster) PlanRollBack(ctx context.Context, t Target, to string) (now, then *Revision, err error) {
	all, err := c.Revisions(ctx, t)
	if err != nil {
		return nil, nil, err
	}
	then, err = goBack(all, to)
	if err != nil {
		return nil, nil, fmt.Errorf("roll back %s in namespace %s: %w", t, c.Namespace, err)
	}
	return &all[slices.IndexFunc(all, func(r Revision) bool { return r.Current })], then, nil
}

// RollBack gives a workload the template of an earlier revision, with the same care
// as RollOut has. What was gone back from is no longer good.
func (c *Cluster) RollBack(ctx context.Context, cfg RollBackConfig) (RolledOut, error) {
	fail := func(err error) error {
		return fmt.Errorf("roll back %s in namespace %s: %w", cfg.Target, c.Namespace, noTarget(err))
	}
	rights, err := c.rollOutRights(ctx, cfg.Target.Kind)
	if err != nil {
		return RolledOut{}, fail(err)
	}
	now, then, err := c.PlanRollBack(ctx, cfg.Target, cfg.To)
	if err != nil {
		return RolledOut{}, err
	}
	before, err := c.getRolled(ctx, cfg.Target)
	if err != nil {
		return RolledOut{}, fail(err)
	}
	if before.frozen != "" {
		return RolledOut{}, fail(fmt.Errorf("%s: its pods would stay as they are", before.frozen))
	}
	r := c.newRoller(before, rights, cfg.Within, cfg.Say)
	r.by, r.leaves = cfg.By, true
	if then.Mark != nil {
		r.as = then.Mark.As
	}
	if then.Current {
		err = r.resume(ctx, fmt.Sprintf("%s is the current one already: nothing is changed", then.words()))
	} else {
		r.say(fmt.Sprintf("%s: from %s to %s", cfg.Target, now.words(), then.words()))
		err = r.roll(ctx, []heal.Op{{Op: "replace", Path: "/spec/template", Value: then.template}})
	}
	if err != nil {
		return r.done, fail(err)
	}
	return r.done, nil
}

// A roller is one change of a template, watched.
type roller struct {
	c      *Cluster
	rights *Rights
	within time.Duration
	say    func(string)
	as, by string
	leaves bool // what ran before is good no more, once this has done well

	before *rolled
	from   *Revision              // what ran before; nil where it is not known
	broken map[types.UID]bool     // pods that were not ready before
	ours   corev1.PodTemplateSpec // that was set
	of     *Revision              // that ours is, once that is known
	bad    *Revision              // that is gone back from
	tale   *tale
	done   RolledOut
}

func (c *Cluster) newRoller(before *rolled, rights *Rights, within time.Duration, say func(string)) *roller {
	if say == nil {
		say = func(string) {}
	}
	return &roller{c: c, rights: rights, before: before, within: cmp.Or(within, rollLimit), say: say}
}

var (
	errMeanwhile = errors.New("somebody else changed its template meanwhile, which stays")
	errStays     = errors.New("the new pods will not get better")
)

// resume waits for a change that was made before: perhaps by who did not live to see how
// it went.
func (r *roller) resume(ctx context.Context, same string) error {
	r.say(same)
	if r.before.whole() {
		return r.good(ctx)
	}
	r.say("but not all of it is there: " + r.before.words())
	r.ours = r.before.template
	defer r.listen(ctx)()
	err := r.watch(ctx, sight.whole)
	if err == nil {
		return r.good(ctx)
	}
	if ctx.Err() == nil && r.adopt(ctx) {
		return r.putBack(ctx, err)
	}
	return fmt.Errorf("%w; it was rolled out before, and there is nothing of this time's to be put back", err)
}

// adopt takes the newest good revision for what ran before, if what runs now has never
// been good.
func (r *roller) adopt(ctx context.Context) bool {
	all, err := r.c.revisions(ctx, r.before)
	if err != nil || r.leaves {
		return false
	}
	now := currentOf(r.before, all)
	then, err := goBack(all, "")
	if err != nil || then.Mark == nil || all[now].Mark != nil && all[now].Mark.Good {
		return false
	}
	before := *r.before
	before.template, before.seen, before.total, before.updated, before.available = then.template, true, before.wanted, before.turn, before.wanted
	r.before, r.from = &before, then
	return true
}

func (r *roller) roll(ctx context.Context, ops []heal.Op) error {
	if err := r.record(ctx); err != nil {
		return err
	}
	defer r.listen(ctx)()
	// Above this line all fails for free, below it things change.
	if err := r.change(ctx, r.before.template, ops); err != nil {
		return err
	}
	r.done.Changed = true
	err := r.watch(ctx, sight.whole)
	switch {
	case err == nil:
		return r.good(ctx)
	case errors.Is(err, errMeanwhile), apierrors.IsNotFound(err):
		r.done.Runs = "what somebody else wants"
		return err
	}
	return r.putBack(ctx, err)
}

// record remembers what runs before anything is changed: to be gone back to, and as
// good if all of it is there.
func (r *roller) record(ctx context.Context) error {
	all, err := r.c.revisions(ctx, r.before)
	if err != nil {
		return err
	}
	if i := currentOf(r.before, all); i >= 0 {
		r.from = &all[i]
	}
	if r.from != nil && r.from.Mark == nil && r.before.whole() && r.before.wanted > 0 {
		r.write(ctx, r.from, Mark{Good: true})
	}
	pods, err := r.c.podsRolled(ctx, r.before)
	if err != nil {
		return err
	}
	r.broken = map[types.UID]bool{}
	for i := range pods {
		r.broken[pods[i].UID] = !isReady(&pods[i])
	}
	return nil
}

// write marks a revision, where that is permitted; it is no reason to fail.
func (r *roller) write(ctx context.Context, revision *Revision, m Mark) {
	if !r.rights.may("patch", "apps", keeper(r.before.Kind)) {
		return
	}
	if err := r.c.mark(ctx, r.before.Target, revision, m); err != nil {
		r.say(fmt.Sprintf("%s could not be marked: %v", revision.words(), err))
	}
}

// change patches the version that has the template it was made for.
func (r *roller) change(ctx context.Context, made corev1.PodTemplateSpec, ops []heal.Op) error {
	return tried(conflicts, func() error {
		live, err := r.c.getRolled(ctx, r.before.Target)
		if err != nil {
			return err
		}
		if !sameTemplate(live.template, made) {
			return errMeanwhile
		}
		live, err = r.c.patchRolled(ctx, live, ops)
		if err == nil {
			r.ours = live.template
		}
		return err
	})
}

// good marks what runs now.
func (r *roller) good(ctx context.Context) error {
	ctx, cancel := callContext(ctx)
	defer cancel()
	live, now, err := r.now(ctx)
	if err != nil {
		return err
	}
	r.done.Runs = live.words()
	if now == nil {
		return nil
	}
	r.done.Runs = now.words() + ", " + live.words()
	if live.wanted > 0 { // else nothing showed it
		mark := Mark{Good: true, As: r.as, By: r.by}
		if old := now.Mark; old != nil && !r.done.Changed { // nothing new is known of it
			mark.As, mark.By = cmp.Or(mark.As, old.As), cmp.Or(old.By, mark.By)
		}
		r.write(ctx, now, mark)
	}
	if r.leaves && r.from != nil && r.from.Name != now.Name {
		mark := Mark{By: r.by}
		if r.from.Mark != nil {
			mark.As = r.from.Mark.As
		}
		r.write(ctx, r.from, mark)
	}
	return nil
}

// now is the workload and its revision as they are.
func (r *roller) now(ctx context.Context) (*rolled, *Revision, error) {
	live, err := r.c.getRolled(ctx, r.before.Target)
	if err != nil {
		return nil, nil, err
	}
	all, err := r.c.revisions(ctx, live)
	if err != nil {
		return nil, nil, err
	}
	if i := currentOf(live, all); i >= 0 {
		return live, &all[i], nil
	}
	return live, nil, nil
}

// putBack gives the workload its template again, whatever has become of ctx, and
// waits until as much of it is there as was.
func (r *roller) putBack(ctx context.Context, why error) error {
	ctx = context.WithoutCancel(ctx)
	r.say(fmt.Sprintf("%v: going back to %s", why, r.fromWords()))
	if r.bad, r.of = r.of, nil; r.bad != nil {
		r.write(ctx, r.bad, Mark{As: r.as, By: r.by})
	}
	err := r.back(ctx)
	if err == nil {
		r.done.Changed, r.done.PutBack = false, true
		err = r.watch(ctx, r.sufficient)
	}
	switch {
	case errors.Is(err, errMeanwhile):
		r.done.Runs = "what somebody else wants"
		return fmt.Errorf("%w; %w", why, err)
	case err != nil && !r.done.PutBack:
		r.done.Runs = "the new template, which is not good"
		return fmt.Errorf("%w; %w: %w", why, ErrNotBack, err)
	case err != nil:
		r.done.Runs = r.fromWords() + ", but not as it did before"
		return fmt.Errorf("%w; %w, although it has %s again: %w", why, ErrNotBack, r.fromWords(), err)
	}
	r.done.Runs = r.fromWords()
	if live, now, err := r.now(ctx); err == nil && now != nil {
		r.done.Runs = now.words() + ", " + live.words()
	}
	return fmt.Errorf("%w; it was put back and runs %s", why, r.done.Runs)
}

// sufficient tells whether as much is there as was before: what was broken already
// must not be what a way back waits for.
func (r *roller) sufficient(s sight) bool {
	if r.before.whole() {
		return s.whole()
	}
	left := r.bad != nil && slices.ContainsFunc(s.pods, func(p corev1.Pod) bool { return p.DeletionTimestamp == nil && r.bad.has(&p) })
	return s.live.seen && !left && s.live.updated >= min(s.live.turn, r.before.updated) && s.live.available >= min(s.live.wanted, r.before.available)
}

// wasBroken tells that what is gone back to did not run either: its pods have the time
// that there is.
func (r *roller) wasBroken() bool { return r.done.PutBack && !r.before.whole() }

// back sets the old template, also past an API server that is away for a while.
func (r *roller) back(ctx context.Context) error {
	for end := time.Now().Add(r.within); ; {
		err := r.change(ctx, r.ours, []heal.Op{{Op: "replace", Path: "/spec/template", Value: r.before.template}})
		if err == nil || errors.Is(err, errMeanwhile) || !passing(err) || time.Now().After(end) {
			return err
		}
		if err := pause(ctx, lookEvery); err != nil {
			return err
		}
	}
}

func (r *roller) fromWords() string {
	if r.from == nil {
		return "what ran before (" + strings.Join(images(r.before.template), ", ") + ")"
	}
	return r.from.words()
}
