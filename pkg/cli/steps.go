package cli

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// steps tells on stderr how far a verb is: one line for each step that is
// done, and on a terminal the step under way with a spinner before it.
type steps struct {
	mu       sync.Mutex
	out      io.Writer
	terminal bool
	verbose  bool
	quiet    bool

	what, detail string
	since        time.Time
	stop         chan struct{} // closes the spinner of the step under way
	stopped      chan struct{}
}

const (
	clearLine = "\r\x1b[K"
	spinEvery = 100 * time.Millisecond
)

// Begin starts a step. One that is under way still has failed.
func (s *steps) Begin(what string) {
	s.Fail()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.what, s.detail, s.since = what, "", time.Now()
	switch {
	case s.quiet:
	case s.terminal:
		s.stop, s.stopped = make(chan struct{}), make(chan struct{})
		go s.spin(s.stop, s.stopped)
	case s.verbose:
		fmt.Fprintf(s.out, "… %s\n", what)
	}
}

// Progress says what the step under way waits for.
func (s *steps) Progress(detail string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if detail == s.detail {
		return
	}
	s.detail = detail
	if s.verbose && !s.terminal && !s.quiet {
		fmt.Fprintf(s.out, "… %s: %s\n", s.what, detail)
	}
}

// Done ends the step under way well; one that had nothing to do is not told.
func (s *steps) Done(result string) { s.end("✓", result) }

// Fail ends the step under way, if there is one; the error is told elsewhere.
func (s *steps) Fail() {
	s.mu.Lock()
	what := s.what
	s.mu.Unlock()
	if what != "" {
		s.end("✗", what)
	}
}

func (s *steps) end(mark, text string) {
	s.mu.Lock()
	stop, stopped, since := s.stop, s.stopped, s.since
	s.stop, s.stopped, s.what = nil, nil, ""
	s.mu.Unlock()
	if stop != nil {
		close(stop)
		<-stopped
	}
	if !s.quiet && text != "" {
		fmt.Fprintf(s.out, "%s %s  %.1fs\n", mark, text, time.Since(since).Seconds())
	}
}

// Say prints one line between the steps.
func (s *steps) Say(line string) { s.line("  " + line) }

// Warn prints one line on what works less well than it could.
func (s *steps) Warn(line string) { s.line("! " + line) }

func (s *steps) line(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quiet {
		return
	}
	if s.stop != nil {
		fmt.Fprint(s.out, clearLine)
	}
	fmt.Fprintln(s.out, text)
}

func (s *steps) spin(stop, stopped chan struct{}) {
	defer close(stopped)
	frames := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
	tick := time.NewTicker(spinEvery)
	defer tick.Stop()
	for i := 0; ; i++ {
		s.mu.Lock()
		text := s.what
		if s.detail != "" {
			text += ": " + s.detail
		}
		fmt.Fprintf(s.out, "%s%c %s", clearLine, frames[i%len(frames)], text)
		s.mu.Unlock()
		select {
		case <-stop:
			fmt.Fprint(s.out, clearLine)
			return
		case <-tick.C:
		}
	}
}
