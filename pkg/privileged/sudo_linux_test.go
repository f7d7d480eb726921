package privileged

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
