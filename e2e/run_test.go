package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// withTUN gives a user the device as distributions have it: open to everybody.
const withTUN = `mount -t tmpfs none /mnt; mknod -m 666 /mnt/tun c 10 200; mount --bind /mnt/tun /dev/net/tun
exec setpriv --reuid ` + devUID + ` --regid ` + devUID + ` --clear-groups `

// runs is "culvert run" by an ordinary user of the laptop.
func runs(args ...string) *exec.Cmd {
	c := on(laptopHost, append([]string{"unshare", "--mount", "--propagation=private", "sh", "-ec", withTUN + culvertBin + ` run "$@"`, "sh", "-n", namespace}, args...)...)
	c.Env = append(c.Env, "KUBECONFIG=", "HOME=/run/home/dev") // whose own kubeconfig is dev's
	return c
}

// ran runs a script to its end, and returns what it printed.
func ran(t testing.TB, flags []string, script string) (stdout string, code int) {
	t.Helper()
	together(t)
	var out, talk bytes.Buffer
	c := runs(append(flags, "--", "sh", "-c", script)...)
	c.Stdout, c.Stderr = &out, &talk
	late := time.AfterFunc(patience, func() { _ = c.Process.Signal(syscall.SIGTERM) })
	defer late.Stop()
	err := c.Run()
	if t.Failed() || exitCode(err) > 3 {
		t.Logf("%s: %v\n%s%s", script, err, out.String(), talk.String())
	}
	return strings.TrimSpace(out.String()), exitCode(err)
}

// mayRun gives dev the Role of connect, and kit a place where dev may run it.
func mayRun(t testing.TB) (kitPath string) {
	t.Helper()
	grant(t, namespace, rbac(t, "-n", namespace))
	dir := openDir(t)
	b, err := os.ReadFile(kit(t))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "kit"), b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "kit")
}

// What a command reaches, by programs that ask libc and by one that does not, is said by
// a script of the questions here: each prints one line.
func TestRun(t *testing.T) {
	kit := mayRun(t)
	laptopApp(t, laptopName, 0)
	check, machine := noTrace(t), dumpLaptop(t)
	s := startAs(t, runs("--", "sh", "-c", "echo it is up; exec sleep 321"))
	s.says("it is up")
	t.Run("the machine is as before meanwhile", func(t *testing.T) {
		notReached(t)
		if d := difference(machine, dumpLaptop(t)); d != "" {
			t.Error(d)
		}
	})
	t.Run("status", func(t *testing.T) {
		table := laptop(t, culvertBin, "status")
		if !strings.Contains(table, "sh -c 'echo it is up; exec sleep 321'") {
			t.Error(table)
		}
	})
	asked := map[string]struct{ script, want, only string }{
		"name, by libc":           {"curl -sS --max-time 10 http://web.shop/ | grep -o '\"pod\":\"web-' | head -1", `"pod":"web-`, `"pod":"web-`},
		"short name, static":      {kit + " dial tcp multi:7 hello", "hello", "hello"},
		"UDP":                     {kit + " dial udp udp.shop:7 hello", "hello", "hello"},
		"getent":                  {"getent hosts web.shop.svc.cluster.local | awk '{print $1}'", serviceIP(t, "web"), serviceIP(t, "web")},
		"dig":                     {"dig +short db-0.db.shop.svc.cluster.local | wc -l", "1", "1"},
		"ping":                    {"ping -c1 -W5 " + podIPs(t, "app=web")[0] + " | grep -o '1 received'", "1 received", "1 received"},
		"pod, IPv6":               {"curl -sS --max-time 10 http://[" + podIPs6(t, "app=web")[0] + "]:8080/ | grep -o '\"pod\":\"web-' | head -1", `"pod":"web-`, `"pod":"web-`},
		"refused":                 {"curl -sS --max-time 10 http://" + serviceIP(t, "empty") + "/ >/dev/null 2>&1; echo $?", "7", "7"},
		"outside, by name":        {"curl -sS --max-time 10 http://intranet.corp.example/ 2>/dev/null | grep -o ^outside || echo none", "outside", "none"},
		"outside, by address":     {"curl -sS --max-time 10 http://172.31.0.1/ >/dev/null 2>&1; echo $?", "0", "7"},
		"the machine's localhost": {"curl -sS --max-time 10 http://localhost:8080/ >/dev/null 2>&1; echo $?", "0", "7"},
		"its own localhost":       {kit + " serve -name own -offset 1000 2>/dev/null & sleep 0.5; curl -sS --max-time 10 http://127.0.0.1:9080/ >/dev/null 2>&1; echo $?; kill $!", "0", "0"},
		"user":                    {"id -u", devUID, devUID},
	}
	var questions []string
	var script strings.Builder
	for name, a := range asked {
		questions = append(questions, name)
		fmt.Fprintf(&script, "echo $( %s )\n", a.script)
	}
	for _, flags := range [][]string{nil, {"--only"}} {
		t.Run(strings.Join(append(flags, "reached"), " "), func(t *testing.T) {
			out, code := ran(t, flags, script.String())
			answers := strings.Split(out, "\n")
			if code != 0 || len(answers) != len(questions) {
				t.Fatalf("code %d: %s", code, out)
			}
			for i, q := range questions {
				want := asked[q].want
				if flags != nil {
					want = asked[q].only
				}
				if answers[i] != want {
					t.Errorf("%s: %q, want %q", q, answers[i], want)
				}
			}
		})
	}
	t.Run("another is there at the same time", func(t *testing.T) {
		if !s.alive() {
			t.Error("it is not")
		}
	})
	s.interrupt()
	if code := s.wait(patience); code != 128+2 {
		t.Errorf("after an interrupt culvert ended with %d\n%s", code, s.talk.String())
	}
	check(30 * time.Second)
}

// Somebody rewrites resolv.conf outside, as a DHCP client does by a new file, and the mount
// over the old one goes with that: names are answered as before.
func TestRunResolvConfRewritten(t *testing.T) {
	mayRun(t)
	check := noTrace(t)
	flag := filepath.Join(openDir(t), "flag")
	const ask = "curl -sS --max-time 10 http://web.shop/ | grep -o 'pod\":\"web-' | head -1; grep -c ^nameserver.198.18. /etc/resolv.conf"
	s := startAs(t, runs("--", "sh", "-c", ask+"; echo it is up; until test -e "+flag+"; do sleep 0.1; done; "+ask+"; exit 9"))
	s.says("it is up")
	laptop(t, "sh", "-ec", "cd /etc; cp -p resolv.conf resolv.conf.new; mv resolv.conf.new resolv.conf; touch "+flag)
	if code := s.wait(patience); code != 9 || !strings.Contains(s.talk.String(), "pod\":\"web-\n1\nit is up\npod\":\"web-\n0\n") {
		t.Errorf("%d\n%s", code, s.talk.String())
	}
	check(30 * time.Second)
}

// Where resolv.conf is systemd-resolved's, it and its sockets are hidden, and it hears of
// nothing.
func TestRunResolved(t *testing.T) {
	resolvectl := resolvedLaptop(t)
	mayRun(t)
	check, told := noTrace(t), must(dumpResolved(resolvectl))
	out, code := ran(t, nil, `getent hosts web.shop | awk '{print $1}'; getent ahostsv4 intranet.corp.example | awk '{print $1; exit}'
		grep -c ^nameserver.198.18. /etc/resolv.conf; test -S /run/systemd/resolve/io.systemd.Resolve; echo $?`)
	if want := serviceIP(t, "web") + "\n172.31.0.1\n1\n1"; code != 0 || out != want {
		t.Errorf("%d\n%s\nwant\n%s", code, out, want)
	}
	check(30 * time.Second)
	if d := difference(told, must(dumpResolved(resolvectl))); d != "" {
		t.Error(d)
	}
}

// How a command ends is how culvert does.
func TestRunEnds(t *testing.T) {
	mayRun(t)
	check := noTrace(t)
	var all sync.WaitGroup // several at a time
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "kill -TERM $$": 128 + 15, "/no/such/command": 127, "trap 'exit 9' TERM; kill -TERM $$; sleep 1": 9} {
		all.Go(func() {
			if _, code := ran(t, nil, script); code != want {
				t.Errorf("%q: %d, want %d", script, code, want)
			}
		})
	}
	all.Wait()
	refusal{127, []string{"no-such-command", "not found"}, ""}.check(t, runs("--", "no-such-command"))
	refusal{126, []string{"/etc/passwd", "permission denied"}, ""}.check(t, runs("--", "/etc/passwd"))
	refusal{2, []string{"a command is missing"}, "culvert --help"}.check(t, runs())
	t.Run("standard input and output", func(t *testing.T) {
		c := runs("--", "tr", "a-z", "A-Z")
		c.Stdin = strings.NewReader(strings.Repeat("hello\n", 100_000))
		out, err := c.Output()
		if err != nil || string(out) != strings.Repeat("HELLO\n", 100_000) {
			t.Errorf("%d bytes, %v", len(out), err)
		}
	})
	t.Run("a signal", func(t *testing.T) {
		s := startAs(t, runs("--", "sh", "-c", "trap 'echo heard; exit 9' INT; echo it is up; while :; do sleep 0.1; done"))
		s.says("it is up")
		s.interrupt()
		if code := s.wait(patience); code != 9 || !strings.Contains(s.talk.String(), "heard") {
			t.Errorf("%d\n%s", code, s.talk.String())
		}
	})
	t.Run("what it leaves behind", func(t *testing.T) {
		s := startAs(t, runs("--", "sh", "-c", "setsid sleep 321 & sleep 0.2; exit 3"))
		if code := s.wait(patience); code != 3 || !strings.Contains(s.talk.String(), "sh has ended, and what it left behind is told to: sleep (") {
			t.Errorf("%d\n%s", code, s.talk.String())
		}
		if out, _, err := try("pgrep", "-x", "sleep"); err == nil {
			t.Errorf("%s still runs", out)
		}
	})
	t.Run("nohup", func(t *testing.T) {
		c := runs("--", "sh", "-c", "kill -HUP $PPID; kill -HUP $$; curl -sSf --max-time 10 -o /dev/null http://web.shop/ && exit 9")
		i := slices.IndexFunc(c.Args, func(a string) bool { return strings.HasPrefix(a, withTUN) })
		c.Args[i] = "trap '' HUP\n" + c.Args[i]
		s := startAs(t, c)
		if code := s.wait(patience); code != 9 {
			t.Errorf("%d\n%s", code, s.talk.String())
		}
	})
	t.Run("a signal before it begins", func(t *testing.T) {
		s := startAs(t, runs("--", "sh", "-c", "echo has begun"))
		s.says("rights checked")
		s.interrupt()
		if code := s.wait(patience); code != 128+2 || strings.Contains(s.talk.String(), "has begun") {
			t.Errorf("%d\n%s", code, s.talk.String())
		}
	})
	check(30 * time.Second)
}

// On a terminal the command has it: what is typed, and Ctrl-C.
func TestRunTerminal(t *testing.T) {
	mayRun(t)
	check := noTrace(t)
	c := runs("--", "sh", "-c", "trap 'echo heard' INT; test -t 0 && test -t 1 && echo it is up; until read a; do :; done; echo said $a; exit 9")
	s, typed := onTerminal(t, c, quoted(c.Args[4:]))
	s.says("it is up")
	fmt.Fprint(typed, "\x03")
	s.says("heard")
	fmt.Fprint(typed, "word\n")
	if code := s.wait(patience); code != 9 || !strings.Contains(s.talk.String(), "said word") {
		t.Errorf("%d\n%s", code, s.talk.String())
	}
	typed.Close()
	check(30 * time.Second)
}

// onTerminal starts a line on one, in place of a command of the laptop. script's terminal is
// that of all it runs, and what comes on its input is typed there.
func onTerminal(t *testing.T, c *exec.Cmd, line string) (s *running, typed io.WriteCloser) {
	t.Helper()
	c.Args = []string{c.Args[0], "exec", laptopHost, "--", "script", "-qec", "exec " + line, "/dev/null"} // by a shell that has no part in Ctrl-C
	typed, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	return startAs(t, c), typed
}

// A command that suspends itself gives the terminal back to the shell, with culvert, and has
// its network again when both go on.
func TestRunSuspended(t *testing.T) {
	mayRun(t)
	check := noTrace(t)
	c := runs("--", "sh", "-c", "kill -STOP $$; curl -sSf --max-time 20 -o /dev/null http://web.shop/ && echo reached' 'it")
	line := quoted(c.Args[4:])
	s, typed := onTerminal(t, c, "bash --norc --noprofile --noediting -i")
	fmt.Fprintln(typed, line)
	s.says("Stopped")
	fmt.Fprintln(typed, "fg")
	s.says("reached it")
	fmt.Fprintln(typed, "exit 9")
	if code := s.wait(patience); code != 9 {
		t.Errorf("%d\n%s", code, s.talk.String())
	}
	typed.Close()
	check(30 * time.Second)
}

// quoted is what a shell takes for these arguments.
func quoted(args []string) string {
	var words []string
	for _, a := range args {
		words = append(words, "'"+strings.ReplaceAll(a, "'", `'\''`)+"'")
	}
	return strings.Join(words, " ")
}

// When culvert is killed its command is told, and has no network any more.
func TestRunKilled(t *testing.T) {
	config := filepath.Join(openDir(t), "config")
	if err := os.WriteFile(config, must(os.ReadFile(kubeconfig)), 0o644); err != nil {
		t.Fatal(err)
	}
	check := noTrace(t)
	c := runs(shortGrace, "--", "sh", "-c", "echo it is up; exec sleep 321")
	c.Env = append(c.Env, "KUBECONFIG="+config)
	s := startAs(t, c)
	s.says("it is up")
	st, at := theStatus(t), time.Now()
	kill9(t, st.PID)
	s.wait(10 * time.Second)
	eventually(t, 10*time.Second, "the command ends", func() error {
		if out, _, err := try("pgrep", "-x", "sleep"); err == nil {
			return errors.New(out)
		}
		return nil
	})
	goesByItself(t, st.Session, check, at, 15*time.Second)
}

// Where no ordinary user may make namespaces, culvert says so before it changes anything.
func TestRunRefused(t *testing.T) {
	mayRun(t)
	check := noTrace(t)
	changed := func(old, now string) *exec.Cmd {
		c := runs("--", "true")
		i := slices.IndexFunc(c.Args, func(a string) bool { return strings.HasPrefix(a, withTUN) })
		c.Args[i] = strings.Replace(c.Args[i], old, now, 1)
		return c
	}
	t.Run("user namespaces", func(t *testing.T) {
		const off = `unshare --user --keep-caps --map-current-user sh -c 'echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --inh-caps=-all --ambient-caps=-all "$@"' sh `
		refusal{3, []string{"user.max_user_namespaces is 0"}, "sudo sysctl user.max_user_namespaces="}.check(t, changed(culvertBin, off+culvertBin))
	})
	t.Run("the device", func(t *testing.T) {
		refusal{3, []string{"/dev/net/tun is not for everybody"}, "sudo chmod 0666 /dev/net/tun"}.check(t, changed("-m 666", "-m 600"))
	})
	check(0)
}
