package privileged

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

const user = 61234 // of nobody on the machine

// inMachineWithSudo gives a machine with the real sudo, and copies this binary
// to where everybody may run it.
func inMachineWithSudo(t *testing.T, do func(t *testing.T, self string)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/cache"
	}
	sudo, err := resolvertest.Unpack(t.Context(), filepath.Join(cache, "culvert-e2e"), "sudo")
	if err != nil {
		t.Skip(err)
	}
	inMachine(t, func(t *testing.T) {
		// The overlay needs a lower layer that is not below a private folder.
		sh(t, fmt.Sprintf(`cp -a %s /run/sudo
			mount -t overlay overlay -o lowerdir=/run/sudo/usr:/usr /usr
			cp -a /run/sudo/etc/sudoers /run/sudo/etc/sudoers.d /run/sudo/etc/sudo.conf /etc/; cp -a /run/sudo/etc/pam.d/* /etc/pam.d/
			echo 'Defaults env_keep += "GORACE"' >/etc/sudoers.d/race; chmod 440 /etc/sudoers.d/race
			echo "tester:x:%d:%d::/:/bin/sh" >>/etc/passwd; echo "tester:x:%d:" >>/etc/group; echo "tester:*:20000:0:99999:7:::" >>/etc/shadow
			cp /proc/%d/exe /run/culvert; chmod 755 /run/culvert`, sudo, user, user, user, os.Getpid()))
		do(t, "/run/culvert")
	})
}

// asUser is the user's side, without root and without a terminal.
func asUser(self string) *exec.Cmd {
	cmd := exec.Command(self, "parent")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: user, Gid: user}}
	return cmd
}

// TestSudo: through the real sudo, the session begins and ends, and kill -9 of
// the user's side leaves nothing. With use_pty sudo gives its child a terminal
// of its own, which is the default of later versions.
func TestSudo(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		for _, defaults := range []string{"Defaults !use_pty", "Defaults use_pty"} {
			sh(t, fmt.Sprintf(`printf '%%s\ntester ALL=(root) NOPASSWD: %s privileged\n' '%s' >/etc/sudoers.d/culvert; chmod 440 /etc/sudoers.d/culvert`, self, defaults))
			before := snapshot(t)
			p := follow(t, asUser(self))
			changed(t, before)
			p.stdin.Close()
			if err := p.cmd.Wait(); err != nil {
				t.Errorf("%s: %v", defaults, err)
			}
			same(t, before)

			p = follow(t, asUser(self))
			changed(t, before)
			kill(t, p.cmd.Process.Pid, unix.SIGKILL)
			p.cmd.Wait()
			reap(t, p.child) // this is sudo, which ends after what it started
			same(t, before)
		}
	})
}

// TestSudoOnTerminal: a Ctrl-C typed there, which reaches everybody in the
// terminal, ends the user's side; the terminal's own end does as well.
func TestSudoOnTerminal(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		for _, defaults := range []string{"Defaults !use_pty", "Defaults use_pty"} {
			sh(t, fmt.Sprintf(`printf '%%s\ntester ALL=(root) NOPASSWD: %s privileged\n' '%s' >/etc/sudoers.d/culvert; chmod 440 /etc/sudoers.d/culvert`, self, defaults))
			for _, end := range []string{"\x03", ""} {
				before := snapshot(t)
				cmd := exec.Command("script", "-qec", self+" parent", "/dev/null")
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: user, Gid: user}}
				p := follow(t, cmd)
				changed(t, before)
				if end != "" {
					if _, err := p.stdin.Write([]byte(end)); err != nil {
						t.Fatal(err)
					}
				} else {
					kill(t, cmd.Process.Pid, unix.SIGKILL)
				}
				cmd.Wait()
				reapAll(t)
				same(t, before)
			}
		}
	})
}

// TestF28KillEverySubset: CASES 3.F 28, and 5.6 item 7: whichever of culvert, sudo and the
// child are killed at once, the machine is as before by those that live, and else by the next
// start or by Clean. Without a terminal, on one, where sudo has its child on another, and in
// the background when the terminal is gone.
func TestF28KillEverySubset(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		sh(t, fmt.Sprintf(`printf 'Defaults use_pty\ntester ALL=(root) NOPASSWD: %s privileged\n' >/etc/sudoers.d/culvert; chmod 440 /etc/sudoers.d/culvert`, self))
		before := snapshot(t)
		for _, mode := range []string{"without a terminal", "on a terminal", "background"} {
			for subset := 1; subset < 1<<3; subset++ {
				p := follow(t, asUserIn(mode, self))
				if mode == "background" {
					p.cmd.Wait() // and its terminal is gone
				}
				changed(t, before)
				killed := killAtOnce(t, self, subset)
				reapAll(t)
				p.stdin.Close()
				left := snapshot(t) != before
				if lost := subset&1 != 0 && subset&4 != 0; left && !lost {
					t.Errorf("%s, killed %v: %s", mode, killed, snapshot(t))
				}
				if err := tidy[subset%2](t); err != nil {
					t.Errorf("%s, killed %v: %v", mode, killed, err)
				}
				same(t, before)
			}
		}
	})
}

var tidy = []func(t *testing.T) error{
	func(t *testing.T) error { return Clean(t.Context(), Config{}) },
	func(t *testing.T) error {
		s, err := begin(t.Context())
		if err != nil {
			return err
		}
		return s.end()
	},
}

// asUserIn is the user's side as somebody begins it.
func asUserIn(mode, self string) *exec.Cmd {
	cmd := asUser(self)
	switch mode {
	case "on a terminal":
		cmd.Path, cmd.Args = "/usr/bin/script", []string{"script", "-qec", self + " parent", "/dev/null"}
	case "background":
		cmd.Path, cmd.Args = "/usr/bin/script", []string{"script", "-qec", self + " background", "/dev/null"}
	}
	return cmd
}

// killAtOnce kills those of the three whose bit is set, before any could see the end of
// another: culvert first, who would begin a new child.
func killAtOnce(t *testing.T, self string, subset int) (killed []string) {
	t.Helper()
	var all []int
	for bit, who := range []struct{ name, pattern string }{{"culvert", "^" + self + " parent"}, {"sudo", "^[^ ]*sudo "}, {"child", "^" + self + " privileged"}} {
		if subset&(1<<bit) == 0 {
			continue
		}
		killed = append(killed, who.name)
		for pid := range strings.FieldsSeq(sh(t, "pgrep -f '"+who.pattern+"'")) {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, n)
		}
	}
	// To stop them before would have sudo suspend itself. Its monitor, which is younger, would
	// kill the child if it saw sudo go.
	slices.Sort(all)
	for _, pid := range slices.Backward(all) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
	}
	return killed
}

// TestSudoAsksOnce: where sudo asks each time, it does so once a session. What a killed
// child left is told, since nobody is asked again for that, and the next start finds it.
func TestSudoAsksOnce(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		sh(t, fmt.Sprintf(`printf 'Defaults use_pty, timestamp_timeout=0\ntester ALL=(root) %s privileged\n' >/etc/sudoers.d/culvert; chmod 440 /etc/sudoers.d/culvert
			sed -i "s|^tester:[^:]*:|tester:$(openssl passwd -6 secret):|" /etc/shadow`, self))
		before := snapshot(t)
		for _, killed := range []bool{false, true} {
			cmd := asUserIn("on a terminal", self)
			cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", `{ sleep 1; echo secret; cat; } | script -qec "$0 parent" /dev/null`, self}
			p := follow(t, cmd)
			changed(t, before)
			if killed {
				killAtOnce(t, self, 4)
			}
			p.stdin.Close()
			p.cmd.Wait()
			reapAll(t)
			if left := snapshot(t) != before; left != killed {
				t.Errorf("killed %v, left something %v", killed, left)
			}
			if err := Clean(t.Context(), Config{}); err != nil {
				t.Error(err)
			}
			same(t, before)
		}
	})
}

// TestCapabilities: a binary that was given the two capabilities has device, routes and port
// 53 without sudo. The resolver's settings need root, and stay as they are.
func TestCapabilities(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		sh(t, "mount -t tmpfs none /mnt; mknod -m 666 /mnt/tun c 10 200; mount --bind /mnt/tun /dev/net/tun") // as distributions have it
		sh(t, "rm /etc/sudoers; setcap cap_net_admin,cap_net_bind_service+ep "+self)
		before, conf := snapshot(t), sh(t, "cat /etc/resolv.conf")
		for _, killed := range []bool{false, true} {
			p := follow(t, asUser(self))
			if now := sh(t, "ip route; ss -Hlnu; cat /etc/resolv.conf"); !strings.Contains(now, "10.96.0.0/12 dev culvert0") || !strings.Contains(now, "198.18.0.1:53") || !strings.HasSuffix(now, conf) {
				t.Error(now)
			}
			if killed {
				kill(t, p.cmd.Process.Pid, unix.SIGKILL)
			}
			p.stdin.Close()
			if err := p.cmd.Wait(); err != nil && !killed {
				t.Error(err)
			}
			reapAll(t)
			same(t, before)
		}
	})
}

// reapAll waits until nobody else is left in the namespace.
func reapAll(t *testing.T) {
	t.Helper()
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
			return
		}
	}
}

func TestSudoRefuses(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		before := snapshot(t)
		cmd := asUser(self)
		var said bytes.Buffer
		cmd.Stderr = &said
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) {
			t.Errorf("ended with %v", err)
		}
		if !strings.Contains(said.String(), "start the privileged part: sudo: a password is required: "+ErrNotPermitted.Error()) {
			t.Errorf("said %s", said.String())
		}
		same(t, before)
	})
}

// TestSudoLogsInput: then the child's standard input is no socket, which has
// to be said.
func TestSudoLogsInput(t *testing.T) {
	inMachineWithSudo(t, func(t *testing.T, self string) {
		sh(t, fmt.Sprintf(`printf 'Defaults log_input\ntester ALL=(root) NOPASSWD: %s privileged\n' >/etc/sudoers.d/culvert; chmod 440 /etc/sudoers.d/culvert`, self))
		before := snapshot(t)
		out, err := asUser(self).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "sudo must not log its input") {
			t.Errorf("%v: %s", err, out)
		}
		same(t, before)
	})
}
