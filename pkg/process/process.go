// Package process runs a command as a part of this one: it is ended when it is
// no longer wanted, with all that it has started, even if this process is
// killed first.
//
// The command leads a process group of its own. A signal to the group reaches
// what the command has started (the program behind "go run .", say), and on a
// terminal Ctrl-C is not the command's but ours, who know what must be done before
// it may end. Only one group is in front, and only that one can read what is
// typed. So a command that asks for the terminal, by reading or setting it, is put
// in front, as a shell does it, and from then on gets Ctrl-C itself: an editor or
// an interpreter goes on after it. (A terminal of our own between the two could
// tell Ctrl-C from what else is typed, for the price of being a terminal to all
// that editors do.) When the command is suspended so are we, and the other way
// round.
//
// Nobody runs code after a kill -9, so a guard is there before the command is:
// a shell that reads from a pipe, whose other end is here. The pipe closes with
// this process, however it ends. For the moment between the command's start and
// the guard's knowledge of it there is only what Linux does: it signals the
// command, but not what that has started already.
//
// What leaves the group (a daemon, the jobs of an interactive shell) is only
// reached by what the group's end does to it.
package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// DefaultPatience is how long a command may take to end.
const DefaultPatience = 10 * time.Second

// ErrInterrupt as the cause of a context's end says that it was the user's
// Ctrl-C: the command gets an interrupt as well, and not a termination.
var ErrInterrupt = errors.New("interrupted")

// Config says what to run.
type Config struct {
	Args   []string // its name, looked for in PATH, and its arguments
	Env    []string // nil: ours
	Dir    string   // "": ours
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Patience is how long it may take to end before it is killed; 0 is
	// DefaultPatience.
	Patience time.Duration

	// Settled, if set, is called when the command has given its standard output up, as
	// a program does that has asked all it had to ask and lives on in the background;
	// also, maybe, when it ends. The terminal is ours again then. Stdout is of no use
	// with it.
	Settled func()
}

// An ExitError is a command that did not end well.
type ExitError struct {
	Name   string
	Code   int       // its exit status; 128 and the signal's number after a signal, as shells have it
	Signal os.Signal // what ended it, nil if it exited
}

func (e *ExitError) Error() string {
	if e.Signal != nil {
		return fmt.Sprintf("%s: ended by signal: %v", e.Name, e.Signal)
	}
	return fmt.Sprintf("%s: exit status %d", e.Name, e.Code)
}

// Run starts the command and returns when it and all of its group are gone. Its
// failure is an *ExitError. When ctx ends first the group is told to end, is
// killed when it has not after the patience, and the error is ctx's cause. The
// same is done to what the command leaves behind when it ends by itself.
func Run(ctx context.Context, cfg Config) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if len(cfg.Args) == 0 {
		return errors.New("no command to run")
	}
	if cfg.Patience == 0 {
		cfg.Patience = DefaultPatience
	}
	cmd := exec.Command(cfg.Args[0], cfg.Args[1:]...)
	cmd.Env, cmd.Dir = cfg.Env, cfg.Dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = cfg.Stdin, cfg.Stdout, cfg.Stderr
	cmd.WaitDelay = time.Second // who left the group may hold our pipes for ever
	exit, err := run(ctx, cmd, cfg)
	switch {
	case err != nil:
		return fmt.Errorf("run %s: %w", cfg.Args[0], err)
	case exit.told:
		return context.Cause(ctx)
	case exit.Code != 0:
		exit.Name = cfg.Args[0]
		return &exit.ExitError
	}
	return nil
}

// An exit is how a command ended, and whether that was because of ctx.
type exit struct {
	ExitError
	told bool
}

// launch starts the command. settled is closed when it has given its standard output
// up, where that is wanted.
func launch(cmd *exec.Cmd, cfg Config) (settled <-chan struct{}, err error) {
	if cfg.Settled == nil {
		return nil, cmd.Start()
	}
	cmd.Stdout = nil
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, out)
	}()
	return done, nil
}
