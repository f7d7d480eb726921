// Package talk is how a program of culvert talks to the person who has typed its command:
// results on stdout, talk on stderr, one line for an error, an exit code. The verbs of a
// cluster and those of a hub share it, and nothing else, so that a hub's image is without
// Kubernetes' client.
package talk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// Exit codes, as the README promises them.
const (
	ExitDone         = 0 // also after Ctrl-C, when everything was put back
	ExitFailed       = 1
	ExitUsage        = 2
	ExitNotPermitted = 3 // root or RBAC
	ExitLeftovers    = 4 // something could not be put back
)

// A Person is who has typed a command.
type Person struct {
	Out, Err io.Writer
	Terminal bool            // Err is one
	Hurry    <-chan struct{} // closed by a second Ctrl-C
	Verbose  bool
	Quiet    bool

	steps *Steps
}

// New is the one at this process's own streams.
func New() Person {
	return Person{Out: os.Stdout, Err: os.Stderr, Terminal: term.IsTerminal(int(os.Stderr.Fd()))}
}

// Flags are those of every command.
func (p *Person) Flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.BoolVarP(&p.Verbose, "verbose", "v", false, "tell more, and log what goes on")
	f.BoolVarP(&p.Quiet, "quiet", "q", false, "tell only errors")
}

// Steps are what is told, one for all.
func (p *Person) Steps() *Steps {
	if p.steps == nil {
		p.steps = &Steps{out: p.Err, terminal: p.Terminal && !p.Verbose && os.Getenv("TERM") != "dumb", verbose: p.Verbose, quiet: p.Quiet}
	}
	return p.steps
}

// Logger writes what goes on to stderr when -v was given.
func (p *Person) Logger() *slog.Logger {
	level := slog.LevelError + 1
	if p.Verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(p.Err, &slog.HandlerOptions{Level: level}))
}

// Explain prints an error on one line, and what may help on another.
func Explain(w io.Writer, err error, hint string) {
	fmt.Fprintf(w, "culvert: error: %s\n", OneLine(err))
	if hint != "" {
		fmt.Fprintf(w, "culvert: hint: %s\n", oneLine(hint))
	}
}

// OneLine is an error of several as one.
func OneLine(err error) string {
	return oneLine(err.Error())
}

func oneLine(text string) string {
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	return harmless(strings.Join(lines, "; "))
}

// harmless is a text in which others have had a word, and which is for a terminal.
func harmless(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}

// A UsageError is a wrong flag or argument.
type UsageError struct{ error }

func Usage(err error) error {
	if err == nil {
		return nil
	}
	return UsageError{err}
}

func NoArgs(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return Usage(errors.New(c.CommandPath() + " takes no arguments, but was given " + fmt.Sprintf("%q", args[0])))
}

// Interruptible is cancelled by the first Ctrl-C, SIGTERM or SIGHUP. A second
// one is answered, and told to who can hurry: what was changed is being put back,
// and that is bounded.
func (p *Person) Interruptible() (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	again, told := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup(1) has it
		signal.Notify(signals, syscall.SIGHUP)
	}
	go func() {
		for first := true; ; first = false {
			s, ok := <-signals
			if !ok {
				return
			}
			if !first {
				fmt.Fprintln(p.Err, "culvert: still ending what was begun, a moment")
			}
			if !first && s == os.Interrupt { // a terminal that closes says it twice, too
				told()
			}
			cancel()
		}
	}()
	p.Hurry = again.Done()
	return ctx, sync.OnceFunc(func() { signal.Stop(signals); close(signals); cancel(); told() })
}

// OutliveReaders lets writes to a closed pipe fail like any other: of "culvert
// connect | tee log" Ctrl-C ends tee first, and there is much to put back.
func OutliveReaders() (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGPIPE)
	return func() { signal.Stop(signals) }
}
