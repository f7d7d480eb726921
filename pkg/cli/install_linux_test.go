package cli

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// machine is a root of its own over the real one, with systemd as its first process: $1 is
// what becomes /usr/local/bin/culvert. Of systemd's units only those run that are asked for,
// and what is the real machine's, as sysctls and devices, it cannot change.
const machine = `
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
cp "$1" /mnt/root/usr/local/bin/culvert
cd /mnt/root
rm -rf lib/systemd/system/*.wants etc/systemd/system/*.wants lib/systemd/system-generators etc/culvert
: >etc/fstab
for d in dev run tmp sys; do mount -t tmpfs tmpfs $d; done
for d in null zero full random urandom tty; do touch dev/$d; mount -o bind /dev/$d dev/$d; done
mkdir dev/shm dev/pts sys/fs sys/fs/cgroup
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t proc proc proc
mount -o bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -o remount,ro sys
ip link set lo up
pivot_root . mnt
cd /
umount -l /mnt
mount --make-rshared /
exec env -i container=culvert PATH="$PATH" /lib/systemd/systemd --system --unit=basic.target --show-status=no
`

// bootMachine returns how to run a command there.
func bootMachine(t *testing.T) func(args ...string) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	for _, program := range []string{"/lib/systemd/systemd", "unshare", "nsenter", "ip"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("not here:", err)
		}
	}
	group := filepath.Join(cgroups(t), fmt.Sprintf("culvert-test-%d", os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skip("no cgroup to be had:", err)
	}
	dir, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var said bytes.Buffer
	cmd := exec.Command("unshare", "--cgroup", "sh", "-ec", machine, "sh", "/proc/self/exe")
	cmd.Args[len(cmd.Args)-1], _ = os.Executable()
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL, UseCgroupFD: true, CgroupFD: int(dir.Fd()),
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the machine said: %s", &said)
		}
		removeGroup(t, group)
	})
	inside := func(args ...string) *exec.Cmd {
		return exec.Command("nsenter", append([]string{"-t", fmt.Sprint(cmd.Process.Pid), "-a"}, args...)...)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if out, _ := inside("systemctl", "is-system-running").Output(); strings.TrimSpace(string(out)) == "running" {
			return inside
		}
		if time.Now().After(end) {
			t.Fatal("systemd does not come up")
		}
	}
}

// cgroups is where those of version 2 are.
func cgroups(t *testing.T) string {
	t.Helper()
	mounts, err := os.Open("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	defer mounts.Close()
	for in := bufio.NewScanner(mounts); in.Scan(); {
		if f := strings.Fields(in.Text()); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Skip("no cgroups of version 2 are mounted")
	return ""
}

// removeGroup removes it when its last process has gone.
func removeGroup(t *testing.T, group string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var all []string
		_ = filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		slices.Reverse(all) // deepest first
		var errs error
		for _, path := range all {
			errs = errors.Join(errs, syscall.Rmdir(path))
		}
		if errs == nil {
			return
		}
		if time.Now().After(end) {
			t.Error(errs)
			return
		}
	}
}

// The agent is installed as a service of a real systemd: it runs as nobody else does, tells
// how it is, is started again when it is killed, and is taken away without its key.
func TestInstall(t *testing.T) {
	inside := bootMachine(t)
	sh := func(script string) string {
		t.Helper()
		out, err := inside("sh", "-ec", "cd /root; mkdir -p w; cd w; "+script).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	show := func(property string) string { return sh("systemctl show --value -p " + property + " culvert-agent") }
	await := func(property, want string) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !strings.HasPrefix(show(property), want); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s is %q, want %q", property, show(property), want)
			}
		}
	}
	sh(`for k in hub me; do ssh-keygen -q -t ed25519 -N '' -C $k -f $k; done; echo "permitopen=\"db-*:*\" $(cat me.pub)" >keys`)
	hub := inside("sh", "-c", "cd /root/w; exec culvert hub --listen 127.0.0.1:8443 --authorized-keys keys --host-key hub")
	if err := hub.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hub.Process.Kill(); _ = hub.Wait() })

	if said := sh(`culvert agent --hub 127.0.0.1:8443 --name db-01 --offer 8443 --hub-key "$(cat hub.pub)" --install`); !strings.Contains(said, "authorized_keys needs a line") {
		t.Errorf("it says %q", said)
	}
	await("StatusText", "not connected to the hub 127.0.0.1:8443")
	sh(`echo "permitlisten=\"db-01:*\" $(cat /etc/culvert/agent_key.pub)" >>keys`)
	await("StatusText", "offered as db-01: 8443/tcp")
	if got := show("ActiveState") + " " + show("Type") + " " + show("UnitFileState"); got != "active notify enabled" {
		t.Error(got)
	}
	pid := show("MainPID")
	if uid := sh("stat -c %u /proc/" + pid); uid == "0" {
		t.Error("it runs as root")
	}
	const dial = `printf 'GET /healthz HTTP/1.0\r\n\r\n' | culvert dial --hub 127.0.0.1:8443 --hub-key "$(cat hub.pub)" --key me db-01:8443`
	if got := sh(dial); !strings.HasPrefix(got, "HTTP/1.1 200 OK") {
		t.Errorf("%q", got)
	}
	sh("kill -9 " + pid)
	await("NRestarts", "1")
	await("StatusText", "offered as db-01: 8443/tcp")
	if got := sh(dial); !strings.HasPrefix(got, "HTTP/1.1 200 OK") {
		t.Errorf("after it was killed: %q", got)
	}
	t.Log(sh("systemd-analyze security --no-pager culvert-agent.service | tail -1"))

	sh("culvert agent --uninstall")
	if got := show("ActiveState") + " " + show("LoadState"); got != "inactive not-found" {
		t.Error(got)
	}
	if got := sh("ls /etc/culvert"); got != "agent_key\nagent_key.pub" {
		t.Errorf("left are %q", got)
	}
}
