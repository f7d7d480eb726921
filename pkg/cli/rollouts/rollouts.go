// Package rollouts is the verbs of a deploy: what a culvert.yaml says is shipped to hosts, or
// to a workload of Kubernetes, and gone back from; and apply, which is what they run on a host.
package rollouts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/kube"
)

// app is one run of the program.
type app struct {
	*talk.Person
	cluster Cluster
	image   string // of a shadow
}

// A Cluster is loaded by the name of a context and a namespace, where no flag names others.
type Cluster func(context, namespace string) (*kube.Cluster, error)

// Commands are the verbs. The image is that of the shadow that a restart's gate goes by.
func Commands(p *talk.Person, cluster Cluster, image string) []*cobra.Command {
	a := &app{p, cluster, image}
	return []*cobra.Command{a.deployCommand(), a.rollbackCommand(), a.restartCommand(), a.releasesCommand(), a.execCommand(), a.applyCommand()}
}

// options are those of the verbs but apply.
type options struct {
	file, config, identity string
	to                     []string
	wait                   time.Duration
	json                   bool
}

func (o *options) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVarP(&o.file, "file", "f", deploy.FileName, "the project's file")
	f.StringSliceVar(&o.to, "to", nil, "only these hosts or roles; patterns, as 'web-*' (repeatable)")
	f.StringVarP(&o.config, "ssh-config", "F", "", "file of ssh's configuration, in place of yours")
	f.StringVarP(&o.identity, "identity", "i", "", "file with the key to show to hosts, and to the hub")
	c.ValidArgsFunction = o.complete
}

func (o *options) tells(c *cobra.Command) {
	c.Flags().BoolVar(&o.json, "json", false, "the result as JSON")
}

func (o *options) waits(c *cobra.Command) {
	c.Flags().DurationVar(&o.wait, "wait", 0, "how long to wait for another deploy that is at it; without, that is an error")
}

// complete has the names of environments.
func (o *options) complete(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	f, err := deploy.Read(o.file)
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return f.Names(), cobra.ShellCompDirectiveNoFileComp
}

// A project is what counts of the file.
type project struct {
	file     *deploy.File
	env      string
	settings deploy.Settings
	hosts    []deploy.Host
	ssh      *deploy.SSH
}

func (o *options) project(env string) (*project, error) {
	f, err := deploy.Read(o.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, talk.Usage(fmt.Errorf("there is no %s: write one, or name another with -f", o.file))
	}
	if err != nil {
		return nil, err
	}
	p := &project{file: f}
	if p.settings, p.env, err = f.Env(env); err != nil {
		return nil, talk.Usage(err)
	}
	if p.hosts, err = deploy.Pick(p.settings.Hosts, o.to); err != nil && p.settings.K8s == nil {
		return nil, talk.Usage(fmt.Errorf("--to: %w", err))
	}
	if p.settings.K8s != nil {
		return p, nil
	}
	p.ssh, err = o.ssh(p)
	return p, err
}

// ssh is what reaches hosts.
func (o *options) ssh(p *project) (*deploy.SSH, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	identity := o.identity
	if identity != "" {
		if identity, err = filepath.Abs(identity); err != nil {
			return nil, err
		}
		_, missing := os.Stat(identity)
		if _, err := os.Stat(identity + ".pub"); missing != nil && err != nil { // the other half may be with an agent
			return nil, talk.Usage(fmt.Errorf("-i: %w", missing))
		}
	}
	return &deploy.SSH{App: p.file.App, Hub: p.settings.Hub, Config: o.config, Identity: identity, Program: program}, nil
}

// args are at most an environment.
func oneEnv(c *cobra.Command, args []string) error {
	if len(args) > 1 {
		return talk.Usage(fmt.Errorf("%s takes one environment, but was given %q", c.CommandPath(), args))
	}
	return nil
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// open reaches all hosts, which are told of if not all are there.
func (a *app) open(ctx context.Context, o options, p *project, tell func(deploy.Event)) (*deploy.Rollout, error) {
	return deploy.Open(ctx, deploy.Config{
		App: p.file.App, Env: p.env, Settings: p.settings, Hosts: p.hosts, Who: deploy.Who(), Wait: o.wait,
		Dial: p.ssh.Dial, Bring: p.ssh.Bring, Tell: tell, Hurry: a.Hurry,
	})
}

// teller tells of what hosts are at: what they print as it comes, phases where they are all
// there is to see.
func (a *app) teller(hosts int) func(deploy.Event) {
	steps := a.Steps()
	phases := map[string]string{}
	return func(e deploy.Event) {
		switch e.Kind {
		case deploy.KindProgress:
			steps.Progress(bar(e.Done, e.Total))
		case "phase":
			phases[e.Host] = e.Phase
			if a.Verbose {
				steps.Say(e.Host + ": " + e.Phase)
			}
			steps.Progress(phasesOf(phases))
		case "output", "note":
			line := e.Text
			if e.Host != "" && (hosts > 1 || e.Kind == "note") {
				line = e.Host + ": " + line
			}
			steps.Say(line)
		}
	}
}

// phasesOf is where hosts are, as "health 2, restart 1".
func phasesOf(phases map[string]string) string {
	count := map[string]int{}
	for _, p := range phases {
		count[p]++
	}
	var all []string
	for p, n := range count {
		all = append(all, fmt.Sprintf("%s %d", p, n))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

const barWidth = 24

// bar is how much of all is done.
func bar(done, total int64) string {
	if total == 0 {
		return ""
	}
	full := int(done * barWidth / total)
	return fmt.Sprintf("[%s%s] %3d%% of %s", strings.Repeat("#", full), strings.Repeat("-", barWidth-full), done*100/total, size(total))
}

// size is bytes for a person.
func size(n int64) string {
	units := []string{"B", "KB", "MB", "GB", "TB"}
	f, u := float64(n), 0
	for f >= 1000 && u < len(units)-1 {
		f, u = f/1000, u+1
	}
	if u == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[u])
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
