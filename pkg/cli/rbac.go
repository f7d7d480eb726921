package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
)

func (a *app) rbacCommand() *cobra.Command {
	var wide bool
	var verbs []string
	c := &cobra.Command{
		Use:   "rbac",
		Short: "Print the rights that a verb needs, to be applied by who may grant them",
		Example: `  culvert rbac -n shop | kubectl apply -f -
  culvert rbac -n shop --for connect,exchange --cluster | kubectl apply -f -`,
		Args: talk.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			needs, err := needsOf(verbs)
			if err != nil {
				return err
			}
			namespace := a.namespace
			if namespace == "" {
				cluster, err := a.cluster()
				if err != nil {
					return err
				}
				defer cluster.Close()
				namespace = cluster.Namespace
			}
			text, err := kube.RBAC(namespace, wide, needs...)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(a.Out, text)
			return err
		},
	}
	c.Flags().StringSliceVar(&verbs, "for", []string{"connect"}, "verbs: connect, forward, proxy, exchange, expose, deploy; and scale and ephemeral, for these methods of exchange (repeatable)")
	_ = c.RegisterFlagCompletionFunc("for", cobra.FixedCompletions([]string{"connect", "forward", "proxy", "exchange", "expose", "scale", "ephemeral", "deploy"}, cobra.ShellCompDirectiveNoFileComp))
	c.Flags().BoolVar(&wide, "cluster", false, "also the ClusterRole for names and ranges of the whole cluster")
	return c
}

func needsOf(verbs []string) ([]kube.Need, error) {
	var needs []kube.Need
	for _, v := range verbs {
		switch v {
		case "connect", "proxy":
			needs = append(needs, kube.Connect)
		case "forward":
			needs = append(needs, kube.Forward)
		case "exchange", "expose":
			needs = append(needs, kube.Exchange)
		case "scale":
			needs = append(needs, kube.Scale)
		case "ephemeral":
			needs = append(needs, kube.EphemeralExchange)
		case "deploy", "rollback", "restart":
			needs = append(needs, kube.Rolling)
		default:
			return nil, talk.Usage(fmt.Errorf("--for is connect, forward, proxy, exchange, expose, scale, ephemeral or deploy, not %q", v))
		}
	}
	return needs, nil
}
