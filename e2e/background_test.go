package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A session in the background outlives the terminal that it was begun on, and is ended
// from anywhere.
func TestBackground(t *testing.T) {
	check := noTrace(t)
	state := t.TempDir()
	t.Setenv("XDG_STATE_HOME", state)
	s, keys := typeAt(t, "connect", "-d", "-n", namespace)
	t.Cleanup(func() { try(culvertBin, "disconnect", "--all") })
	if code := s.wait(patience); code != 0 {
		t.Fatalf("%d, %s", code, s.talk.String())
	}
	for _, want := range []string{"connected to ", "; culvert disconnect puts everything back", "what it says from now on is in " + state} {
		eventually(t, time.Second, "the terminal shows it", func() error {
			if said := s.talk.String(); !strings.Contains(said, want) {
				return fmt.Errorf("%q is not said: %s", want, said)
			}
			return nil
		})
	}
	keys.Close() // the terminal is gone
	pid := theStatus(t).PID
	laptop(t, "curl", "-sSf", urlOf("web", ""))

	_, talk, err := try(culvertBin, "connect", "-d", "-n", namespace)
	if err != nil || !strings.Contains(talk, "already") || theStatus(t).PID != pid {
		t.Errorf("once more: %v, %s", err, talk)
	}
	watch := startAs(t, on(laptopHost, culvertBin, "status", "--watch"))
	eventually(t, 10*time.Second, "two pages of status", func() error {
		if strings.Count(watch.talk.String(), "session ") < 2 {
			return errors.New(watch.talk.String())
		}
		return nil
	})
	watch.stop()

	_, talk, err = try(culvertBin, "disconnect", "-n", namespace)
	if err != nil || !strings.Contains(talk, "✓ disconnected from ") {
		t.Errorf("disconnect: %v, %s", err, talk)
	}
	logs, _ := filepath.Glob(filepath.Join(state, "culvert", "*.log"))
	if len(logs) != 1 {
		t.Fatalf("logs: %q", logs)
	}
	eventually(t, 5*time.Second, "the log tells of the end", func() error {
		log, err := os.ReadFile(logs[0])
		if err != nil || !strings.Contains(string(log), "✓ this machine and the cluster are as before") || strings.ContainsRune(string(log), 0x1b) {
			return fmt.Errorf("%w, %q", err, log)
		}
		return nil
	})
	check(10 * time.Second)

	if _, talk, err = try(culvertBin, "disconnect"); err != nil || !strings.Contains(talk, "not connected") {
		t.Errorf("disconnect without a session: %v, %s", err, talk)
	}
}

// What fails before it is connected fails on the terminal, and Ctrl-C ends it.
func TestBackgroundFails(t *testing.T) {
	check := noTrace(t)
	_, talk, err := try(culvertBin, "connect", "-d", "-n", "no-such-namespace")
	if exitCode(err) != 1 || strings.Count(talk, "culvert: error: ") != 1 {
		t.Errorf("no such namespace: %v, %s", err, talk)
	}
	s := startAs(t, on(laptopHost, culvertBin, "connect", "-d", "-n", namespace))
	s.says("privileged child ready")
	if err := unix.Kill(s.cmd.Process.Pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := s.wait(30 * time.Second); code != 0 {
		t.Errorf("told to end on its way: %d, %s", code, s.talk.String())
	}
	check(10 * time.Second)
}
