package cli

import (
	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/privileged"
)

// privilegedCommand is the root child of connect. Nobody types it.
func (a *app) privilegedCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "privileged",
		Short:  "The part of connect that runs as root; started by connect",
		Hidden: true,
		Args:   noArgs,
		RunE:   func(*cobra.Command, []string) error { return privileged.Main(a.logger()) },
	}
}
