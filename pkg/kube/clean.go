package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// CleanConfig says where Clean looks and whether it changes anything.
type CleanConfig struct {
	AllNamespaces bool
	DryRun        bool
	Progress      func(string) // a line for what takes time; may be nil
}

// Cleaned is Clean's word on one session. Its JSON form is a promise.
type Cleaned struct {
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	Owner     string   `json:"owner"`
	Living    bool     `json:"living"`
	Why       string   `json:"why"`     // it is held for living or dead
	Objects   []string `json:"objects"` // what bears its labels: "deployment/culvert-x"
	Removed   bool     `json:"removed"` // false for the living and in a dry run
}

// judged is a session before the verdict.
type judged struct {
	Cleaned
	id
	lease     *coordv1.Lease // as seen first
	watch     *watched
	services  []string   // whose traffic it took
	workloads []Workload // that it scaled to nothing
}

const (
	shortestLease = 10 * time.Second
	longestLease  = 5 * time.Minute
	defaultLease  = time.Minute

	// Somebody else may hold a router as well, and renews it within this time.
	routerLease = 2*renewEvery + 2*time.Second
)

// Clean finds what dead sessions left and removes it; it never touches a living
// one. A session is dead when its process is known to have ended on this very
// machine, when it has no root any more, or when its Lease did not change
// while we looked on for as long as the Lease lasts: so it takes that long, at
// the most, and no two clocks are compared. It returns as soon as every
// session is decided. What a dead session took is given back before anything is
// removed: a workload its pods, and a Service its own pods.
func (c *Cluster) Clean(ctx context.Context, cfg CleanConfig) ([]Cleaned, error) {
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	cases, err := c.openCases(ctx, c.scope(cfg.AllNamespaces))
	if err != nil {
		return nil, fmt.Errorf("clean: %w", err)
	}
	if err := c.watchCases(ctx, c.scope(cfg.AllNamespaces), cases, cfg.Progress); err != nil {
		return nil, fmt.Errorf("clean: %w", err)
	}
	var all []Cleaned
	var errs []error
	for _, j := range cases {
		if !j.Living && !cfg.DryRun {
			errs = append(errs, c.bury(ctx, j))
		}
		all = append(all, j.Cleaned)
	}
	return all, errors.Join(errs...)
}

// openCases finds all sessions and decides what can be decided at once. Roots
// are listed after everything else: a child that was seen had its root by then.
func (c *Cluster) openCases(ctx context.Context, namespace string) ([]*judged, error) {
	all, err := c.find(ctx, namespace, "")
	if err != nil {
		return nil, err
	}
	taken, err := c.takenServices(ctx, namespace)
	if err != nil {
		return nil, err
	}
	emptied, err := c.takenWorkloads(ctx, namespace)
	if err != nil {
		return nil, err
	}
	roots, err := c.roots(ctx, namespace)
	if err != nil {
		return nil, err
	}
	byID := map[id]*judged{}
	add := func(key id, object string) *judged {
		if byID[key] == nil {
			byID[key] = &judged{id: key, Cleaned: Cleaned{Namespace: key.namespace, Name: key.session}}
		}
		byID[key].Objects = append(byID[key].Objects, object)
		return byID[key]
	}
	for _, f := range all {
		add(id{f.namespace, f.session}, f.String())
	}
	for key, services := range taken {
		for _, name := range services {
			j := add(key, "selector of service/"+name)
			j.services = append(j.services, name)
		}
	}
	for key, workloads := range emptied {
		for _, w := range workloads {
			j := add(key, "replicas of "+w.String())
			j.workloads = append(j.workloads, w.Workload)
		}
	}
	var cases []*judged
	self, now := Self(), time.Now()
	for key, j := range byID {
		running := slices.ContainsFunc(all, func(f found) bool {
			return f.kind == "Pod" && id{f.namespace, f.session} == key && !f.leaving
		})
		j.open(roots, self, running, now)
		cases = append(cases, j)
	}
	slices.SortFunc(cases, func(a, b *judged) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return cases, nil
}

// open decides a case, or sets a watch on it.
func (j *judged) open(r roots, self Holder, running bool, now time.Time) {
	holder, known := r.holder(j.id)
	j.Owner, j.lease = holder.Owner(), r.leases[j.id]
	job := r.jobs[j.id]
	if !known && j.lease == nil && job == nil {
		j.Owner, j.Why = "", "nothing holds it any more"
		return
	}
	verdict := judgeHere(holder, self, processStart)
	if verdict == dead && j.lease != nil && isRouter(j.lease) {
		j.watch = &watched{mark: mark(j.id, r), since: now, lasts: routerLease}
		return
	}
	switch verdict {
	case dead:
		j.Why = fmt.Sprintf("its process %d on this machine has ended", holder.PID)
	case living:
		j.Living, j.Why = true, fmt.Sprintf("its process %d on this machine runs", holder.PID)
	case unknown:
		if j.lease == nil && running && !finished(job) {
			j.Living, j.Why = true, "its shadow runs, and ends itself when the laptop is silent"
			return
		}
		j.watch = &watched{mark: mark(j.id, r), since: now, lasts: lasts(j.lease)}
	}
}

// takenServices are those whose traffic goes to a router, or whose annotation
// says so, by session. Who may not list Services has taken none.
func (c *Cluster) takenServices(ctx context.Context, namespace string) (map[id][]string, error) {
	taken := map[id][]string{}
	_, err := c.services(namespace).each(ctx, func(o runtime.Object) bool {
		raw, ok := o.(*corev1.Service)
		if !ok || raw.Labels[labelManaged] == managed {
			return true
		}
		mark, _ := heal.ParseMark(raw.Annotations[heal.Annotation])
		sessions := []string{mark.Session, raw.Spec.Selector[heal.Label]}
		for _, session := range slices.Compact(sessions) {
			if sessionName.MatchString(session) {
				key := id{raw.Namespace, session}
				taken[key] = append(taken[key], raw.Name)
			}
		}
		return true
	})
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, fmt.Errorf("look for exchanged services: %w", sorted(err))
	}
	return taken, nil
}

// mark changes whenever the root does.
func mark(key id, r roots) string {
	var text string
	if lease := r.leases[key]; lease != nil {
		text = lease.ResourceVersion
	} else if job := r.jobs[key]; job != nil {
		text = "job " + job.ResourceVersion
	}
	return text
}

func lasts(lease *coordv1.Lease) time.Duration {
	if lease == nil || lease.Spec.LeaseDurationSeconds == nil {
		return defaultLease
	}
	return min(max(time.Duration(*lease.Spec.LeaseDurationSeconds)*time.Second, shortestLease), longestLease)
}

func finished(job *batchv1.Job) bool {
	return job != nil && slices.ContainsFunc(job.Status.Conditions, func(c batchv1.JobCondition) bool {
		return (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) && c.Status == corev1.ConditionTrue
	})
}

// watchCases looks on until every case is decided.
func (c *Cluster) watchCases(ctx context.Context, namespace string, cases []*judged, progress func(string)) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for said := false; ; said = true {
		open := 0
		for _, j := range cases {
			if j.watch != nil {
				open++
			}
		}
		if open == 0 {
			return nil
		}
		if !said {
			progress(fmt.Sprintf("watching %d sessions of other machines for signs of life", open))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		now, err := c.roots(ctx, namespace)
		if err != nil {
			return err
		}
		for _, j := range cases {
			j.look(now, time.Now())
		}
	}
}

// look decides a watched case as soon as there is something to tell.
func (j *judged) look(r roots, now time.Time) {
	if j.watch == nil {
		return
	}
	seen := mark(j.id, r)
	verdict := j.watch.see(seen, now)
	switch {
	case seen == "":
		j.watch, j.Why = nil, "nothing holds it any more"
	case verdict == living:
		j.watch, j.Living, j.Why = nil, true, "its lease is being renewed"
	case verdict == dead:
		j.Why = fmt.Sprintf("its lease was not renewed for %v", j.watch.lasts)
		j.watch = nil
	}
}

// bury removes a dead session. The Lease goes first, and only if it still is as
// it was when it was judged: a laptop that comes back at this moment wins.
func (c *Cluster) bury(ctx context.Context, j *judged) error {
	if renewed, err := c.giveBack(ctx, j); renewed || err != nil {
		return err
	}
	if j.lease != nil {
		err := c.client.CoordinationV1().Leases(j.Namespace).Delete(ctx, j.lease.Name, metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{UID: &j.lease.UID, ResourceVersion: &j.lease.ResourceVersion},
		})
		switch {
		case apierrors.IsConflict(err):
			j.renewed()
			return nil
		case err != nil && !apierrors.IsNotFound(err):
			return fmt.Errorf("delete lease %s in namespace %s: %w", j.lease.Name, j.Namespace, sorted(err))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, deleteLimit)
	defer cancel()
	if err := c.sweep(ctx, j.Namespace, j.Name); err != nil {
		return fmt.Errorf("clean session %s in namespace %s: %w", j.Name, j.Namespace, err)
	}
	j.Removed = true
	return nil
}

func (j *judged) renewed() { j.Living, j.Why = true, "its lease was renewed at the last moment" }

// giveBack restores what the session took, unless it is being renewed.
func (c *Cluster) giveBack(ctx context.Context, j *judged) (renewed bool, err error) {
	if len(j.services)+len(j.workloads) == 0 {
		return false, nil
	}
	if j.lease != nil {
		now, err := c.client.CoordinationV1().Leases(j.Namespace).Get(ctx, j.lease.Name, metav1.GetOptions{})
		if err == nil && now.ResourceVersion != j.lease.ResourceVersion {
			j.renewed()
			return true, nil
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return false, fmt.Errorf("get lease %s in namespace %s: %w", j.lease.Name, j.Namespace, sorted(err))
		}
	}
	for _, w := range j.workloads {
		if _, err := c.restoreWorkload(ctx, j.Namespace, w, j.Name); err != nil {
			return false, fmt.Errorf("%w: %w", ErrLeft, err)
		}
	}
	original, err := c.siblingSelector(ctx, j.Namespace, j.Name)
	if err != nil {
		return false, fmt.Errorf("get service %s in namespace %s: %w", rootName(j.Name), j.Namespace, sorted(err))
	}
	for _, name := range j.services {
		changed, err := c.restore(ctx, j.Namespace, name, j.Name, original)
		if err != nil {
			return false, fmt.Errorf("%w: %w", ErrLeft, err)
		}
		if changed {
			c.awaitOriginals(ctx, j.Namespace, name, j.Name)
		}
	}
	return false, nil
}
