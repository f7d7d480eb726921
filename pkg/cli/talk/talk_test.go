package talk

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

// A step that fails is told, and its spinner ends, when what follows begins.
func TestStepFails(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		var out bytes.Buffer
		s := &Steps{out: &out, terminal: terminal}
		s.Begin("one")
		s.Begin("two")
		s.Done("two is done")
		if text := out.String(); !strings.Contains(text, "✗ one") || !strings.Contains(text, "✓ two is done") {
			t.Errorf("terminal %v: %q", terminal, text)
		}
	}
}

// A row has room for a part of a long text.
func TestFit(t *testing.T) {
	for _, c := range []struct {
		text string
		room int
		want string
	}{{"über", 4, "über"}, {"übers", 4, "übe…"}, {"ab", 1, "…"}, {"ab", 0, "ab"}, {"ab", -3, "ab"}} {
		if got := fit(c.text, c.room); got != c.want {
			t.Errorf("%q in %d: %q", c.text, c.room, got)
		}
	}
}

// What a host, or a hub, says does nothing to a terminal.
func TestHarmless(t *testing.T) {
	var out bytes.Buffer
	Explain(&out, errors.New("it says \x1b]0;x\a\u009b2J\xff\r\nno"), "do\x1b[A\nthis")
	s := &Steps{out: &out, verbose: true}
	s.Say("\x1b[2Jé")
	s.Begin("go\x1bc\non")
	s.Progress("at\u009bit\n::add-mask::x")
	if got, want := out.String(), "culvert: error: it says  ]0;x  2J?; no\nculvert: hint: do [A; this\n   [2Jé\n… go c; on\n… go c; on: at it; ::add-mask::x\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	out.Reset()
	if s.Done("done\x1b[A\n::x"); !strings.HasPrefix(out.String(), "✓ done [A; ::x  ") || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	s = &Steps{out: &out, terminal: true}
	s.Begin("one\x1b[A")
	s.Progress("two\x1b[B")
	if s.Fail(); strings.Contains(out.String(), "\x1b[A") || strings.Contains(out.String(), "\x1b[B") {
		t.Errorf("%q", out.String())
	}
}

// The first signal ends what goes on; a second Ctrl-C is told to who can hurry, but
// not what a terminal says that closes.
func TestInterruptible(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	p := Person{Err: w}
	ctx, stop := p.Interruptible()
	defer stop()
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	talk := bufio.NewScanner(r)
	closes := syscall.SIGHUP
	if signal.Ignored(closes) { // as nohup(1) has it
		closes = syscall.SIGTERM
	}
	for n, s := range []os.Signal{closes, closes, closes, os.Interrupt} {
		select {
		case <-p.Hurry:
			t.Error("hurry, without a Ctrl-C")
		default:
		}
		if err := self.Signal(s); err != nil {
			t.Skipf("no signals here: %v", err)
		}
		if <-ctx.Done(); n > 0 && !talk.Scan() {
			t.Fatal(talk.Err())
		}
	}
	<-p.Hurry
}
