package resolvertest

import (
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// InMachine runs do, the rest of test t, in mount, network and PID namespaces
// of its own, in another run of the test binary. What it does to /etc and /run
// there is gone afterwards. It needs root.
func InMachine(t *testing.T, do func(*testing.T)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	if os.Getenv("RESOLVERTEST_IN") == t.Name() {
		enter(t)
		do(t)
		return
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	// The race detector would have every process sleep a second at its end.
	cmd.Env = append(os.Environ(), "RESOLVERTEST_IN="+t.Name(), "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}

// enter makes the namespaces a machine of its own: /proc, /run and an /etc
// over the real one.
func enter(t *testing.T) {
	t.Helper()
	if os.Getpid() != 1 {
		t.Fatal("not in a PID namespace of its own")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(unix.Mount("proc", "/proc", "proc", 0, ""))
	must(unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"))
	must(os.MkdirAll("/run/etc/upper", 0o755))
	must(os.MkdirAll("/run/etc/work", 0o755))
	must(unix.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work"))
}
