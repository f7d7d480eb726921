package session

import (
	"bufio"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/culvert-dev/culvert/pkg/process"
)

func TestEnvFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "env")
	environ := []string{"PLAIN=a:b/c=d", "EMPTY=", "SPACED=good day", "LINES=red,\ngreen", `QUOTED="x"`}
	for range 2 { // the second time over the first
		if err := writeEnvFile(path, environ); err != nil {
			t.Fatal(err)
		}
	}
	want := envFileMark + "PLAIN=a:b/c=d\nEMPTY=\nSPACED=\"good day\"\nLINES=\"red,\\ngreen\"\nQUOTED=\"\\\"x\\\"\"\n"
	if text, err := os.ReadFile(path); err != nil || string(text) != want {
		t.Errorf("%q, %v", text, err)
	}
	if s, err := os.Stat(path); err != nil || s.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", s.Mode(), err)
	}
	if err := removeEnvFile(path); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if err := os.WriteFile(path, []byte("MINE=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeEnvFile(path, environ); !errors.Is(err, fs.ErrExist) {
		t.Errorf("somebody else's file: %v", err)
	}
	if err := removeEnvFile(path); err != nil {
		t.Error(err)
	}
	if text, _ := os.ReadFile(path); string(text) != "MINE=1\n" {
		t.Errorf("somebody else's file is now %q", text)
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".culvert*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The command ends when it is its turn, or at once for who is in a hurry.
func TestLocalEnds(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no shell here")
	}
	for _, hurried := range []bool{false, true} {
		hurry := make(chan struct{})
		c := newCourse(silent{}, slog.New(slog.DiscardHandler))
		c.life, c.end = context.WithCancel(t.Context())
		c.gctx, c.fail = context.WithCancelCause(c.life)
		r, w := io.Pipe()
		end := c.start(process.Config{Args: []string{"sh", "-c", `trap "echo told; exit 3" INT; echo up; while :; do sleep 0.01; done`}, Stdout: w}, hurry)
		said := bufio.NewScanner(r)
		if said.Scan(); said.Text() != "up" {
			t.Fatal(said.Text())
		}
		stopped := make(chan struct{})
		stop := func() { end(); close(stopped) }
		if hurried {
			close(hurry)
		} else {
			go stop()
		}
		if said.Scan(); said.Text() != "told" {
			t.Errorf("hurried %v: %q", hurried, said.Text())
		}
		if hurried {
			stop()
		}
		<-stopped
		c.end()
		c.group.Wait()
		if err := context.Cause(c.gctx); !errors.Is(err, context.Canceled) {
			t.Errorf("hurried %v: %v", hurried, err)
		}
	}
}

func TestWithEnviron(t *testing.T) {
	got := withEnviron([]string{"PATH=/here", "X=1"}, []string{"PATH=/there", "HOME=/root", "X=2", "Y=3"})
	if want := []string{"PATH=/here", "X=1", "X=2", "Y=3"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
