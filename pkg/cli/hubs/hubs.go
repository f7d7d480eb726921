// Package hubs is the verbs of a hub: to be one, to be a host of one, and to reach its
// hosts. They are apart from the others, which know Kubernetes: the hub's image is these
// alone, without a cluster's client.
package hubs

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
)

// app is one run of the program.
type app struct{ *talk.Person }

// Commands are the verbs, for who has more of them.
func Commands(p *talk.Person) []*cobra.Command {
	a := &app{p}
	return []*cobra.Command{a.hubCommand(), a.agentCommand(), a.dialCommand(), a.hostsCommand(), a.sshConfigCommand()}
}

// Main is a program that has no others: it is a hub by itself, and the rest is below that.
// It returns its exit code.
func Main(version string, args []string) int {
	p := talk.New()
	ctx, stop := p.Interruptible()
	defer stop()
	a := &app{&p}
	root := a.hubCommand()
	root.Version, root.SilenceUsage, root.SilenceErrors = version, true, true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return talk.Usage(err) })
	root.SetArgs(args)
	root.AddCommand(a.agentCommand(), a.dialCommand(), a.hostsCommand(), a.sshConfigCommand())
	p.Flags(root)
	err := root.ExecuteContext(ctx)
	var wrong talk.UsageError
	switch {
	case err == nil:
		return talk.ExitDone
	case errors.As(err, &wrong):
		talk.Explain(p.Err, err, "hub --help")
		return talk.ExitUsage
	}
	talk.Explain(p.Err, err, "")
	return talk.ExitFailed
}
