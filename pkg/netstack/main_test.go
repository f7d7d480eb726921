//go:build linux

package netstack_test

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestMain runs everything once more, in a network namespace that is gone when
// the tests are. Who is not root runs what needs none; fuzzing needs none, and
// its workers are not to be run by another hand.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" || os.Getuid() != 0 || strings.Contains(strings.Join(os.Args, " "), "-test.fuzz") {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		panic(err)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

const inside = "CULVERT_TEST_NETNS"

func needNetns(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs root, to make a network namespace")
	}
}
