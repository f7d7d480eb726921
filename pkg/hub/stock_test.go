//go:build unix

package hub

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

const soon = 20 * time.Second

// A yard is a hub, a stock server that only hosts of the hub reach, and stock clients.
type yard struct {
	t      *testing.T
	dir    string
	hub    *Hub
	port   string   // of the hub
	ports  []string // of all hubs
	ends   []func() // of each
	mu     sync.Mutex
	hurry  chan struct{} // closed with the test
	over   sync.Once
	beat   time.Duration
	sshd   string // of the server
	rights atomic.Pointer[Rights]
	audit  lines

	limits    Limits
	exchange  *ca.Exchange
	balancers []netip.Prefix
	finds     func(all []string) ([]string, error) // other hubs; nil: all
	advertise func(address string) string          // of a hub that listens there; nil: none does

	ca      *ca.Authority
	caKey   crypto.Signer
	names   []string      // of the hubs
	hostFor time.Duration // see Hub
}

// lines is a log that is read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// newYard has a key for each name, with the options that are the line's. What is to be before
// there is a hub is done by first.
func newYard(t *testing.T, options map[string]string, first ...func(*yard)) *yard {
	t.Helper()
	y := bareYard(t, options)
	y.serveSSH()
	for _, do := range first {
		do(y)
	}
	y.serveHub()
	return y
}

// serveHub starts a hub, which the clients are told of.
func (y *yard) serveHub() {
	y.t.Helper()
	y.oneMore()
	y.port = y.ports[0]
	y.configure("127.0.0.1", y.port)
}

// bareYard is one where nothing runs yet.
func bareYard(t *testing.T, options map[string]string) *yard {
	t.Helper()
	for _, tool := range []string{"ssh", "ssh-keygen", "nc", "/usr/sbin/sshd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("not here:", err)
		}
	}
	y := &yard{t: t, dir: t.TempDir(), beat: 200 * time.Millisecond, hurry: make(chan struct{})}
	for _, name := range []string{"host", "login", "hub"} {
		y.keygen(name)
	}
	for name := range options {
		y.keygen(name)
	}
	y.permit(options)
	return y
}

// configure is ssh_config, and what is known of hosts.
func (y *yard) configure(hub, port string) {
	y.t.Helper()
	self := must(user.Current())(y.t).Username
	known := func(alias, key string) string { return alias + " " + y.read(key+".pub") }
	y.write("known_hosts", known("hub", "hub")+known("db-01", "host")+known("db-02", "host")+known("prod", "host"))
	y.write("config", strings.Join([]string{
		"Host hub", "HostName " + hub, "Port " + port, "HostKeyAlias hub", "ExitOnForwardFailure yes",
		"Host db-* prod", "User " + self, "IdentityFile " + y.path("login"),
		"Host *", "ServerAliveInterval 1", "IdentitiesOnly yes", "BatchMode yes", "UserKnownHostsFile " + y.path("known_hosts"), "GlobalKnownHostsFile none",
		"StrictHostKeyChecking yes", "",
	}, "\n"))
}

func freePort(t *testing.T) string {
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// debian are the packages of programs that few machines have, and of what they need.
var debian = map[string][]string{
	"corkscrew": {"corkscrew"}, "connect-proxy": {"connect-proxy"}, "autossh": {"autossh"}, "ncat": {"ncat", "liblua5.3-0", "libpcap0.8"},
	"tinyproxy": {"tinyproxy-bin"}, "dnsmasq": {"dnsmasq-base", "libnetfilter-conntrack3", "libnfnetlink0"}, "rsync": {"rsync", "libpopt0"}, "socat": {"socat", "libwrap0"}, "haproxy": {"haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1"},
}

// fetch has the package of a program that is not here unpacked, which is not installed.
func fetch(t *testing.T, name string) (program string, libs []string) {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("not here:", name)
	}
	cache := must(os.UserCacheDir())(t)
	for _, pkg := range debian[name] {
		dir := must(resolvertest.Unpack(t.Context(), filepath.Join(cache, "culvert-e2e"), pkg))(t)
		for _, bin := range []string{"usr/lib/autossh", "usr/bin", "usr/sbin"} {
			if _, err := os.Stat(filepath.Join(dir, bin, name)); err == nil && program == "" {
				program = filepath.Join(dir, bin, name)
			}
		}
		found, _ := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu*"))
		libs = append(libs, found...)
	}
	return program, libs
}

// tool has a program in the PATH.
func (y *yard) tool(name string) {
	y.t.Helper()
	if _, err := exec.LookPath(name); err == nil {
		return
	}
	program, libs := fetch(y.t, name)
	if err := os.MkdirAll(y.path("bin"), 0o755); err != nil {
		y.t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s \"$@\"\n", strings.Join(libs, ":"), program)
	if err := os.WriteFile(y.path("bin/"+name), []byte(script), 0o755); err != nil {
		y.t.Fatal(err)
	}
	if !strings.HasPrefix(os.Getenv("PATH"), y.path("bin")) {
		y.t.Setenv("PATH", y.path("bin")+":"+os.Getenv("PATH"))
	}
}

func (y *yard) path(name string) string { return filepath.Join(y.dir, name) }

func (y *yard) read(name string) string { return string(must(os.ReadFile(y.path(name)))(y.t)) }

func (y *yard) write(name, text string) {
	y.t.Helper()
	if err := os.WriteFile(y.path(name), []byte(text), 0o600); err != nil {
		y.t.Fatal(err)
	}
}

func (y *yard) keygen(name string) {
	y.t.Helper()
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", y.path(name)).CombinedOutput(); err != nil {
		y.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

// permit makes the hub's file of one line for each key, and one for nobody's.
func (y *yard) permit(options map[string]string) {
	y.t.Helper()
	text := ""
	for name, o := range options {
		if name == "anonymous" {
			text += o + " anonymous\n"
		} else {
			text += strings.TrimSpace(o+" "+y.read(name+".pub")) + "\n"
		}
	}
	y.rights.Store(must(ParseRights([]byte(text)))(y.t))
	y.write("rights", text)
}

// oneMore starts another hub, which the others find.
func (y *yard) oneMore() *Hub {
	y.t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(y.t)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	advertised := ""
	if y.advertise != nil {
		advertised = y.advertise(l.Addr().String())
	}
	hub := must(New(Config{
		Advertise: advertised, Balancers: y.balancers, Limits: y.limits,
		HostKey: must(ParseKey([]byte(y.read("hub"))))(y.t), Rights: y.rights.Load, Beat: y.beat, Peers: y.find, Drain: 10 * time.Second, Hurry: y.hurry,
		Audit: slog.New(slog.NewJSONHandler(&y.audit, nil)), CA: y.ca, Exchange: y.exchange, Names: y.names,
	}))(y.t)
	hub.peers.each, hub.peers.claim = 200*time.Millisecond, soon/2 // the machine may be busy
	if y.hostFor > 0 {
		hub.hostFor = y.hostFor
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = hub.Serve(ctx, l)
	}()
	end := sync.OnceFunc(func() {
		cancel()
		<-over
	})
	y.t.Cleanup(func() {
		y.over.Do(func() { close(y.hurry) })
		end()
	})
	y.mu.Lock()
	defer y.mu.Unlock()
	y.hub, y.ports, y.ends = hub, append(y.ports, port), append(y.ends, end)
	return hub
}

func (y *yard) find(context.Context) (all []string, _ error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, port := range y.ports {
		all = append(all, "127.0.0.1:"+port)
	}
	if y.finds != nil {
		return y.finds(all)
	}
	return all, nil
}

// serveSSH starts the stock server, with settings that count before its own.
func (y *yard) serveSSH(settings ...string) {
	y.t.Helper()
	y.sshd = freePort(y.t)
	y.serveSSHAt("127.0.0.1:"+y.sshd, nil, settings...)
}

// serveSSHAt starts it in the place that a command enters.
func (y *yard) serveSSHAt(address string, enter []string, settings ...string) {
	y.t.Helper()
	if os.Geteuid() == 0 {
		_ = os.Mkdir(sshdDir, 0o755)
	}
	y.write("sshd_config", strings.Join(append(settings,
		"ListenAddress "+address, "HostKey "+y.path("host"), "AuthorizedKeysFile "+y.path("login.pub"), "SetEnv HOME="+y.dir, // a shell there is to read nothing of root's own
		"PidFile none", "UsePAM no", "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "Subsystem sftp internal-sftp", "",
	), "\n"))
	args := append(enter, "/usr/sbin/sshd", "-D", "-e", "-f", y.path("sshd_config"))
	y.background(exec.Command(args[0], args[1:]...), "Server listening")
}

// background starts a command that says something when it is ready, and ends it after the test.
func (y *yard) background(cmd *exec.Cmd, ready string) *exec.Cmd {
	y.t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out := must(cmd.StderrPipe())(y.t)
	if err := cmd.Start(); err != nil {
		y.t.Fatal(err)
	}
	said, over := make(chan string, 1), make(chan struct{})
	var all lines
	go func() {
		defer close(over)
		defer close(said)
		told := ready == ""
		for in := bufio.NewScanner(out); in.Scan(); {
			fmt.Fprintln(&all, in.Text())
			if !told && strings.Contains(in.Text(), ready) {
				said <- in.Text()
				told = true
			}
		}
	}()
	y.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-over
		_ = cmd.Wait()
	})
	if ready == "" {
		return cmd
	}
	select {
	case line, ok := <-said:
		if line == "" && !ok {
			y.t.Fatalf("%v ended: %s", cmd.Args, all.String())
		}
	case <-time.After(soon):
		y.t.Fatalf("%v has not said %q: %s", cmd.Args, ready, all.String())
	}
	return cmd
}

// attach is a stock client that becomes a host.
func (y *yard) attach(key, user, forward string) *exec.Cmd {
	y.t.Helper()
	return y.background(y.ssh("-v", "-N", "-i", y.path(key), "-R", forward, user+"@hub"), "remote forward success")
}

func (y *yard) ssh(args ...string) *exec.Cmd {
	return exec.Command("ssh", append([]string{"-F", y.path("config")}, args...)...)
}

// says runs a command, and wants its output.
func (y *yard) says(cmd *exec.Cmd, want string) {
	y.t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr, cmd.WaitDelay = &stderr, time.Second
	timer := time.AfterFunc(soon, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != want {
		y.t.Errorf("%v: %q, %v, want %q\n%s", cmd.Args, out, err, want, stderr.String())
	}
}

// fails runs a command that is to say why it does not work.
func (y *yard) fails(cmd *exec.Cmd, want ...string) {
	y.t.Helper()
	cmd.WaitDelay = time.Second
	timer := time.AfterFunc(soon, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	out, err := cmd.CombinedOutput()
	if err == nil {
		y.t.Errorf("%v worked: %s", cmd.Args, out)
	}
	for _, w := range want {
		if !strings.Contains(string(out), w) {
			y.t.Errorf("%v said\n%swant %q", cmd.Args, out, w)
		}
	}
}

// proxied is a login through a stock program that asks the hub.
func (y *yard) proxied(command, host string) *exec.Cmd {
	return y.ssh("-o", "ProxyCommand="+strings.ReplaceAll(command, "HUB", "127.0.0.1:"+y.port), host, "echo", "in")
}

// Two hosts, each with port 22 and one with the line of today's users, are reached by every
// client there is; nobody else is let in.
func TestStockClients(t *testing.T) {
	y := newYard(t, map[string]string{
		"one": `permitlisten="db-01:22"`, "two": `permitlisten="db-02:22"`, "old": `permitlisten="prod:*"`,
		"ci": `restrict,port-forwarding,permitopen="db-*:22",permitopen="prod:22022"`, "nothing": ``,
		"anonymous": `from="127.0.0.1",permitopen="db-01:22",permitopen="db-09:22"`,
	})
	for _, name := range []string{"corkscrew", "connect-proxy", "ncat", "rsync", "socat"} {
		y.tool(name)
	}
	y.attach("one", "whoever", "db-01:22:127.0.0.1:"+y.sshd)
	y.attach("two", "db-02", "22:127.0.0.1:"+y.sshd)
	y.attach("old", "prod", "22022:127.0.0.1:"+y.sshd)
	jump := func(host string, args ...string) *exec.Cmd {
		return y.ssh(append([]string{"-o", "ProxyCommand=ssh -F " + y.path("config") + " -i " + y.path("ci") + " -W %h:%p hub", host}, args...)...)
	}
	t.Run("ssh -W", func(t *testing.T) {
		y.says(jump("db-01", "echo", "in"), "in")
		y.says(jump("db-02", "echo", "in"), "in")
		y.says(jump("prod", "-p", "22022", "echo", "in"), "in")
	})
	t.Run("ssh -J", func(t *testing.T) {
		y.write("config", y.read("config")+"Host hub\nIdentityFile "+y.path("ci")+"\n")
		y.says(y.ssh("-J", "hub", "db-01", "echo", "in"), "in")
	})
	for name, command := range map[string]string{
		"nc -X connect":   "nc -X connect -x HUB %h %p",
		"nc -X 5":         "nc -X 5 -x HUB %h %p",
		"socat":           "socat - PROXY:127.0.0.1:%h:%p,proxyport=" + y.port,
		"corkscrew":       "corkscrew 127.0.0.1 " + y.port + " %h %p",
		"connect-proxy":   "connect-proxy -H HUB %h %p",
		"connect-proxy 5": "connect-proxy -5 -S HUB -R remote %h %p",
		"ncat":            "ncat --proxy HUB --proxy-type http %h %p",
	} {
		t.Run(name, func(t *testing.T) {
			y.says(y.proxied(command, "db-01"), "in")
		})
	}
	t.Run("half-close", func(t *testing.T) {
		cmd := jump("db-01", "wc", "-c")
		cmd.Stdin = io.LimitReader(zeros{}, 10<<20)
		y.says(cmd, "10485760")
	})
	t.Run("scp and sftp", func(t *testing.T) {
		y.write("sent", strings.Repeat("x", 1<<20))
		cmd := exec.Command("scp", "-q", "-F", y.path("config"), "-o", "ProxyJump=hub", y.path("sent"), "db-02:"+y.path("back"))
		y.says(cmd, "")
		if y.read("back") != y.read("sent") {
			t.Error("it came otherwise")
		}
	})
	t.Run("rsync", func(t *testing.T) {
		y.says(exec.Command("rsync", "--rsync-path", must(exec.LookPath("rsync"))(t), "-e", "ssh -F "+y.path("config")+" -J hub", y.path("sent"), "db-01:"+y.path("copy")), "")
	})
	t.Run("refused", func(t *testing.T) {
		y.fails(y.ssh("-o", "LogLevel=INFO", "-J", "hub", "db-07", "true"), "db-07 is not attached")
		y.fails(y.ssh("-o", "LogLevel=INFO", "-J", "hub", "web-01", "true"), "to reach web-01:22 is not permitted")
		y.fails(y.ssh("-o", "LogLevel=INFO", "-J", "hub", "-p", "23", "db-01", "true"), "to reach db-01:23 is not permitted")
		y.fails(y.proxied("nc -X connect -x HUB %h %p", "db-02"), "403", "to reach db-02:22 is not permitted")
		y.fails(y.proxied("nc -X connect -x HUB %h %p", "db-09"), "404", "db-09 is not attached")
		y.fails(y.ssh("-i", y.path("ci"), "hub", "true"), "open failed")
		y.fails(y.ssh("-F", "none", "-p", y.port, "-i", y.path("login"), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "HostKeyAlias=hub", "-o", "UserKnownHostsFile="+y.path("known_hosts"), "127.0.0.1"), "Permission denied (publickey)")
		for _, forward := range []string{"db-01:22:127.0.0.1:1", "db-02:23:127.0.0.1:1", "db-03:22:127.0.0.1:1"} {
			y.fails(y.ssh("-N", "-i", y.path("two"), "-o", "IdentityAgent=none", "-F", y.path("config"), "-R", forward, "x@hub"), "remote port forwarding failed")
		}
		y.fails(y.ssh("-i", y.path("nothing"), "-o", "LogLevel=INFO", "-W", "db-01:22", "hub"), "")
	})
	for _, want := range []string{
		`"event":"attach","who":"one"`, `"verdict":"opened"`, `"who":"anonymous"`, `"why":"to reach db-02:22 is not permitted"`, `"out":`,
	} {
		if !strings.Contains(y.audit.String(), want) {
			t.Errorf("the audit log has no %s:\n%s", want, y.audit.String())
		}
	}
}

// zeros never end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A wire that is dead, and not known to be, is replaced at once by the next one of the same
// key; another key is refused.
func TestStockReplaced(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "thief": `permitlisten="db-*:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:22"`})
	for range 3 {
		dead := y.attach("one", "db-01", "22:127.0.0.1:"+y.sshd)
		if err := dead.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		y.fails(y.ssh("-N", "-i", y.path("thief"), "-R", "22:127.0.0.1:1", "db-01@hub"), "remote port forwarding failed")
		began := time.Now()
		y.attach("one", "db-01", "22:127.0.0.1:"+y.sshd)
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
		t.Logf("reached %v after the old one hung", time.Since(began).Round(time.Millisecond))
	}
	if text := y.audit.String(); !strings.Contains(text, "db-01 is attached with another key") {
		t.Errorf("the thief is not in the audit log:\n%s", text)
	}
}

// autossh attaches again when its wire has ended.
func TestAutossh(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:22"`})
	y.tool("autossh")
	cmd := exec.Command("autossh", "-M", "0", "-N", "-F", y.path("config"), "-i", y.path("one"), "-R", "22:127.0.0.1:"+y.sshd, "db-01@hub")
	cmd.Env = append(os.Environ(), "AUTOSSH_GATETIME=0", "AUTOSSH_POLL=1")
	y.background(cmd, "")
	has := func() bool { return y.hub.registry.missing("tcp", "db-01", "22") == nil }
	for range 2 {
		y.await("it is a host", has)
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
		y.hub.endWho("one")
		y.await("it is none", func() bool { return !has() })
	}
}

// endWho ends every wire of somebody's, as a restart would.
func (h *Hub) endWho(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for v := range h.visits {
		if g, err := v.who(); err == nil && g.Name == name {
			v.end()
		}
	}
}

// The port says the same to who waits to be spoken to, and behind TLS.
func TestFirstBytes(t *testing.T) {
	t.Parallel()
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`})
	dial := func() net.Conn {
		c := must(net.Dial("tcp", "127.0.0.1:"+y.port))(t)
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(soon))
		return c
	}
	for said, want := range map[string]string{
		"": "SSH-2.0-culvert",
		"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":             "HTTP/1.1 200 OK",
		"GET / HTTP/1.0\r\n\r\n":                               "HTTP/1.1 404 this is a hub",
		"CONNECT db-01:22 HTTP/1.0\r\n\r\n":                    "HTTP/1.1 403 to reach db-01:22 is not permitted",
		"\x05\x01\x00\x05\x01\x00\x03\x05db-01\x00\x16":        "\x05\x00\x05\x02",
		"\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00": "\x05\x00\x05\x07", // no datagrams
	} {
		c := dial()
		fmt.Fprint(c, said)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Errorf("%q: %q, %v, want %q", said, got, err, want)
		}
	}
	t.Run("who has begun is still a stranger", func(t *testing.T) {
		for _, said := range []string{"G", "\x05", "POST /ca/sign HTTP/1.0\r\nContent-Length: 9\r\n\r\n"} {
			y.await("the silent one is alone", func() bool { return y.hub.porch.Count() == 1 })
			c := dial()
			fmt.Fprint(c, said)
			time.Sleep(100 * time.Millisecond)
			if n := y.hub.porch.Count(); n != 2 {
				t.Errorf("%q: %d strangers", said, n)
			}
			c.Close()
		}
	})
	t.Run("who does not go on must leave", func(t *testing.T) {
		slow, endless := dial(), dial()
		fmt.Fprint(slow, "S")
		began := time.Now()
		if _, err := io.Copy(endless, io.MultiReader(strings.NewReader("GET / HTTP/1.1\r\nX: "), io.LimitReader(zeros{}, 1<<20))); err == nil {
			if n, err := io.Copy(io.Discard, endless); n > 0 || err != nil && !strings.Contains(err.Error(), "reset") {
				t.Errorf("a head without an end: %d, %v", n, err)
			}
		}
		if n, err := slow.Read(make([]byte, 1)); err == nil || time.Since(began) > strangerLimit+5*time.Second {
			t.Errorf("%d, %v after %v", n, err, time.Since(began))
		}
	})
	t.Run("openssl", func(t *testing.T) {
		if _, err := exec.LookPath("openssl"); err != nil {
			t.Skip("not here:", err)
		}
		cmd := exec.Command("openssl", "s_client", "-quiet", "-connect", "127.0.0.1:"+y.port)
		cmd.Stdin = strings.NewReader("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		out, _ := cmd.Output()
		if !strings.HasPrefix(string(out), "HTTP/1.1 200 OK") {
			t.Errorf("%q", out)
		}
	})
}
