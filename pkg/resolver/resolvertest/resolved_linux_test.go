package resolvertest

import (
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestEnter starts systemd-resolved in another process's namespaces, as a
// harness with a laptop in namespaces does, and ends it.
func TestEnter(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/cache"
	}
	program, err := Fetch(t.Context(), filepath.Join(cache, "culvert-e2e"))
	if err != nil {
		t.Fatal(err)
	}
	laptop := exec.Command("sh", "-ec", `mount --make-rprivate /; mount -t proc proc /proc; mount -t tmpfs tmpfs /run
		mkdir /run/upper /run/work; mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work /etc
		ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up
		echo ready; read wait`)
	laptop.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	laptop.Stderr = os.Stderr
	in, err := laptop.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := laptop.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := laptop.Start(); err != nil {
		t.Fatal(err)
	}
	defer laptop.Wait()
	defer in.Close()
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	enter := []string{"nsenter", "-t", strconv.Itoa(laptop.Process.Pid), "-m", "-n", "-p"}
	cfg := Config{Enter: enter, Upstream: map[string]netip.Addr{"up0": netip.MustParseAddr("10.9.0.53")}, Log: os.Stderr}
	stop, err := program.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	there := func(script string) string {
		t.Helper()
		got, err := cfg.command(t.Context(), "sh", "-ec", script).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v", script, err)
		}
		return string(got)
	}
	if got := there(program.Resolvectl() + " dns; cat /etc/resolv.conf; ss -Hlnu"); !strings.Contains(got, "(up0): 10.9.0.53") || !strings.Contains(got, "nameserver 127.0.0.53") || !strings.Contains(got, "127.0.0.53%lo:53") {
		t.Errorf("there: %s", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if left := there("ps -e -o comm= | grep -E 'dbus|resolve' || true"); left != "" {
		t.Errorf("left %s", left)
	}
}
