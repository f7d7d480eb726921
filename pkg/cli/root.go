// Package cli is what a person types and reads: a file for each verb, the
// words of errors and hints, and the exit codes. Results go to stdout, talk to
// stderr.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"sigs.k8s.io/yaml"
)

// app is one run of the program: its streams and the flags of every verb.
type app struct {
	version  string
	out      io.Writer
	err      io.Writer
	terminal bool // err is one

	kubeconfig string
	context    string
	namespace  string
	verbose    bool
	quiet      bool

	interrupts <-chan struct{} // gets a word for each Ctrl-C
}

// Main runs culvert with args, without the program's name, and returns its
// exit code.
func Main(version string, args []string) int {
	a := &app{
		version: version, out: os.Stdout, err: os.Stderr,
		terminal: term.IsTerminal(int(os.Stderr.Fd())),
	}
	ctx, interrupts, stop := interruptible(a.err)
	defer stop()
	a.interrupts = interrupts
	return a.run(ctx, args)
}

func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetOut(a.out)
	root.SetErr(a.err)
	err := root.ExecuteContext(ctx)
	return explain(a.err, err, typed{line: strings.Join(args, " "), flags: a.clusterFlags()})
}

// clusterFlags are those of the flags typed that say which cluster and namespace.
func (a *app) clusterFlags() string {
	var flags string
	for _, f := range []struct{ name, value string }{{"--kubeconfig", a.kubeconfig}, {"--context", a.context}, {"-n", a.namespace}} {
		if f.value != "" {
			flags += " " + f.name + " " + f.value
		}
	}
	return flags
}

// interruptible is cancelled by the first Ctrl-C, SIGTERM or SIGHUP. A second
// one is only answered: what was changed is being put back, and that is bounded. All
// are told to who can do without some of the waiting.
func interruptible(w io.Writer) (context.Context, <-chan struct{}, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan struct{}, 1)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for first := true; ; first = false {
			if _, ok := <-signals; !ok {
				return
			}
			if !first {
				fmt.Fprintln(w, "culvert: still putting things back, a moment")
			}
			select {
			case told <- struct{}{}:
			default:
			}
			cancel()
		}
	}()
	return ctx, told, func() { signal.Stop(signals); close(signals); cancel() }
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
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	f := root.PersistentFlags()
	f.StringVar(&a.kubeconfig, "kubeconfig", "", "path of the kubeconfig file (default: $KUBECONFIG, ~/.kube/config)")
	f.StringVar(&a.context, "context", "", "kubeconfig context to use")
	f.StringVarP(&a.namespace, "namespace", "n", "", "namespace to work in (default: the context's)")
	f.BoolVarP(&a.verbose, "verbose", "v", false, "tell more, and log what goes on")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "tell only errors")
	root.AddCommand(a.connectCommand(), a.exchangeCommand(), a.exposeCommand(), a.leaveCommand(), a.statusCommand(), a.rbacCommand(), a.cleanCommand(),
		a.versionCommand(), a.privilegedCommand())
	a.completions(root)
	return root
}

func unknownVerb(c *cobra.Command, verb string) error {
	err := fmt.Errorf("no verb %q", verb)
	if s := c.SuggestionsFor(verb); len(s) > 0 {
		err = fmt.Errorf("no verb %q, did you mean %q", verb, s[0])
	}
	return usage(err)
}

// logger writes what goes on to stderr when -v was given.
func (a *app) logger() *slog.Logger {
	level := slog.LevelError + 1
	if a.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
}

func (a *app) steps() *steps {
	return &steps{out: a.err, terminal: a.terminal && !a.verbose, verbose: a.verbose, quiet: a.quiet}
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
		e := json.NewEncoder(a.out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = a.out.Write(b)
		return err
	}
	table()
	return nil
}
