package cli

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/signal"
	"slices"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/sandbox"
	"github.com/culvert-dev/culvert/pkg/session"
)

const runLong = `Run a command that is in the cluster's network, with its children, and nothing else of
this machine: pods and Services answer it by address and by name, and it finds all else
as before, the services of this machine on localhost as well. It needs no root, and
several may run next to each other, also for several clusters.

The command has your user, files, environment, terminal and signals; culvert ends with
its exit code, with 127 where there is no such command and 126 where it cannot be run.
What it has left in the background by then is ended as well, since its network ends: of a
program that goes there by itself name the flag that has it stay, as code --wait.

What it listens on is reached by itself alone. sudo does not work inside.`

func (a *app) runCommand() *cobra.Command {
	var o runOptions
	c := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG]...",
		Short: "Run a command in the cluster's network, without root",
		Long:  runLong,
		Example: `  culvert run -- psql -h db.shop
  culvert run -n shop -- bash
  culvert run --only -- make integration-test`,
		Args: someCommand,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
		RunE: func(c *cobra.Command, args []string) error { return a.runIn(c, args, o) },
	}
	f := c.Flags()
	f.SetInterspersed(false) // what follows the command's name is the command's
	f.BoolVar(&o.only, "only", false, "reach the cluster and nothing else by network: neither other hosts nor this machine's localhost; files and Unix sockets are there as before")
	o.ranges.flags(c)
	o.flags(a, c, "shadow")
	return c
}

type runOptions struct {
	farOptions
	ranges rangeOptions
	only   bool
}

func someCommand(_ *cobra.Command, args []string) error {
	if len(args) == 0 {
		return talk.Usage(errors.New("a command is missing: culvert run -- COMMAND"))
	}
	return nil
}

// runIn has the command hear signals, where otherwise they are for culvert. Those that are
// ignored stay so for the command.
func (a *app) runIn(c *cobra.Command, args []string, o runOptions) (err error) {
	cfg := session.RunConfig{Args: args, Only: o.only, Stdin: os.Stdin, Stdout: a.Out, Stderr: a.Err}
	if cfg.FarEnd, err = o.farEnd(); err != nil {
		return err
	}
	if cfg.Include, cfg.Exclude, err = o.ranges.parse(); err != nil {
		return err
	}
	if cfg.Path, err = sandbox.Look(args[0]); err != nil {
		return err
	}
	err = a.reach(&cfg.TunnelConfig, func() error {
		if err := c.Context().Err(); err != nil {
			return err
		}
		signals := make(chan os.Signal, 8)
		signal.Notify(signals, slices.DeleteFunc(sandbox.Signals(), func(s os.Signal) bool { return slices.Contains(a.ignored, s) })...)
		defer signal.Stop(signals)
		a.deaf()
		cfg.Signals = signals
		return session.NewRun(cfg).Run(context.WithoutCancel(c.Context()))
	})
	var ended *process.ExitError
	if errors.As(err, &ended) && !errors.Is(err, session.ErrLeft) {
		return endedError{ended}
	}
	return err
}

// rangeOptions are of verbs that lead addresses into the cluster.
type rangeOptions struct{ include, exclude []string }

func (o *rangeOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringSliceVar(&o.include, "include", nil, "address range to reach through the cluster as well (repeatable)")
	f.StringSliceVar(&o.exclude, "exclude", nil, "address range never to reach through the cluster (repeatable)")
}

func (o *rangeOptions) parse() (include, exclude []netip.Prefix, err error) {
	if include, err = parsePrefixes("--include", o.include); err != nil {
		return nil, nil, err
	}
	exclude, err = parsePrefixes("--exclude", o.exclude)
	return include, exclude, err
}
