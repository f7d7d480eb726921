package resolvertest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
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

// Install lays unpacked packages over the machine of InMachine, as if they had
// been installed there without being configured. It works once.
func Install(dirs ...string) error {
	var lower []string
	for i, dir := range dirs {
		usr := fmt.Sprintf("/run/packages/%d", i)
		lower = append(lower, usr)
		// Packages say /sbin where the machine has /usr/sbin.
		script := `mkdir -p "$2"; cd "$1"; for d in bin sbin lib; do if [ -d $d ]; then cp -a $d "$2"; fi; done
			if [ -d usr ]; then cp -a usr/. "$2"; fi; if [ -d etc ]; then cp -an etc/. /etc; fi`
		if err := run(exec.Command("sh", "-ec", script, "sh", dir, usr)); err != nil {
			return err
		}
	}
	if err := unix.Mount("overlay", "/usr", "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(append(lower, "/usr"), ":")); err != nil {
		return fmt.Errorf("lay packages over /usr: %w", err)
	}
	return nil
}

// StartBus runs a system bus in the machine of InMachine for as long as that
// lasts, for programs that bring none.
func StartBus() error {
	cmd := exec.Command("sh", "-ec", `mkdir -p /run/dbus; cat >/run/dbus/resolvertest.conf
		dbus-daemon --config-file=/run/dbus/resolvertest.conf --nopidfile --fork`)
	cmd.Stdin = strings.NewReader(bus)
	return run(cmd)
}
