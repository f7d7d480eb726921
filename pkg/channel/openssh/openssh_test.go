//go:build unix

package openssh

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

// The test program is the process to be killed, too.
func TestMain(m *testing.M) {
	if to := os.Getenv("CULVERT_OPENSSH_TEST"); to != "" {
		_, err := Dial(context.Background(), Config{Destination: to})
		fmt.Println("open:", err)
		select {}
	}
	channeltest.Main(m)
}

const soon = 20 * time.Second

// A site is a stock server, and a stock client with a configuration of its own, whose
// "far" is the server.
type site struct {
	t    *testing.T
	dir  string
	port string
	sshd *exec.Cmd
}

// newSite has extra lines in the configuration of the server.
func newSite(t *testing.T, server ...string) *site {
	t.Helper()
	for _, tool := range []string{"ssh", "ssh-keygen", "/usr/sbin/sshd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("no OpenSSH here:", err)
		}
	}
	s := &site{t: t, dir: t.TempDir()}
	for _, key := range []string{"key", "host"} {
		s.keygen(key)
	}
	s.write("authorized_keys", s.read("key.pub"))
	s.port = freePort(t)
	s.serve(server...)
	s.write("known_hosts", fmt.Sprintf("[127.0.0.1]:%s %s", s.port, s.read("host.pub")))
	s.configure()
	// As if this were the person's own configuration.
	s.write("bin/ssh", fmt.Sprintf("#!/bin/sh\nexec %s -F %s \"$@\"\n", must(exec.LookPath("ssh"))(t), s.path("config")))
	t.Setenv("PATH", s.path("bin")+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", t.TempDir())
	t.Setenv("SSH_AUTH_SOCK", "")
	return s
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(name)), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(name), []byte(text), 0o700); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) read(name string) string {
	s.t.Helper()
	return string(must(os.ReadFile(s.path(name)))(s.t))
}

func (s *site) keygen(name string) {
	s.t.Helper()
	os.Remove(s.path(name))
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", s.path(name)).CombinedOutput(); err != nil {
		s.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

// configure writes the client's configuration; extra lines come first, and so count.
func (s *site) configure(extra ...string) {
	s.t.Helper()
	name := must(user.Current())(s.t).Username
	s.write("config", strings.Join(slices.Concat([]string{"Host far hop"}, extra, []string{
		"HostName 127.0.0.1", "Port " + s.port, "User " + name, "IdentityFile " + s.path("key"), "IdentitiesOnly yes",
		"UserKnownHostsFile " + s.path("known_hosts"), "GlobalKnownHostsFile none", "StrictHostKeyChecking yes",
		"PreferredAuthentications publickey", "",
	}), "\n"))
}

// serve starts the server, until the test ends or stop.
func (s *site) serve(extra ...string) {
	s.t.Helper()
	if os.Geteuid() == 0 {
		_ = os.Mkdir("/run/sshd", 0o755) // it stays: tests of other packages run beside
	}
	s.write("sshd_config", strings.Join(append(extra,
		"Port "+s.port, "ListenAddress 127.0.0.1", "HostKey "+s.path("host"), "AuthorizedKeysFile "+s.path("authorized_keys"), "SetEnv HOME="+s.path("home"), // a shell there is to read nothing of root's own
		"PidFile none", "UsePAM no", "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "LogLevel VERBOSE", ""), "\n"))
	s.sshd = exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", s.path("sshd_config"))
	lines := must(s.sshd.StderrPipe())(s.t)
	if err := s.sshd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(s.stop)
	in := bufio.NewScanner(lines)
	for in.Scan() && !strings.HasPrefix(in.Text(), "Server listening") {
		if strings.Contains(in.Text(), "rror") {
			s.t.Fatal(in.Text())
		}
	}
	go func() {
		for in.Scan() {
		}
	}()
}

// stop ends the server with all its connections, which are sessions of their own.
func (s *site) stop() {
	for _, pid := range descendants(s.sshd.Process.Pid) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	s.sshd.Wait()
}

func descendants(pid int) []int {
	all := []int{pid}
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	for _, child := range strings.Fields(string(children)) {
		n, _ := strconv.Atoi(child)
		all = append(all, descendants(n)...)
	}
	return all
}

func freePort(t *testing.T) string {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// dial opens a wire that is closed after the test, when neither its ssh nor a folder
// may be left.
func dial(t *testing.T, cfg Config) *Channel {
	t.Helper()
	ch, err := Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		nothingLeft(t)
	})
	nothingIn(t)
	return ch
}

func nothingIn(t *testing.T) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "culvert-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func nothingLeft(t *testing.T) {
	t.Helper()
	nothingIn(t)
	if pids := clients(t); len(pids) > 0 {
		t.Errorf("ssh is left: %v", pids)
	}
}

// clients are the processes of ssh that were started with a control socket of ours.
func clients(t *testing.T) (pids []string) {
	t.Helper()
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range commands {
		if line, _ := os.ReadFile(path); bytes.Contains(line, []byte(os.TempDir()+"/culvert-ssh-")) {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	return pids
}

func TestStreams(t *testing.T) {
	channeltest.RunStreams(t, func(t *testing.T) channel.Network {
		newSite(t)
		return dial(t, Config{Destination: "far"})
	})
}

func TestDial(t *testing.T) {
	newSite(t)
	channeltest.NoLeak(t)
	ch := dial(t, Config{Destination: "far", Keepalive: 100 * time.Millisecond})
	var name *net.DNSError
	if _, err := ch.DialContext(t.Context(), "tcp", "no-such-host.invalid:1"); !errors.As(err, &name) {
		t.Errorf("dial: %v, want a DNS error", err)
	}
	for network, address := range map[string]string{"udp": "127.0.0.1:1", "ping": "127.0.0.1"} {
		if _, err := ch.DialContext(t.Context(), network, address); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("dial %s: %v, want ErrUnsupported", network, err)
		}
	}
	if _, err := ch.Listen(t.Context(), "tcp", "127.0.0.1:0"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("listen: %v, want ErrUnsupported", err)
	}
	for end := time.Now().Add(20 * time.Second); ch.RTT() <= 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the server does not answer keepalives")
		}
	}
}

// A server may be there for forwarding only: then nobody is asked for signs of life.
func TestNoSessions(t *testing.T) {
	newSite(t, "MaxSessions 0")
	channeltest.NoLeak(t)
	ch := dial(t, Config{Destination: "far", Keepalive: 20 * time.Millisecond})
	time.Sleep(400 * time.Millisecond) // more than seven beats
	if _, err := ch.DialContext(t.Context(), "tcp", "127.0.0.1:"+freePort(t)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
}

// A server asks, too, on whatever channel is open; who does not answer is put out.
func TestServerAsks(t *testing.T) {
	newSite(t, "ClientAliveInterval 1", "ClientAliveCountMax 1")
	channeltest.NoLeak(t)
	ch := dial(t, Config{Destination: "far", Keepalive: time.Minute})
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	c := must(ch.DialContext(t.Context(), "tcp", l.Addr().String()))(t)
	defer c.Close()
	time.Sleep(3500 * time.Millisecond)
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	again, err := ch.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestAgent(t *testing.T) {
	s := newSite(t)
	channeltest.NoLeak(t)
	agent := exec.Command("ssh-agent", "-D", "-a", s.path("agent"))
	out := must(agent.StdoutPipe())(t)
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Process.Kill(); agent.Wait() })
	must(bufio.NewReader(out).ReadString('\n'))(t)
	t.Setenv("SSH_AUTH_SOCK", s.path("agent"))
	if said, err := exec.Command("ssh-add", s.path("key")).CombinedOutput(); err != nil {
		t.Fatalf("ssh-add: %v: %s", err, said)
	}
	os.Rename(s.path("key"), s.path("away"))
	s.configure("IdentitiesOnly no")
	dial(t, Config{Destination: "far", Batch: true})
}

// What is configured for interactive use, or for other sessions, does not disturb.
func TestConfigured(t *testing.T) {
	s := newSite(t)
	channeltest.NoLeak(t)
	s.configure("ControlMaster auto", "ControlPath "+s.path("shared"), "ControlPersist 60", "ForkAfterAuthentication yes", "RequestTTY force",
		"LocalForward 127.0.0.1:"+s.port+" localhost:1", "ExitOnForwardFailure yes", "LogLevel QUIET", "ServerAliveInterval 77")
	dial(t, Config{Destination: "far"})
	if _, err := os.Stat(s.path("shared")); err == nil {
		t.Error("a shared connection was made")
	}
	way := must(Look(t.Context(), "far"))(t)
	if d := way.defaults(); slices.ContainsFunc(d, func(o string) bool { return strings.HasPrefix(o, "ServerAlive") }) {
		t.Error(d)
	}
}

func TestJump(t *testing.T) {
	s := newSite(t)
	channeltest.NoLeak(t)
	s.write("config", s.read("config")+"Host behind\nHostName 127.0.0.1\nPort "+s.port+"\nProxyJump hop\nIdentityFile "+s.path("key")+
		"\nUserKnownHostsFile "+s.path("known_hosts")+"\nGlobalKnownHostsFile none\nStrictHostKeyChecking yes\n")
	ch := dial(t, Config{Destination: "behind"})
	if _, err := ch.DialContext(t.Context(), "tcp", "127.0.0.1:"+freePort(t)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
}

func TestLook(t *testing.T) {
	s := newSite(t)
	s.write("config", `
Host one
  HostName one.example
Host two
  HostName two.example
  ProxyJump one
Host three
  HostName 192.0.2.3
  ProxyJump me@two:2222,nowhere
Host own
  HostName own.example
  ProxyCommand nc %h %p
Host round
  ProxyJump around
Host around
  ProxyJump round
`)
	for destination, want := range map[string]Way{
		"one": {Host: "one.example"}, "two": {Host: "one.example"}, "ssh://me@three:22": {Host: "one.example"},
		"own": {Host: "own.example", Command: true}, "192.0.2.9": {Host: "192.0.2.9"}, "me@fd00::1": {Host: "fd00::1"},
	} {
		got, err := Look(t.Context(), destination)
		if err != nil || got.Host != want.Host || got.Command != want.Command {
			t.Errorf("%s: %+v, %v, want %+v", destination, got, err, want)
		}
	}
	for _, destination := range []string{"", "-oProxyCommand=true", "a b", "round"} {
		if got, err := Look(t.Context(), destination); err == nil {
			t.Errorf("%q: %+v", destination, got)
		}
	}
}

// heard collects what a person is told.
type heard struct {
	mu    sync.Mutex
	lines []string
}

func (h *heard) say(line string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, line)
}

func (h *heard) text() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.lines, "\n")
}

func TestRefused(t *testing.T) {
	for name, test := range map[string]struct {
		spoil   func(s *site)
		refused bool
		err     string
		said    string
	}{
		"another key": {func(s *site) { s.keygen("key") }, true, "Permission denied (publickey", ""},
		"another host": {func(s *site) {
			s.keygen("other")
			s.write("known_hosts", fmt.Sprintf("[127.0.0.1]:%s %s", s.port, s.read("other.pub")))
		}, true, "Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED"},
		"unknown host": {func(s *site) { s.write("known_hosts", "") }, true, "Host key verification failed", ""},
		"nobody":       {func(s *site) { s.stop() }, false, "Connection refused", ""},
		"no such name": {func(s *site) { s.configure("HostName no-such-host.invalid") }, false, "no-such-host.invalid", ""},
		"bad config":   {func(s *site) { s.configure("NoSuchOption yes") }, false, "Bad configuration option", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			channeltest.NoLeak(t)
			test.spoil(s)
			var h heard
			ch, err := Dial(t.Context(), Config{Destination: "far", Batch: true, Say: h.say})
			if err == nil {
				ch.Close()
				ch.Wait()
			}
			if err == nil || errors.Is(err, ErrRefused) != test.refused || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%v", err)
			}
			if !strings.Contains(h.text(), test.said) || test.err != "" && strings.Contains(h.text(), test.err) {
				t.Errorf("said: %s", h.text())
			}
			nothingLeft(t)
		})
	}
}

func TestCancelled(t *testing.T) {
	s := newSite(t)
	channeltest.NoLeak(t)
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t) // accepts and says nothing
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	s.configure("Port " + port)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, Config{Destination: "far"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	nothingLeft(t)
}

// The death of the server, and of ssh, is the wire's; and ssh does not survive the wire.
func TestDeath(t *testing.T) {
	for name, kill := range map[string]func(t *testing.T, s *site){
		"server": func(t *testing.T, s *site) { s.stop() },
		"ssh": func(t *testing.T, s *site) {
			for _, pid := range clients(t) {
				exec.Command("kill", "-9", pid).Run()
			}
		},
		"stopped": func(t *testing.T, s *site) { // it is there, and says nothing
			for _, pid := range clients(t) {
				exec.Command("kill", "-STOP", pid).Run()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			channeltest.NoLeak(t)
			ch := dial(t, Config{Destination: "far", Keepalive: 200 * time.Millisecond})
			kill(t, s)
			began := time.Now()
			if err := ch.Wait(); err == nil || errors.Is(err, net.ErrClosed) || time.Since(began) > soon {
				t.Errorf("%v after %v", err, time.Since(began))
			}
		})
	}
}

func TestWorn(t *testing.T) {
	newSite(t)
	channeltest.NoLeak(t)
	told := make(chan struct{})
	ch := dial(t, Config{Destination: "far", OnWorn: func() { close(told) }})
	closed := "127.0.0.1:" + freePort(t)
	for range worn {
		if _, err := ch.DialContext(t.Context(), "tcp", closed); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	<-told
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	must(ch.DialContext(t.Context(), "tcp", l.Addr().String()))(t).Close()
}

// A kill -9 leaves neither ssh nor a folder, open or not.
func TestKilled(t *testing.T) {
	for _, name := range []string{"open", "opening"} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			channeltest.NoLeak(t)
			if name == "opening" {
				l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
				defer l.Close()
				_, port, _ := net.SplitHostPort(l.Addr().String())
				s.configure("Port " + port)
			}
			cmd := exec.Command(must(os.Executable())(t))
			cmd.Env = append(os.Environ(), "CULVERT_OPENSSH_TEST=far")
			out := must(cmd.StdoutPipe())(t)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if name == "open" {
				if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "open: <nil>\n" {
					t.Errorf("%q, %v", line, err)
				}
			}
			eventually(t, "an ssh", func() bool { return len(clients(t)) > 0 })
			cmd.Process.Kill()
			io.Copy(io.Discard, out)
			cmd.Wait()
			eventually(t, "no ssh", func() bool { return len(clients(t)) == 0 })
			if sweep(); name == "opening" {
				nothingIn(t)
			}
			nothingIn(t)
		})
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > soon {
			t.Fatalf("%s: not within %v", what, soon)
		}
	}
}
