package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/process"
)

// TestMain is also the child, and what runs inside: this binary is a static one.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "inside" {
		os.Exit(inside(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == verb {
		err := Main(os.Args[2:])
		var exec *ExecError
		if errors.As(err, &exec) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exec.Code())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// inside is a program in the sandbox.
func inside(args []string) int {
	var err error
	switch args[0] {
	case "dial":
		err = dial(args[1], args[2])
	case "own":
		err = own(args[1])
	case "run":
		var s *Sandbox
		path, _ := Look(args[1])
		s, err = Start(Config{Path: path, Args: args[1:], MTU: 1500, Addrs: addrs, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
		if err == nil {
			err = s.Wait()
		}
	case "shell":
		err = jobControl(args[1:])
	case "jobs":
		err = jobsOfItsOwn()
	case "check":
		if err = os.WriteFile(sysctlPath(limits[0]), []byte("0"), 0); err == nil {
			err = Check()
		}
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// dial says hello and prints the answer.
func dial(network, address string) error {
	c, err := net.DialTimeout(network, address, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	b := make([]byte, 1024)
	n, err := c.Read(b)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", b[:n])
	return nil
}

// own listens on an address and dials it, with 16 MiB each way; as datagrams, a few.
func own(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	c, err := net.Dial("tcp", "127.0.0.1:"+port)
	if err != nil {
		return err
	}
	defer c.Close()
	const size = 16 << 20
	go func() { _, _ = io.Copy(c, io.LimitReader(zeros{}, size)); _ = c.(*net.TCPConn).CloseWrite() }()
	n, err := io.Copy(io.Discard, c)
	if n != size || err != nil {
		return fmt.Errorf("%d bytes came back: %v", n, err)
	}
	pc, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	defer pc.Close()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(append([]byte("own "), b[:n]...), from)
		}
	}()
	_, port, _ = net.SplitHostPort(pc.LocalAddr().String())
	return dial("udp", "127.0.0.1:"+port)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// A spoken is a Network on which every flow is answered with where it leads.
type spoken struct {
	mu     sync.Mutex
	dialed []string
}

func (s *spoken) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	s.mu.Lock()
	s.dialed = append(s.dialed, network+" "+address)
	s.mu.Unlock()
	if strings.HasSuffix(address, ":9") {
		return nil, syscall.ECONNREFUSED
	}
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		b := make([]byte, 64<<10)
		if n, err := far.Read(b); err == nil {
			_, _ = fmt.Fprintf(far, "%s from %s %s", b[:n], network, address)
		}
	}()
	return near, nil
}

func (s *spoken) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

var addrs = []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd63:756c:7665:7274::1")}

const conf = "nameserver 198.18.0.2\nsearch shop.svc.cluster.local\n"

// run runs a command in a sandbox whose packets come to network, and returns what it
// printed and how it ended.
func run(t *testing.T, network channel.Network, args ...string) (out string, err error) {
	t.Helper()
	var b bytes.Buffer
	path, err := Look(args[0])
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Path: path, Args: args, MTU: 65535, Addrs: addrs, ResolvConf: []byte(conf), Stdout: &b, Stderr: &b}
	s, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer serve(t, s, network)()
	late := time.AfterFunc(60*time.Second, func() { s.Signal(syscall.SIGKILL) })
	defer late.Stop()
	err = s.Wait()
	return strings.TrimSpace(b.String()), err
}

// serve is who has the packets.
func serve(t *testing.T, s *Sandbox, network channel.Network) (stop func()) {
	t.Helper()
	stack, err := netstack.New(netstack.Config{Device: s.Device, MTU: 65535, Network: network, Local: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- stack.Run(ctx) }()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// asOrdinary runs a program (descriptor 3, which lies where nobody else may look) as a user
// for whom the device is as distributions have it.
const asOrdinary = `mount -t tmpfs none /mnt && mknod -m 666 /mnt/tun c 10 200 && mount --bind /mnt/tun /dev/net/tun &&
cp /proc/self/fd/3 /mnt/test && chmod 755 /mnt/test && exec setpriv --reuid 1000 --regid 1000 --clear-groups /mnt/test "$@" 3<&-`

// The same tests as a user without any right.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("is one already")
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.Command("unshare", "-m", "sh", "-c", asOrdinary, "sh", "-test.v", "-test.timeout=120s")
	cmd.Dir, cmd.ExtraFiles = "/", []*os.File{self}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func TestCheck(t *testing.T) {
	if err := Check(); err != nil {
		t.Error(err)
	}
}

func TestWhatItSends(t *testing.T) {
	for _, c := range []struct{ network, address, want string }{
		{"tcp", "10.96.0.1:80", "hello from tcp 10.96.0.1:80"},
		{"tcp", "[fd00:10:96::1]:80", "hello from tcp [fd00:10:96::1]:80"},
		{"udp", "10.96.0.10:53", "hello from udp 10.96.0.10:53"},
		{"tcp", "127.0.0.1:5432", "hello from tcp 127.0.0.1:5432"},
		{"udp", "127.0.0.53:53", "hello from udp 127.0.0.53:53"},
		{"tcp", "169.254.169.254:80", "hello from tcp 169.254.169.254:80"},
		{"tcp", "127.0.0.1:9", "dial tcp 127.0.0.1:9: connect: connection refused"},
		{"tcp", "192.0.2.1:9", "dial tcp 192.0.2.1:9: connect: connection refused"},
		{"tcp", "[::1]:5432", "dial tcp [::1]:5432: connect: connection refused"},
	} {
		if out, _ := run(t, &spoken{}, "/proc/self/exe", "inside", "dial", c.network, c.address); out != c.want {
			t.Errorf("%s %s: %q, want %q", c.network, c.address, out, c.want)
		}
	}
}

// Servers that the command itself starts are its own, whatever the machine has there.
func TestItsOwnLoopback(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "127.0.0.1:5432", ":0", "0.0.0.0:0"} {
		network := &spoken{}
		out, err := run(t, network, "/proc/self/exe", "inside", "own", address)
		if err != nil || out != "own hello" || len(network.dialed) > 0 {
			t.Errorf("%s: %q, %v; dialed %v", address, out, err, network.dialed)
		}
	}
}

// The command is who it would be outside, where it would be.
func TestWhoAndWhere(t *testing.T) {
	const script = `id -u; id -g; pwd; echo $CULVERT_TEST; cat /etc/resolv.conf; grep -c . /etc/hosts; umask; ulimit -n; grep CapEff /proc/self/status; ls /sys/class/net >/dev/null && cat /proc/net/dev | grep -c :; test -e /var/run/nscd/socket; echo $?`
	t.Setenv("CULVERT_TEST", "kept")
	plain, err := exec.Command("sh", "-c", script).Output()
	if err != nil {
		t.Fatal(err)
	}
	out, err := run(t, &spoken{}, "sh", "-c", script)
	if err != nil {
		t.Fatal(err, out)
	}
	before, mine, _ := strings.Cut(string(plain), "kept\n")
	if !strings.HasPrefix(out, before+"kept\n"+conf) {
		t.Errorf("inside:\n%s\noutside:\n%s", out, plain)
	}
	end := strings.Split(strings.TrimSpace(out), "\n")
	was := strings.Split(strings.TrimSpace(mine), "\n")
	if a, b := end[len(end)-6:len(end)-2], was[len(was)-6:len(was)-2]; strings.Join(a, " ") != strings.Join(b, " ") {
		t.Errorf("hosts, umask, files and capabilities are %v, outside %v", a, b)
	}
	if end[len(end)-2] != "2" {
		t.Errorf("%s devices inside, want lo and one more", end[len(end)-2])
	}
}

func TestHowItEnds(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "kill -TERM $$": 128 + 15, "kill -KILL $$": 128 + 9} {
		_, err := run(t, &spoken{}, "sh", "-c", script)
		var exit *process.ExitError
		if code := 0; errors.As(err, &exit) && exit.Code != want || exit == nil && code != want {
			t.Errorf("%s: %v, want %d", script, err, want)
		}
	}
	if _, err := Look("no-such-command"); err == nil || err.(*ExecError).Code() != 127 {
		t.Error(err)
	}
	if _, err := Look("/etc/passwd"); err == nil || err.(*ExecError).Code() != 126 {
		t.Error(err)
	}
}

// Where an administrator wants no user namespaces, that is said. It is so in one here.
func TestRefused(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root needs none")
	}
	cmd := exec.Command("/proc/self/exe", "inside", "check")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	asUser(cmd.SysProcAttr)
	cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_RESOURCE}
	out, err := cmd.Output()
	if err == nil || !strings.Contains(string(out), "user.max_user_namespaces is 0") {
		t.Errorf("%s, %v", out, err)
	}
}

// The command ends with who started it, whatever ended that.
func TestItEndsWithUs(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", "inside", "run", "sh", "-c", "echo $$; exec sleep 60")
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	line, err := bufio.NewReader(r).ReadString('\n')
	if _, nan := strconv.Atoi(strings.TrimSpace(line)); err != nil || nan != nil {
		t.Fatal(line, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	_ = r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.Copy(io.Discard, r); err != nil { // the end comes with the last who writes
		t.Error(err)
	}
}

func TestSignals(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s, err := Start(Config{Path: "/bin/sh", Args: []string{"sh", "-c", "trap 'exit 7' INT; echo ready; while :; do sleep 0.01; done"}, MTU: 65535, Addrs: addrs, Stdout: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer serve(t, s, &spoken{})()
	if _, err := io.ReadFull(r, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	s.Signal(syscall.SIGINT)
	var exit *process.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.Code != 7 {
		t.Error(err)
	}
}
