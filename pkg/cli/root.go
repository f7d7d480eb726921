// Package cli is what a person types and reads: a file for each verb, the
// words of errors and hints, and the exit codes. Results go to stdout, talk to
// stderr.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/cli/hubs"
	"github.com/culvert-dev/culvert/pkg/cli/rollouts"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
)

// app is one run of the program: its streams and the flags of every verb.
type app struct {
	talk.Person
	version string
	ctx     context.Context // of the run
	deaf    func()          // leaves signals to who has asked for them
	ignored []os.Signal     // by who started us

	args       []string // as typed
	kubeconfig string
	context    string
	namespace  string
	ssh        string
}

// Main runs culvert with args, without the program's name, and returns its
// exit code.
func Main(version string, args []string) int {
	a := &app{Person: talk.New(), version: version}
	a.ignored = slices.DeleteFunc([]os.Signal{os.Interrupt, syscall.SIGHUP}, func(s os.Signal) bool { return !signal.Ignored(s) })
	ctx, stop := a.Interruptible()
	defer stop()
	a.deaf = stop
	return a.run(ctx, args)
}

func (a *app) run(ctx context.Context, args []string) int {
	a.ctx, a.args = ctx, args
	root := a.root()
	root.SetArgs(args)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	c, err := root.ExecuteContextC(ctx)
	return explain(a.Err, err, typedAs(c.Name(), args, a.clusterFlags()))
}

// clusterFlags are those of the flags typed that say which cluster and namespace.
func (a *app) clusterFlags() string {
	var flags string
	for _, f := range []struct{ name, value string }{{"--kubeconfig", a.kubeconfig}, {"--context", a.context}, {"-n", a.namespace}, {"--ssh", a.ssh}} {
		if f.value != "" {
			flags += " " + f.name + " " + f.value
		}
	}
	return flags
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:                        "culvert",
		Short:                      "Join this machine to a Kubernetes cluster's network",
		SilenceUsage:               true,
		SilenceErrors:              true,
		Args:                       cobra.ArbitraryArgs,
		SuggestionsMinimumDistance: 2,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownVerb(c, args[0])
			}
			return c.Help()
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return talk.Usage(err) })
	f := root.PersistentFlags()
	f.StringVar(&a.kubeconfig, "kubeconfig", "", "path of the kubeconfig file (default: $KUBECONFIG, ~/.kube/config)")
	f.StringVar(&a.context, "context", "", "kubeconfig context to use")
	f.StringVarP(&a.namespace, "namespace", "n", "", "namespace to work in (default: the context's)")
	f.StringVar(&a.ssh, "ssh", "", "SSH server that reaches the API server, as ssh has it: user@host; your own ssh makes the connection. Credential plugins do not use it")
	a.Flags(root)
	root.AddCommand(a.connectCommand(), a.disconnectCommand(), a.runCommand(), a.forwardCommand(), a.proxyCommand(), a.exchangeCommand(), a.exposeCommand(), a.leaveCommand(), a.statusCommand(), a.doctorCommand(), a.rbacCommand(), a.cleanCommand(),
		a.versionCommand(), a.privilegedCommand(), a.sandboxCommand())
	root.AddCommand(hubs.Commands(&a.Person)...)
	root.AddCommand(rollouts.Commands(&a.Person, a.clusterAt, a.defaultImage())...)
	a.completions(root)
	return root
}

func unknownVerb(c *cobra.Command, verb string) error {
	err := fmt.Errorf("no verb %q", verb)
	if s := c.SuggestionsFor(verb); len(s) > 0 {
		err = fmt.Errorf("no verb %q, did you mean %q", verb, s[0])
	}
	return talk.Usage(err)
}

// outputFormat is checked when it is typed, not when there is something to print.
type outputFormat string

func (f *outputFormat) String() string { return string(*f) }
func (f *outputFormat) Type() string   { return "string" }

func (f *outputFormat) Set(text string) error {
	switch text {
	case "table", "json", "yaml":
		*f = outputFormat(text)
		return nil
	}
	return errors.New("it is table, json or yaml")
}

func outputFlag(c *cobra.Command, output *outputFormat) {
	*output = "table"
	c.Flags().VarP(output, "output", "o", "table, json or yaml")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

// print writes a result: v as json or yaml, or what table prints.
func (a *app) print(output outputFormat, v any, table func()) error {
	switch output {
	case "json":
		e := json.NewEncoder(a.Out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = a.Out.Write(b)
		return err
	}
	table()
	return nil
}
