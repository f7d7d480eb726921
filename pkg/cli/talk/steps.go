package talk

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// Steps tells on stderr how far a verb is: one line for each step that is
// done, and on a terminal the step under way with a spinner before it.
type Steps struct {
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
func (s *Steps) Begin(what string) {
	s.Fail()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.what, s.detail, s.since = oneLine(what), "", time.Now()
	switch {
	case s.quiet:
	case s.terminal:
		s.stop, s.stopped = make(chan struct{}), make(chan struct{})
		go s.spin(s.stop, s.stopped)
	case s.verbose:
		fmt.Fprintf(s.out, "… %s\n", s.what)
	}
}

// Asks leaves the line to who asks a person something.
func (s *Steps) Asks() {
	s.mu.Lock()
	stop, stopped := s.stop, s.stopped
	s.stop, s.stopped = nil, nil
	s.mu.Unlock()
	if stop != nil {
		close(stop)
		<-stopped
	}
}

// Progress says what the step under way waits for.
func (s *Steps) Progress(detail string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if detail = oneLine(detail); detail == s.detail {
		return
	}
	s.detail = detail
	if s.verbose && !s.terminal && !s.quiet {
		fmt.Fprintf(s.out, "… %s: %s\n", s.what, detail)
	}
}

// Done ends the step under way well; one that had nothing to do is not told.
func (s *Steps) Done(result string) { s.end("✓", result) }

// Fail ends the step under way, if there is one; the error is told elsewhere.
func (s *Steps) Fail() {
	s.mu.Lock()
	what := s.what
	s.mu.Unlock()
	if what != "" {
		s.end("✗", what)
	}
}

func (s *Steps) end(mark, text string) {
	s.Asks()
	s.mu.Lock()
	since := s.since
	s.what = ""
	s.mu.Unlock()
	if !s.quiet && text != "" {
		fmt.Fprintf(s.out, "%s %s  %.1fs\n", mark, oneLine(text), time.Since(since).Seconds())
	}
}

// LeaveTerminal is for a verb that goes on without one.
func (s *Steps) LeaveTerminal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.terminal = false
}

// Say prints one line between the steps.
func (s *Steps) Say(line string) { s.line("  " + line) }

// Warn prints one line on what works less well than it could.
func (s *Steps) Warn(line string) { s.line("! " + line) }

func (s *Steps) line(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quiet {
		return
	}
	if s.stop != nil {
		fmt.Fprint(s.out, clearLine)
	}
	fmt.Fprintln(s.out, harmless(text))
}

// fit is what of a text one row has room for: a line of two is not cleared whole. All of it
// where that is not known.
func fit(text string, room int) string {
	if runes := []rune(text); room > 0 && len(runes) > room {
		return string(runes[:room-1]) + "…"
	}
	return text
}

// columns are those of a terminal; 0 where nobody knows.
func columns(out io.Writer) int {
	f, is := out.(*os.File)
	if !is {
		return 0
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}

func (s *Steps) spin(stop, stopped chan struct{}) {
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
		fmt.Fprintf(s.out, "%s%c %s", clearLine, frames[i%len(frames)], fit(text, columns(s.out)-3))
		s.mu.Unlock()
		select {
		case <-stop:
			fmt.Fprint(s.out, clearLine)
			return
		case <-tick.C:
		}
	}
}
