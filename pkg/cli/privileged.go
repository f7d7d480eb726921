package cli

import (
	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/sandbox"
)

// privilegedCommand is the root child of connect. Nobody types it.
func (a *app) privilegedCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "privileged",
		Short:  "The part of connect that runs as root; started by connect",
		Hidden: true,
		Args:   talk.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return privileged.Main(a.Logger()) },
	}
}

// sandboxCommand is what a command of run begins as. Nobody types it.
func (a *app) sandboxCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "sandbox",
		Short:              "What a command begins as; started by run",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			a.deaf() // what ends culvert ends it, until it is the command
			return sandbox.Main(args)
		},
	}
}
