package cli

import (
	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// completions offer what the kubeconfig and the cluster have; where they cannot
// be asked, nothing is offered.
func (a *app) completions(root *cobra.Command) {
	offer := func(list func(*cobra.Command) ([]string, error)) cobra.CompletionFunc {
		return func(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			names, err := list(c)
			if err != nil {
				return nil, cobra.ShellCompDirectiveError
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		}
	}
	_ = root.RegisterFlagCompletionFunc("context", offer(func(*cobra.Command) ([]string, error) {
		return kube.Contexts(a.kubeconfig)
	}))
	_ = root.RegisterFlagCompletionFunc("namespace", offer(func(c *cobra.Command) ([]string, error) {
		cluster, err := a.clusterBy(true)
		if err != nil {
			return nil, err
		}
		defer cluster.Close()
		return cluster.Namespaces(c.Context())
	}))
}
