package cli

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/session"
)

func (a *app) disconnectCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "disconnect [--all]",
		Short: "End the connect that runs on this machine, and put everything back",
		Example: `  culvert disconnect
  culvert disconnect --context staging -n shop`,
		Args: talk.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.disconnect(c, all) },
	}
	c.Flags().BoolVar(&all, "all", false, "end all of them")
	return c
}

// disconnect without flags ends the only one.
func (a *app) disconnect(c *cobra.Command, all bool) error {
	running, err := session.Statuses(c.Context())
	if err != nil {
		return err
	}
	running = slices.DeleteFunc(running, func(s session.Status) bool {
		joined := s.Kind == session.KindConnect || s.Kind == session.KindVia
		return !joined || a.namespace != "" && a.namespace != s.Namespace || a.context != "" && a.context != s.Context
	})
	if len(running) > 1 && !all {
		return talk.Usage(fmt.Errorf("%d sessions run on this machine: name one by --context and -n, or --all", len(running)))
	}
	left, err := session.Leave(c.Context(), running)
	for _, s := range left {
		if !a.Quiet {
			fmt.Fprintf(a.Err, "✓ disconnected from %s\n", cmp.Or(s.Context, s.Server))
		}
	}
	if len(running) == 0 && !a.Quiet {
		fmt.Fprintln(a.Err, "not connected")
	}
	return err
}
