package cli

import (
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
)

const cleanLong = `Find what sessions that died left behind, on this machine and in the cluster,
and remove it. Living sessions are spared, whoever's they are.

Another machine's session is held for dead when its lease has not been renewed
while culvert looked on for as long as the lease lasts, so this may take a minute.

Ephemeral containers are not looked for: each ends by itself, and what is left then,
its entry in the pod, goes with the pod and not before.`

func (a *app) cleanCommand() *cobra.Command {
	var o cleanOptions
	c := &cobra.Command{
		Use:   "clean",
		Short: "Remove what sessions that died left behind",
		Long:  cleanLong,
		Args:  talk.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return a.clean(c, o) },
	}
	f := c.Flags()
	f.BoolVarP(&o.allNamespaces, "all-namespaces", "A", false, "look in every namespace")
	f.BoolVar(&o.dryRun, "dry-run", false, "only say what would be removed")
	f.BoolVar(&o.local, "local", false, "only this machine, not the cluster")
	outputFlag(c, &o.output)
	return c
}

type cleanOptions struct {
	allNamespaces, dryRun, local bool
	output                       outputFormat
}

func (a *app) clean(c *cobra.Command, o cleanOptions) error {
	files, localErr := a.cleanMachine(c, o)
	var sessions []kube.Cleaned
	var clusterErr error
	if !o.local {
		sessions, clusterErr = a.cleanCluster(c, o)
	}
	result := struct {
		Files    []string       `json:"files"`
		Sessions []kube.Cleaned `json:"sessions"`
	}{append([]string{}, files...), append([]kube.Cleaned{}, sessions...)}
	looked := localErr == nil && clusterErr == nil
	err := a.print(o.output, result, func() { a.tableOfCleaned(files, sessions, o.dryRun, looked) })
	return errors.Join(localErr, clusterErr, err)
}

// cleanMachine returns what was found, and puts it back.
func (a *app) cleanMachine(c *cobra.Command, o cleanOptions) ([]string, error) {
	files, err := resolver.New(resolver.Config{Log: a.Logger()}).Leftovers()
	if err != nil || o.dryRun || len(files) == 0 {
		return files, err
	}
	return files, privileged.Clean(c.Context(), privileged.Config{})
}

func (a *app) cleanCluster(c *cobra.Command, o cleanOptions) ([]kube.Cleaned, error) {
	cluster, err := a.cluster()
	if err != nil {
		return nil, err
	}
	defer cluster.Close()
	steps := a.Steps()
	return cluster.Clean(c.Context(), kube.CleanConfig{AllNamespaces: o.allNamespaces, DryRun: o.dryRun, Progress: steps.Say})
}

func (a *app) tableOfCleaned(files []string, sessions []kube.Cleaned, dryRun, looked bool) {
	if len(files)+len(sessions) == 0 {
		if looked {
			fmt.Fprintln(a.Err, "nothing was left behind")
		}
		return
	}
	removed := "removed"
	if dryRun {
		removed = "would be removed"
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintln(w, "WHAT\tOWNER\tVERDICT\tOBJECTS")
	for _, f := range files {
		fmt.Fprintf(w, "%s\tthis machine\t%s\t\n", f, removed)
	}
	for _, s := range sessions {
		verdict := removed + ": " + s.Why
		if s.Living {
			verdict = "spared: " + s.Why
		} else if !s.Removed && !dryRun {
			verdict = "not removed: " + s.Why
		}
		fmt.Fprintf(w, "%s/%s\t%s\t%s\t%s\n", s.Namespace, s.Name, s.Owner, verdict, strings.Join(s.Objects, " "))
	}
}
