package sshchan

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

// stock is a folder with the keys of a stock end and of one of ours.
type stock struct {
	dir  string
	ours Config
}

func newStock(t *testing.T) *stock {
	t.Helper()
	ourKey, ourPub, err := GenerateKey("ours")
	if err != nil {
		t.Fatal(err)
	}
	key, pub, err := GenerateKey("stock")
	if err != nil {
		t.Fatal(err)
	}
	s := &stock{dir: t.TempDir()}
	if s.ours.Identity, err = ParseIdentity(ourKey, pub); err != nil {
		t.Fatal(err)
	}
	s.write(t, "key", string(key))
	s.write(t, "authorized_keys", string(ourPub))
	s.write(t, "known_hosts", "far "+string(ourPub))
	return s
}

func (s *stock) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *stock) path(name string) string { return filepath.Join(s.dir, name) }

// serveStock serves every connection to a port of the loopback.
func (s *stock) serveStock(t *testing.T, n channel.Network) (port string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { Serve(ctx, c, s.ours, n) })
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// ssh starts the stock client towards our far end.
func (s *stock) ssh(t *testing.T, port string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("ssh")
	if err != nil {
		t.Skip("no OpenSSH client here")
	}
	args = append([]string{
		"-F", "none", "-i", s.path("key"), "-p", port, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
		"-o", "UserKnownHostsFile=" + s.path("known_hosts"), "-o", "GlobalKnownHostsFile=none", "-o", "HostKeyAlias=far",
		"-o", "StrictHostKeyChecking=yes", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=1",
	}, append(args, "127.0.0.1")...)
	return exec.Command(path, args...)
}

// run starts a command and ends it after the test; its stderr can be followed.
func run(t *testing.T, cmd *exec.Cmd) (stderr <-chan string) {
	t.Helper()
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines, done := make(chan string, 1000), make(chan struct{})
	go func() {
		defer close(done)
		defer close(lines)
		for in := bufio.NewScanner(pipe); in.Scan(); {
			lines <- in.Text()
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-done
		cmd.Wait()
	})
	return lines
}

// await reads lines until one matches.
func await(t *testing.T, lines <-chan string, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	var seen []string
	for line := range lines {
		if m := re.FindStringSubmatch(line); m != nil {
			return m
		}
		seen = append(seen, line)
	}
	t.Fatalf("no %q in:\n%s", pattern, strings.Join(seen, "\n"))
	return nil
}

// freePort is one that nobody listens at just now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// transfer sends data through an echo with a half-close.
func transfer(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	data := make([]byte, 4<<20)
	rand.Read(data)
	go func() {
		c.Write(data)
		c.(channel.CloseWriter).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("echo: %d bytes of %d, %v", len(got), len(data), err)
	}
}

func TestStockClientLocal(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	local := freePort(t)
	echoPort := portText(channeltest.ServeTCP(t, channeltest.Echo))
	cmd := s.ssh(t, s.serveStock(t, &channel.Host{}), "-vN", "-L", "127.0.0.1:"+local+":localhost:"+echoPort)
	await(t, run(t, cmd), `Entering interactive session`)
	for range 3 {
		c, err := net.Dial("tcp", "127.0.0.1:"+local)
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c)
	}
}

func portText(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// TestStockClientRefused: OpenSSH tells its user what our far end was told.
func TestStockClientRefused(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	cmd := s.ssh(t, s.serveStock(t, &channel.Host{}), "-o", "LogLevel=INFO", "-W", "127.0.0.1:"+freePort(t))
	out, err := cmd.CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("connect failed: Connection refused")) {
		t.Errorf("%v: %s", err, out)
	}
}

func TestStockClientSOCKS(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	local := freePort(t)
	cmd := s.ssh(t, s.serveStock(t, &channel.Host{}), "-vN", "-D", "127.0.0.1:"+local)
	await(t, run(t, cmd), `Entering interactive session`)
	socks, err := proxy.SOCKS5("tcp", "127.0.0.1:"+local, nil, &net.Dialer{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := socks.Dial("tcp", "localhost:"+portText(channeltest.ServeTCP(t, channeltest.Echo)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("hello"))
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		t.Errorf("read %q, %v", buf, err)
	}
}

func TestStockClientStdio(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	address := channeltest.ServeTCP(t, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		fmt.Fprintf(c, "%x", sha256.Sum256(b))
	})
	data := make([]byte, 1<<20)
	rand.Read(data)
	cmd := s.ssh(t, s.serveStock(t, &channel.Host{}), "-W", address)
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if want := fmt.Sprintf("%x", sha256.Sum256(data)); err != nil || string(out) != want {
		t.Errorf("%q, %v; want %s", out, err, want)
	}
}

// TestStockClientRemote: the port that was left open is told, and connections
// to it arrive.
func TestStockClientRemote(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	cmd := s.ssh(t, s.serveStock(t, &channel.Host{}), "-N", "-R", "127.0.0.1:0:"+channeltest.ServeTCP(t, channeltest.Echo))
	port := await(t, run(t, cmd), `Allocated port (\d+) for remote forward`)[1]
	for range 3 {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c)
	}
}

// named is a Network in which one listens under a name.
type named struct {
	channel.Host
	got chan string
	at  chan net.Listener
}

func (n *named) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	n.got <- address
	l, err := n.Host.Listen(ctx, network, "127.0.0.1:0")
	n.at <- l
	return l, err
}

// TestStockClientName: ssh -NR db-01:22:... becomes db-01.
func TestStockClientName(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	n := &named{got: make(chan string, 1), at: make(chan net.Listener, 1)}
	cmd := s.ssh(t, s.serveStock(t, n), "-N", "-R", "db-01:22:"+channeltest.ServeTCP(t, channeltest.Echo))
	run(t, cmd)
	if got := receive(t, n.got); got != "db-01:22" {
		t.Errorf("listen at %q", got)
	}
	c, err := net.Dial("tcp", receive(t, n.at).Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, c)
}

// TestStockClientTaken: a listener that cannot be had is an error of ssh.
func TestStockClientTaken(t *testing.T) {
	channeltest.NoLeak(t)
	s := newStock(t)
	echo := channeltest.ServeTCP(t, channeltest.Echo)
	cmd := s.ssh(t, s.serveStock(t, &channel.Host{}), "-N", "-R", echo+":"+echo)
	out, err := cmd.CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("remote port forwarding failed")) {
		t.Errorf("%v: %s", err, out)
	}
}

// TestStockClientStranger: with a key that we do not know, and towards a key
// that it does not know.
func TestStockClientStranger(t *testing.T) {
	channeltest.NoLeak(t)
	s, other := newStock(t), newStock(t)
	port := s.serveStock(t, &channel.Host{})
	s.write(t, "known_hosts", "far "+readFile(t, other.path("authorized_keys")))
	if out, err := s.ssh(t, port, "-N").CombinedOutput(); err == nil || !bytes.Contains(out, []byte("Host key verification failed")) {
		t.Errorf("%v: %s", err, out)
	}
	s.write(t, "known_hosts", "far "+readFile(t, s.path("authorized_keys")))
	s.write(t, "key", readFile(t, other.path("key")))
	if out, err := s.ssh(t, port, "-N").CombinedOutput(); err == nil || !bytes.Contains(out, []byte("Permission denied")) {
		t.Errorf("%v: %s", err, out)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sshd starts a stock server with a throw-away key and gives its port.
func (s *stock) sshd(t *testing.T) (port string) {
	t.Helper()
	const path = "/usr/sbin/sshd"
	if _, err := os.Stat(path); err != nil {
		t.Skip("no OpenSSH server here")
	}
	if os.Geteuid() == 0 {
		privilegeSeparation(t)
	}
	port = freePort(t)
	s.write(t, "sshd_config", strings.Join([]string{
		"Port " + port, "ListenAddress 127.0.0.1", "HostKey " + s.path("key"),
		"AuthorizedKeysFile " + s.path("authorized_keys"), "PidFile none", "UsePAM no", "StrictModes no",
		"PermitRootLogin prohibit-password", "PasswordAuthentication no", "LogLevel VERBOSE", "",
	}, "\n"))
	lines := run(t, exec.Command(path, "-D", "-e", "-f", s.path("sshd_config")))
	await(t, lines, `Server listening on`)
	go func() {
		for range lines { // until it ends
		}
	}()
	return port
}

// privilegeSeparation makes the folder that sshd wants, where no init did.
func privilegeSeparation(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // and leaves it: tests of other packages run beside
		t.Skip("no privilege separation folder:", err)
	}
}

func (s *stock) dialSSHD(t *testing.T) *Channel {
	t.Helper()
	conn, err := net.Dial("tcp", "127.0.0.1:"+s.sshd(t))
	if err != nil {
		t.Fatal(err)
	}
	s.ours.User = "root"
	if name := os.Getenv("USER"); os.Geteuid() != 0 && name != "" {
		s.ours.User = name
	}
	s.ours.Keepalive = 100 * time.Millisecond
	ch, err := Dial(context.Background(), conn, s.ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ch.Close()
		ch.Wait()
	})
	return ch
}

func TestStockServer(t *testing.T) {
	channeltest.NoLeak(t)
	ch := newStock(t).dialSSHD(t)
	ctx := context.Background()
	for range 3 {
		c, err := ch.DialContext(ctx, "tcp", channeltest.ServeTCP(t, channeltest.Echo))
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c)
	}
	if _, err := ch.DialContext(ctx, "tcp", "127.0.0.1:"+freePort(t)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
	var name *net.DNSError
	if _, err := ch.DialContext(ctx, "tcp", "no-such-host.invalid:1"); !errors.As(err, &name) {
		t.Errorf("dial: %v, want a DNS error", err)
	}
	for _, network := range []string{"udp", "ping"} {
		_, err := ch.DialContext(ctx, network, map[string]string{"udp": "127.0.0.1:1", "ping": "127.0.0.1"}[network])
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("dial %s: %v, want ErrUnsupported", network, err)
		}
	}
	if _, err := ch.Listen(ctx, "udp", "127.0.0.1:0"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("listen udp: %v, want ErrUnsupported", err)
	}
	if ch.RTT() <= 0 {
		t.Error("sshd does not answer keepalives")
	}
}

func TestStockServerListen(t *testing.T) {
	channeltest.NoLeak(t)
	ch := newStock(t).dialSSHD(t)
	for _, address := range []string{"127.0.0.1:0", "localhost:0", "127.0.0.1:" + freePort(t)} {
		l, err := ch.Listen(context.Background(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		far, err := net.Dial("tcp", "127.0.0.1:"+portText(l.Addr().String()))
		if err != nil {
			t.Fatal(err)
		}
		near, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := near.RemoteAddr().String(), far.LocalAddr().String(); got != want {
			t.Errorf("remote address %s, want %s", got, want)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer near.Close()
			channeltest.Echo(near)
			near.(channel.CloseWriter).CloseWrite()
		}()
		transfer(t, far)
		<-done
		l.Close()
	}
	if _, err := ch.Listen(context.Background(), "tcp", channeltest.ServeTCP(t, channeltest.Echo)); err == nil {
		t.Error("listening at a taken port succeeded")
	}
}
