package rollouts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/release"
)

const rollbackLong = `Have each host go back to the newest release that passed its gate there before the one that
it runs now, or to the one that is named; in the batches of a deploy, and with its gate.
Nothing is sent: only what a host has kept can be gone back to (culvert releases).`

func (a *app) rollbackCommand() *cobra.Command {
	var o options
	var plan bool
	c := &cobra.Command{
		Use:     "rollback [ENV] [RELEASE]",
		Short:   "Have hosts go back to the release before",
		Long:    rollbackLong,
		Example: "  culvert rollback prod\n  culvert rollback prod 20261122-101500-04c66f5",
		RunE:    func(c *cobra.Command, args []string) error { return a.rollback(c.Context(), o, args, plan) },
	}
	o.flags(c)
	o.tells(c)
	o.waits(c)
	c.Flags().BoolVar(&plan, "plan", false, "only tell what each host would go back to")
	return c
}

// envAndRelease tells the two apart: what is no environment is a release, where there is only
// one environment.
func (o *options) envAndRelease(args []string) (env, id string, err error) {
	if len(args) > 2 {
		return "", "", talk.Usage(fmt.Errorf("an environment and a release are all there is, not %q", args))
	}
	if len(args) == 2 {
		return args[0], args[1], nil
	}
	f, err := deploy.Read(o.file)
	if err == nil && len(args) == 1 && len(f.Names()) <= 1 && !slices.Contains(f.Names(), args[0]) {
		return "", args[0], nil
	}
	return first(args), "", nil // what is wrong with the file is told later
}

func (a *app) rollback(ctx context.Context, o options, args []string, plan bool) error {
	env, id, err := o.envAndRelease(args)
	if err != nil {
		return err
	}
	if id != "" {
		if err := release.CheckID(id); err != nil {
			return talk.Usage(err)
		}
	}
	return a.change(ctx, o, env, "rollback", "go back", func(r *deploy.Rollout, p *project) (*deploy.Report, error) {
		if plan {
			err := r.Targets(ctx, id)
			return r.Report(onlyPlan, err), err
		}
		return r.Rollback(ctx, id)
	}, func(p *project) error { return a.rollbackK8s(ctx, o, p, id, plan) })
}

// change does something to hosts, or to a workload, and tells what became of them.
func (a *app) change(ctx context.Context, o options, env, verb, what string, do func(*deploy.Rollout, *project) (*deploy.Report, error), k8s func(*project) error) error {
	p, err := o.project(env)
	if err != nil {
		return err
	}
	if p.settings.K8s != nil {
		return k8s(p)
	}
	steps := a.Steps()
	steps.Begin(fmt.Sprintf("%s: %s, %s", p.file.App, what, count(len(p.hosts), "host")))
	r, err := a.open(ctx, o, p, a.teller(len(p.hosts)))
	if r != nil {
		defer r.Close()
	}
	if r == nil {
		return err
	}
	if err != nil {
		return a.conclude(ctx, o, p, r.Report(verb, err), err)
	}
	report, err := do(r, p)
	return a.conclude(ctx, o, p, report, err)
}

const restartLong = `Restart what hosts run, one host after the other: out of traffic, restarted, in again once its
gate is passed. The first that is not healthy again is the last one. Nothing is sent.

The pods of a workload are asked from within its namespace, by a shadow of $CULVERT_IMAGE that is
removed again, or by port-forward where there can be none.`

func (a *app) restartCommand() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use: "restart [ENV]", Short: "Restart what hosts run, one by one", Long: restartLong, Example: "  culvert restart prod --to web", Args: oneEnv,
		RunE: func(c *cobra.Command, args []string) error {
			return a.change(c.Context(), o, first(args), "restart", "restart", func(r *deploy.Rollout, _ *project) (*deploy.Report, error) {
				return r.Restart(c.Context())
			}, func(p *project) error { return a.restartK8s(c.Context(), o, p) })
		},
	}
	o.flags(c)
	o.tells(c)
	o.waits(c)
	return c
}

func (a *app) releasesCommand() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use: "releases [ENV]", Short: "List the releases that hosts have", Args: oneEnv,
		Long: "List the releases that hosts have kept, or their logs know of, the newest first: the commit, who deployed it,\nwhen, and how it is on each host.",
		RunE: func(c *cobra.Command, args []string) error {
			p, err := o.project(first(args))
			if err != nil {
				return err
			}
			if p.settings.K8s != nil {
				return a.releasesK8s(c.Context(), o, p)
			}
			r, err := a.open(c.Context(), o, p, nil)
			if r == nil {
				return err
			}
			defer r.Close()
			if o.json {
				return errors.Join(err, printJSON(a.Out, r.Releases()))
			}
			return errors.Join(err, printReleases(a.Out, r.Releases()))
		},
	}
	o.flags(c)
	o.tells(c)
	return c
}

const execLong = `Run a command on all hosts at the same time, in the release that they run. Where hosts have a
policy it says which commands. There is no shell: "sh -c '…'" is one.`

func (a *app) execCommand() *cobra.Command {
	var o options
	c := &cobra.Command{
		Use: "exec [ENV] -- COMMAND [ARG]...", Short: "Run a command in what hosts run", Long: execLong,
		Example: "  culvert exec prod -- bin/console cache:clear\n  culvert exec prod --to web-1 -- ls -l",
		RunE: func(c *cobra.Command, args []string) error {
			dash := c.ArgsLenAtDash()
			if dash < 0 || dash == len(args) {
				return talk.Usage(errors.New("a command is missing: culvert exec [ENV] -- COMMAND"))
			}
			if err := oneEnv(c, args[:dash]); err != nil {
				return err
			}
			return a.exec(c.Context(), o, first(args[:dash]), args[dash:])
		},
	}
	o.flags(c)
	return c
}

func (a *app) exec(ctx context.Context, o options, env string, argv []string) error {
	p, err := o.project(env)
	if err != nil {
		return err
	}
	if p.settings.K8s != nil {
		return talk.Usage(fmt.Errorf("a workload's pods are kubectl's: kubectl exec %s -- …", p.settings.K8s.Workload))
	}
	r, err := a.open(ctx, o, p, a.prints(len(p.hosts)))
	if r == nil {
		return err
	}
	defer r.Close()
	if err != nil {
		return err
	}
	return r.Exec(ctx, argv)
}

// prints has the output of a command on stdout, which is all that there is to see.
func (a *app) prints(hosts int) func(deploy.Event) {
	return func(e deploy.Event) {
		switch {
		case e.Kind == "note":
			a.Steps().Say(e.Host + ": " + e.Text)
		case e.Kind == "output" && hosts > 1:
			fmt.Fprintf(a.Out, "%s: %s\n", e.Host, e.Text)
		case e.Kind == "output":
			fmt.Fprintln(a.Out, e.Text)
		}
	}
}

// applyCommand is the host's side, which deployers run over ssh.
func (a *app) applyCommand() *cobra.Command {
	var o release.Options
	var policy string
	c := &cobra.Command{
		Use: "apply --app APP", Hidden: true, Args: talk.NoArgs,
		Short: "Serve a deployer on stdin and stdout, on the host",
		Long: `Do on this host what a deployer says on stdin: culvert deploy runs this over ssh. With
--policy, in the forced command of a key, that is what the policy allows and nothing else.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if policy != "" {
				text, err := os.ReadFile(policy)
				if err != nil {
					return fmt.Errorf("read the policy: %w", err)
				}
				if o.Policy, err = release.ParsePolicy(text); err != nil {
					return fmt.Errorf("read %s: %w", policy, err)
				}
			}
			if o.App == "" && o.Policy == nil {
				return talk.Usage(errors.New("--app is needed, or a --policy that has it"))
			}
			if asked := os.Getenv("SSH_ORIGINAL_COMMAND"); asked != "" && !strings.Contains(asked, "culvert apply") {
				return &release.Error{Code: release.Refused, Text: fmt.Sprintf("this key is for culvert deploy, not for %.40q", asked)}
			}
			if term.IsTerminal(int(os.Stdin.Fd())) {
				return talk.Usage(errNobody)
			}
			// A deployer who is gone must not end us, by the next word to him or by a hangup.
			signal.Reset(syscall.SIGHUP)
			gone := make(chan os.Signal, 1)
			signal.Notify(gone, syscall.SIGPIPE, syscall.SIGHUP)
			defer signal.Stop(gone)
			o.Log = a.Logger()
			in := &streams{wait: time.AfterFunc(toDeployer, func() { fmt.Fprintln(a.Err, "culvert: "+errNobody.Error()) })}
			err := release.Serve(c.Context(), in, o)
			if in.wait.Stop() && err == nil {
				err = errNobody
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.App, "app", "", "the only app that may be deployed")
	f.StringVar(&policy, "policy", "", "file that says what is allowed; without, all that this user may do")
	f.StringVar(&o.Who, "who", "", "whose key this is, for the log (default: what the deployer says)")
	return c
}

// errNobody is for a person who tries a key that is a job's.
var errNobody = errors.New("this is a host's side of culvert deploy, which speaks to it on stdin; there is no shell")

const toDeployer = 5 * time.Second // a deployer says something at once

// streams are this process's own.
type streams struct {
	wait *time.Timer // for something to come
}

func (s *streams) Read(p []byte) (int, error) {
	n, err := os.Stdin.Read(p)
	if n > 0 {
		s.wait.Stop()
	}
	return n, err
}

func (s *streams) Write(p []byte) (int, error) { return os.Stdout.Write(p) }
func (s *streams) Close() error                { return errors.Join(os.Stdin.Close(), os.Stdout.Close()) }
