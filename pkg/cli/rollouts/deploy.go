package rollouts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/deploy"
)

const deployLong = `Build what culvert.yaml says, ship it to all hosts, and switch them to it, batch by batch. No
host is switched unless all have it. One that fails its gate is put back by itself, and the
hosts after it are left alone. The same line again goes on where that ended.

Hosts are reached by your own ssh, by way of a hub where the file names one. On each runs
"culvert apply", which is brought where it is missing. A key of which authorized_keys says
command="culvert apply --app APP --policy FILE" can do what that file allows and no more
(--print-policy).

Ctrl-C leaves after the batch under way. With --plan nothing is changed; what -o writes can be
deployed by --apply later, if hosts, file and tree are still what they were.`

type deployOptions struct {
	options
	plan, noBuild, schema, policy bool
	out, apply, commit            string
}

func (a *app) deployCommand() *cobra.Command {
	var o deployOptions
	c := &cobra.Command{
		Use:   "deploy [ENV]",
		Short: "Ship a release to hosts, and switch them to it",
		Long:  deployLong,
		Example: `  culvert deploy prod
  culvert deploy prod --plan -o plan.json && culvert deploy --apply plan.json
  culvert deploy prod --to web-1 --wait 10m`,
		Args: oneEnv,
		RunE: func(c *cobra.Command, args []string) error { return a.deploy(c.Context(), o, first(args)) },
	}
	o.flags(c)
	o.tells(c)
	o.waits(c)
	f := c.Flags()
	f.BoolVar(&o.plan, "plan", false, "ask all hosts, and tell what would be done")
	f.StringVarP(&o.out, "out", "o", "", "with --plan: a file to write it to")
	f.StringVar(&o.apply, "apply", "", "deploy the plan of this file, of what has been built then")
	f.StringVar(&o.commit, "commit", "", "the commit that this is (default: CI's, or git's)")
	f.BoolVar(&o.noBuild, "no-build", false, "run neither build nor hooks here: what is shipped is there")
	f.BoolVar(&o.schema, "print-schema", false, "print the JSON schema of culvert.yaml")
	f.BoolVar(&o.policy, "print-policy", false, "print the policy by which hosts allow this and nothing else")
	return c
}

func (o *deployOptions) check() error {
	switch {
	case o.plan && o.apply != "":
		return errors.New("--plan makes a plan, and --apply deploys one")
	case o.out != "" && !o.plan:
		return errors.New("-o is of --plan")
	case o.apply != "" && len(o.to) > 0:
		return errors.New("--apply is to the hosts of the plan, --to was the plan's")
	}
	return nil
}

func (a *app) deploy(ctx context.Context, o deployOptions, env string) error {
	if err := o.check(); err != nil {
		return talk.Usage(err)
	}
	if o.schema {
		schema, err := deploy.Schema()
		if err != nil {
			return err
		}
		_, err = a.Out.Write(schema)
		return err
	}
	plan, err := o.planned(&env)
	if err != nil {
		return err
	}
	p, err := o.project(env)
	if err != nil {
		return err
	}
	if o.policy {
		return a.printPolicy(p)
	}
	if plan != nil {
		if p.hosts, err = plan.Picks(p.settings.Hosts); err != nil {
			return err
		}
	}
	if o.commit == "" {
		o.commit = deploy.Commit(ctx, p.file.Dir())
	}
	if err := a.build(ctx, o, p); err != nil {
		return err
	}
	if p.settings.K8s != nil {
		return a.deployK8s(ctx, o, p, plan)
	}
	return a.ship(ctx, o, p, plan)
}

// planned reads the plan that is to be deployed, which names its environment.
func (o *deployOptions) planned(env *string) (*deploy.Plan, error) {
	if o.apply == "" {
		return nil, nil
	}
	text, err := os.ReadFile(o.apply)
	if err != nil {
		return nil, talk.Usage(fmt.Errorf("--apply: %w", err))
	}
	plan, err := deploy.ParsePlan(text)
	if err != nil {
		return nil, err
	}
	if *env != "" && *env != plan.Env {
		return nil, talk.Usage(fmt.Errorf("the plan is of %q, not of %q", plan.Env, *env))
	}
	*env, o.noBuild, o.commit = plan.Env, true, plan.Commit
	return plan, nil
}

func (a *app) printPolicy(p *project) error {
	if p.settings.K8s != nil {
		return talk.Usage(errors.New("a workload of Kubernetes has no policy of ours: see culvert rbac"))
	}
	text, err := deploy.Policy(p.file.App, p.settings)
	if err != nil {
		return err
	}
	_, err = a.Out.Write(text)
	return err
}

func (a *app) build(ctx context.Context, o deployOptions, p *project) error {
	hooks := p.settings.Hooks
	if o.noBuild || p.settings.Build == "" && hooks.PreDeploy == "" && hooks.PostDeploy == "" {
		return nil
	}
	a.Steps().Say("building " + p.file.App)
	out := a.Err
	if a.Quiet {
		out = io.Discard
	}
	return p.file.Build(ctx, p.settings, p.env, o.commit, out)
}

// ship does it, or plans it.
func (a *app) ship(ctx context.Context, o deployOptions, p *project, plan *deploy.Plan) error {
	steps := a.Steps()
	p.ssh.Ready()
	tree, err := deploy.ReadTree(ctx, p.file.Dir(), p.settings.From, p.settings.Exclude)
	if err != nil {
		return err
	}
	defer tree.Close()
	if plan != nil {
		if err := plan.Holds(p.file.App, p.settings, tree); err != nil {
			return err
		}
	}
	steps.Begin("ask " + count(len(p.hosts), "host"))
	r, err := a.open(ctx, o.options, p, a.teller(len(p.hosts)))
	if r != nil {
		defer r.Close()
	}
	if r == nil {
		return err
	}
	if err != nil {
		action := "deploy"
		if o.plan {
			action = onlyPlan
		}
		return a.conclude(ctx, o.options, p, r.Report(action, err), err)
	}
	steps.Done("asked " + count(len(p.hosts), "host"))
	if o.plan {
		if plan, err = r.Plan(ctx, tree, o.commit); err != nil {
			return a.conclude(ctx, o.options, p, r.Report(onlyPlan, err), err)
		}
		return a.tellPlan(o, plan)
	}
	if plan == nil {
		plan = r.Draft(tree, o.commit)
	}
	steps.Begin(fmt.Sprintf("deploy %s to %s", p.file.App, count(len(p.hosts), "host")))
	report, err := r.Deploy(ctx, tree, plan)
	return a.conclude(ctx, o.options, p, report, err)
}

func (a *app) tellPlan(o deployOptions, plan *deploy.Plan) error {
	if err := o.write(plan); err != nil {
		return err
	}
	print := func() error { return printPlan(a.Out, plan) }
	if o.json {
		print = func() error { return printJSON(a.Out, plan) }
	}
	return errors.Join(print(), plan.Ready())
}

// write writes a plan where that was asked for.
func (o *deployOptions) write(plan *deploy.Plan) error {
	if o.out != "" {
		f, err := os.OpenFile(o.out, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
		if err != nil {
			return fmt.Errorf("write the plan: %w", err)
		}
		if err := errors.Join(printJSON(f, plan), f.Close()); err != nil {
			return fmt.Errorf("write the plan: %w", err)
		}
	}
	return nil
}

// onlyPlan is the action of a report of nothing that was done, of which nobody else is told.
const onlyPlan = "plan"

// conclude tells what became of all, here and to whom the file names.
func (a *app) conclude(ctx context.Context, o options, p *project, report *deploy.Report, err error) error {
	steps := a.Steps()
	if err != nil {
		steps.Fail()
	} else {
		steps.Done(done(report))
	}
	print := func() error { return printReport(a.Out, report.Hosts) }
	if o.json {
		print = func() error { return printJSON(a.Out, report) }
	}
	if printed := print(); printed != nil {
		return errors.Join(err, printed)
	}
	if report.Action == onlyPlan {
		return err
	}
	if failed := p.file.Notify(ctx, p.settings, report); failed != nil {
		steps.Warn(failed.Error())
	}
	return err
}

// done is a report that went well, in a line.
func done(report *deploy.Report) string {
	changed := 0
	for _, h := range report.Hosts {
		if h.State != deploy.Unchanged {
			changed++
		}
	}
	what := report.App
	if report.Release != "" {
		what += " " + report.Release
	}
	switch {
	case report.Action == onlyPlan:
		return fmt.Sprintf("%s: nothing was changed", what)
	case changed == 0:
		return fmt.Sprintf("%s: runs on %s already", what, count(len(report.Hosts), "host"))
	case report.Action == "restart":
		return fmt.Sprintf("%s: %s restarted", what, count(changed, "host"))
	}
	return fmt.Sprintf("%s: %s switched", what, count(changed, "host"))
}
