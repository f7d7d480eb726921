//go:build unix

package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// background is this program in front, and then again, behind it. There it runs something
// that outlives it, and that tells what it has inherited.
func background(log, end string) int {
	detach := Detachment()
	if detach == nil {
		os.Setenv("CULVERT_PROCESS_TEST", "background")
		var ended *ExitError
		if err := Background(context.Background(), log, os.Args[1:]); errors.As(err, &ended) {
			return ended.Code
		} else if err != nil {
			fmt.Println(err)
			return 1
		}
		return 0
	}
	outlives := exec.Command("sh", "-c", `{ echo "$CULVERT_BACKGROUND_LOG"; readlink /proc/self/fd/3; echo all; } >"$0"; exec sleep 3`, log+".inherited")
	if err := outlives.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	for {
		if b, err := os.ReadFile(log + ".inherited"); err == nil && bytes.HasSuffix(b, []byte("all\n")) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if end == "early" {
		return 7
	}
	if err := detach(); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("behind")
	return 0
}

// Who goes to the background, or dies on the way there, is not waited for any longer
// because of what it has started; nor does that inherit how.
func TestBackground(t *testing.T) {
	for end, want := range map[string]int{"well": 0, "early": 7} {
		log := filepath.Join(t.TempDir(), "log")
		cmd := exec.Command(os.Args[0], log, end)
		cmd.Env = append(os.Environ(), "CULVERT_PROCESS_TEST=background")
		begin := time.Now()
		out, err := cmd.Output()
		code := cmd.ProcessState.ExitCode()
		if code != want || len(out) > 0 || time.Since(begin) > 2*time.Second {
			t.Errorf("%s: %v, %q after %v, want %d", end, err, out, time.Since(begin), want)
		}
		if got, _ := os.ReadFile(log + ".inherited"); strings.TrimSpace(string(got)) != "all" {
			t.Errorf("%s: what it started inherited %q", end, got)
		}
		if end == "well" {
			await(t, "its log", func() bool { b, _ := os.ReadFile(log); return string(b) == "behind\n" })
		}
	}
}
