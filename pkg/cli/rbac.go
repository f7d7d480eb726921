package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/kube"
)

func (a *app) rbacCommand() *cobra.Command {
	var wide bool
	c := &cobra.Command{
		Use:   "rbac",
		Short: "Print the rights that connecting needs, to be applied by who may grant them",
		Example: `  culvert rbac -n shop | kubectl apply -f -
  culvert rbac -n shop --cluster | kubectl apply -f -`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			namespace := a.namespace
			if namespace == "" {
				cluster, err := a.cluster()
				if err != nil {
					return err
				}
				defer cluster.Close()
				namespace = cluster.Namespace
			}
			text, err := kube.RBAC(namespace, wide)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(a.out, text)
			return err
		},
	}
	c.Flags().BoolVar(&wide, "cluster", false, "also the ClusterRole for names and ranges of the whole cluster")
	return c
}
