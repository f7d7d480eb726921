package rollouts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/consul"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

const (
	wholeRollout = 10 * time.Minute // of a workload, where the file does not say
	onePod       = 2 * time.Minute  // of a restart, likewise
)

// A workload is what an environment has in place of hosts.
type workload struct {
	deploy.K8s
	cluster *kube.Cluster
	target  kube.Target
}

// workload is to be closed.
func (a *app) workload(p *project) (*workload, error) {
	w := &workload{K8s: *p.settings.K8s}
	var err error
	if w.target, err = kube.ParseWorkload(w.Workload); err != nil {
		return nil, talk.Usage(err)
	}
	w.cluster, err = a.cluster(w.Context, w.Namespace)
	return w, err
}

func (w *workload) name() string { return w.target.String() }

func (w *workload) within() time.Duration { return cmp.Or(time.Duration(w.Within), wholeRollout) }

// wants is what is set, in a line.
func (w *workload) wants() string { return cmp.Or(w.Image, w.Env) }

// fill names the release in the places that ask for it.
func (w *workload) fill(id, commit string) error {
	if w.Image == "" && w.Env == "" {
		return talk.Usage(errors.New("k8s names neither an image nor an env to set: there is nothing to deploy"))
	}
	if commit == "" && strings.Contains(w.wants(), "${COMMIT") {
		return talk.Usage(errors.New("which commit this is could not be found out: name it with --commit"))
	}
	w.K8s = w.Fill(commit, id)
	return nil
}

func (a *app) deployK8s(ctx context.Context, o deployOptions, p *project, planned *deploy.Plan) error {
	if len(o.to) > 0 {
		return talk.Usage(errors.New("--to is of hosts"))
	}
	w, err := a.workload(p)
	if err != nil {
		return err
	}
	defer w.cluster.Close()
	defer talk.OutliveReaders()()
	id := strings.TrimSuffix(deploy.NewID(time.Now(), o.commit), "-")
	if planned != nil {
		if err := planned.Holds(p.file.App, p.settings, nil); err != nil {
			return err
		}
		id = planned.Release
	}
	if err := w.fill(id, o.commit); err != nil {
		return err
	}
	steps := a.Steps()
	cfg := kube.RollOutConfig{
		Target: w.target, Container: w.Container, Image: w.Image, Env: w.Env,
		Within: w.within(), As: id, By: deploy.Who(), Say: steps.Say, Planned: rollOutOf(planned),
	}
	plan, err := w.cluster.PlanRollOut(ctx, cfg)
	if err != nil {
		return err
	}
	for _, line := range plan.Notices {
		steps.Warn(line)
	}
	if o.plan {
		return a.tellRollOut(o, deploy.DraftWorkload(p.file.App, p.env, p.settings, id, o.commit, deploy.PlanWorkload{
			Workload: w.name(), Namespace: w.cluster.Namespace, Container: plan.Container, Sets: plan.What, From: plan.From, Set: plan.Set,
			To: plan.To, Unchanged: plan.Same, Runs: plan.Revision, Base: plan.Base, Pods: plan.Pods, Notices: plan.Notices,
		}))
	}
	report := a.report(p, "deploy", id, o.commit)
	steps.Begin(fmt.Sprintf("roll %s out", w.name()))
	done, err := w.cluster.RollOut(ctx, cfg)
	row := deploy.Row{Host: w.name(), Before: was(plan), Release: was(plan), State: state(done, deploy.Deployed, err)}
	if done.Changed {
		row.Release = w.wants()
	}
	return a.concludeK8s(ctx, o.options, p, report, row, done.Runs, err)
}

// rollOutOf is what a plan's file has of a rollout; nil where there is none.
func rollOutOf(p *deploy.Plan) *kube.RollOutPlan {
	if p == nil {
		return nil
	}
	w := p.Workload
	return &kube.RollOutPlan{What: w.Sets, From: w.From, Set: w.Set, To: w.To, Base: w.Base}
}

// was is what a workload has of what a plan sets.
func was(plan *kube.RollOutPlan) string {
	switch {
	case plan.What == "image":
		return plan.From
	case !plan.Set:
		return "" // no variable
	}
	return plan.What + "=" + plan.From
}

func state(done kube.RolledOut, well string, err error) string {
	switch {
	case errors.Is(err, kube.ErrNotBack):
		return deploy.Broken
	case err != nil && done.PutBack:
		return deploy.Restored
	case err != nil:
		return deploy.Failed
	case !done.Changed:
		return deploy.Unchanged
	}
	return well
}

// tellRollOut prints what would be done.
func (a *app) tellRollOut(o deployOptions, plan *deploy.Plan) error {
	if err := o.write(plan); err != nil {
		return err
	}
	if o.json {
		return printJSON(a.Out, plan)
	}
	out, w := tabwriter.NewWriter(a.Out, 0, 0, 3, ' ', 0), plan.Workload
	fmt.Fprintln(out, "WORKLOAD\tNAMESPACE\tRUNS\tSET\tFROM\tTO\tPODS")
	to := w.To
	if w.Unchanged {
		to += " (nothing to do)"
	}
	fmt.Fprintf(out, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", w.Workload, w.Namespace, cell(w.Runs), cell(w.Container+" "+w.Sets), cell(w.From), cell(to), w.Pods)
	return out.Flush()
}

func (a *app) report(p *project, action, id, commit string) *deploy.Report {
	return &deploy.Report{App: p.file.App, Env: p.env, Action: action, Release: id, Commit: commit, Who: deploy.Who(), Began: time.Now()}
}

// concludeK8s tells what became of a workload, here and to whom the file names.
func (a *app) concludeK8s(ctx context.Context, o options, p *project, report *deploy.Report, row deploy.Row, runs string, err error) error {
	a.over(row, runs, err)
	return a.told(ctx, o, p, report, row, err)
}

// over ends the step that a workload was at.
func (a *app) over(row deploy.Row, runs string, err error) {
	if err != nil {
		a.Steps().Fail()
		return
	}
	a.Steps().Done(strings.TrimSuffix(row.Host+": "+row.State+", "+runs, ", "))
}

// told prints the report, and has it told to whom the file names.
func (a *app) told(ctx context.Context, o options, p *project, report *deploy.Report, row deploy.Row, err error) error {
	if err != nil {
		row.Error, report.Error = err.Error(), err.Error()
	}
	report.Ended, report.Done, report.Hosts = time.Now(), err == nil, []deploy.Row{row}
	print := func() error { return printReport(a.Out, report.Hosts) }
	if o.json {
		print = func() error { return printJSON(a.Out, report) }
	}
	if printed := print(); printed != nil {
		return errors.Join(err, printed)
	}
	if failed := p.file.Notify(ctx, p.settings, report); failed != nil {
		a.Steps().Warn(failed.Error())
	}
	return err
}

func (a *app) rollbackK8s(ctx context.Context, o options, p *project, id string, plan bool) error {
	w, err := a.workload(p)
	if err != nil {
		return err
	}
	defer w.cluster.Close()
	defer talk.OutliveReaders()()
	now, then, err := w.cluster.PlanRollBack(ctx, w.target, id)
	if err != nil {
		return err
	}
	row := deploy.Row{Host: w.name(), Before: revision(now), Release: revision(now), State: deploy.Untouched}
	if plan {
		row.Error = "would go back to " + revision(then)
		if o.json {
			return printJSON(a.Out, []deploy.Row{row})
		}
		return printReport(a.Out, []deploy.Row{row})
	}
	report, steps := a.report(p, "rollback", id, ""), a.Steps()
	steps.Begin(fmt.Sprintf("roll %s back", w.name()))
	// The one that was chosen is named: another may be the newest by now.
	done, err := w.cluster.RollBack(ctx, kube.RollBackConfig{Target: w.target, To: then.Name, Within: w.within(), By: deploy.Who(), Say: steps.Say})
	row.State = state(done, deploy.RolledBack, err)
	if done.Changed {
		row.Release = revision(then)
	}
	return a.concludeK8s(ctx, o, p, report, row, done.Runs, err)
}

// revision is one as a table has it.
func revision(r *kube.Revision) string {
	text := strconv.FormatInt(r.Number, 10) + " (" + strings.Join(r.Images, ", ") + ")"
	if r.Mark != nil && r.Mark.As != "" {
		return r.Mark.As + ", " + text
	}
	return text
}

// releasesK8s lists the revisions that the cluster keeps.
func (a *app) releasesK8s(ctx context.Context, o options, p *project) error {
	w, err := a.workload(p)
	if err != nil {
		return err
	}
	defer w.cluster.Close()
	all, err := w.cluster.Revisions(ctx, w.target)
	if err != nil {
		return err
	}
	if o.json {
		return printJSON(a.Out, all)
	}
	out := tabwriter.NewWriter(a.Out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(out, "REVISION\tRELEASE\tIMAGES\tWHEN\tWHO\tSTATE")
	for _, r := range all {
		mark, when, state := kube.Mark{}, r.Made, "unknown"
		if r.Mark != nil {
			mark, when, state = *r.Mark, r.Mark.At, map[bool]string{true: "good", false: "bad"}[r.Mark.Good]
		}
		if r.Current {
			state = "live, " + state
		}
		fmt.Fprintf(out, "%d\t%s\t%s\t%s\t%s\t%s\n", r.Number, cell(mark.As), cell(strings.Join(r.Images, " ")), when.UTC().Format(time.DateTime), cell(mark.By), state)
	}
	return out.Flush()
}

func (a *app) restartK8s(ctx context.Context, o options, p *project) error {
	w, err := a.workload(p)
	if err != nil {
		return err
	}
	defer w.cluster.Close()
	defer talk.OutliveReaders()()
	g, err := w.gate(p.settings.Health)
	if err != nil {
		return err
	}
	plan, err := w.cluster.PlanRestart(ctx, w.target)
	if err != nil {
		return err
	}
	steps := a.Steps()
	for _, line := range plan.Notices {
		steps.Warn(line)
	}
	name := fmt.Sprintf("restart %s, one by one of %d", w.name(), len(plan.Pods))
	report, row := a.report(p, "restart", "", ""), deploy.Row{Host: w.name(), State: deploy.Failed}
	err = a.through(ctx, w, g, plan, name, func(ctx context.Context) error {
		err := a.restart(ctx, w, p.settings, g)
		if err == nil {
			row.State = deploy.Restarted
		}
		a.over(row, count(len(plan.Pods), "pod"), err)
		return err
	})
	return a.told(ctx, o, p, report, row, err)
}

// through restarts with a gate that is in the cluster's network or, where that cannot be had,
// asks by port-forward.
func (a *app) through(ctx context.Context, w *workload, g *gate, plan *kube.RestartPlan, name string, restart func(context.Context) error) error {
	steps := a.Steps()
	if g == nil {
		steps.Begin(name)
		return restart(ctx)
	}
	const other = "the gate goes by port-forward, to which a pod answers that nobody else reaches"
	far := session.FarEnd{Image: a.image, Grace: time.Minute}
	began, err := session.Inside(ctx, session.TunnelConfig{Cluster: w.cluster, FarEnd: far, Reporter: steps, Log: a.Logger()}, name, func(ctx context.Context, far channel.Network) error {
		g.far = far
		if err := g.shutOff(ctx, plan.Ready()); err != nil {
			steps.Warn(fmt.Sprintf("%s: %v", other, err))
			g.far = nil
		}
		return restart(ctx)
	})
	if began || ctx.Err() != nil || errors.Is(err, session.ErrLeft) {
		return err
	}
	steps.Fail()
	steps.Warn(fmt.Sprintf("%s: %v", other, err))
	steps.Begin(name)
	return restart(ctx)
}

func (a *app) restart(ctx context.Context, w *workload, s deploy.Settings, g *gate) error {
	within := onePod
	if h := s.Health; h != nil && h.Within > 0 {
		within = time.Duration(h.Within)
	}
	var ask func(context.Context, kube.RunningPod) error
	if g != nil {
		ask = g.ask
	}
	if s.Drain != nil {
		return a.restartByConsul(ctx, w, s.Drain, within, ask)
	}
	return w.cluster.RestartPods(ctx, kube.RestartConfig{Target: w.target, Within: within, Gate: ask, Say: a.Steps().Say})
}

// restartByConsul has the instances of Consul's registry restarted, each of which is a
// pod of the workload.
func (a *app) restartByConsul(ctx context.Context, w *workload, d *deploy.Drain, within time.Duration, ask func(context.Context, kube.RunningPod) error) error {
	if d.Consul == "" {
		return talk.Usage(errors.New("the pods of a workload are drained by consul, or by Kubernetes itself; cmd and http are of hosts"))
	}
	registry, err := consul.New(consul.Config{})
	if err != nil {
		return err
	}
	cfg := consul.RollConfig{
		Service: d.Consul, Drain: true, Pause: time.Duration(d.Wait), Within: within, Say: a.Steps().Say,
		Restart: func(ctx context.Context, i consul.Instance) error { return w.cluster.EndPod(ctx, w.target, i.Address) },
	}
	if ask != nil {
		cfg.Gate = func(ctx context.Context, i consul.Instance) error {
			pod, err := w.cluster.PodAt(ctx, w.target, i.Address)
			if err != nil {
				return err
			}
			return ask(ctx, pod)
		}
	}
	return registry.Roll(ctx, cfg)
}
