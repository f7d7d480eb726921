package cli

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

func (a *app) leaveCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "leave [TARGET | --all]",
		Short: "End exchanges that run on this machine, and put their Services back",
		Example: `  culvert leave svc/web
  culvert leave --all`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return talk.Usage(fmt.Errorf("leave takes one target, as svc/web, but was given %q", args))
			case len(args) == 1 && all:
				return talk.Usage(errors.New("leave takes a target or --all, not both"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			target := ""
			if len(args) == 1 {
				target = args[0]
			}
			return a.leave(c, target, all)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "end all of them")
	return c
}

// leave without a target ends the only one.
func (a *app) leave(c *cobra.Command, target string, all bool) error {
	which := func(s session.Status) bool {
		return s.Exchange != nil && (a.namespace == "" || a.namespace == s.Namespace)
	}
	if target != "" {
		t, err := kube.ParseTarget(target)
		if err != nil {
			return talk.Usage(err)
		}
		ours := which
		which = func(s session.Status) bool {
			return ours(s) && s.Exchange.Named(t)
		}
	}
	running, err := session.Statuses(c.Context())
	if err != nil {
		return err
	}
	running = slices.DeleteFunc(running, func(s session.Status) bool { return !which(s) })
	switch {
	case len(running) == 0 && target != "":
		return fmt.Errorf("no exchange of %s runs on this machine", target)
	case len(running) > 1 && target == "" && !all:
		return talk.Usage(fmt.Errorf("%d exchanges run on this machine: name one, or --all", len(running)))
	}
	left, err := session.Leave(c.Context(), running)
	for _, s := range left {
		if !a.Quiet {
			fmt.Fprintf(a.Err, "✓ left %s in namespace %s\n", s.Exchange.Subject(), s.Namespace)
		}
	}
	if len(left) == 0 && err == nil && !a.Quiet {
		fmt.Fprintln(a.Err, "nothing is exchanged on this machine")
	}
	return err
}
