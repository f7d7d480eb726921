package redirect_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/redirect"
)

const (
	podAddress  = "10.99.0.1"
	podAddress6 = "fd99::1"
	patience    = 10 * time.Second
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A client is another network namespace, with a link to this one: what comes from
// there is what comes to a pod from outside.
type client struct{ ns netns.NsHandle }

var joined *client

// theClient is made once for all tests.
func theClient(t *testing.T) *client {
	t.Helper()
	needNetns(t)
	if joined != nil {
		return joined
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	must(t, err)
	there, err := netns.New()
	must(t, err)
	must(t, netns.Set(here))
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(there)}))
	up(t, podAddress+"/24", podAddress6+"/64")
	must(t, netns.Set(there))
	up(t, "10.99.0.2/24", "fd99::2/64")
	must(t, netns.Set(here))
	joined = &client{there}
	return joined
}

func up(t *testing.T, addresses ...string) {
	t.Helper()
	eth, err := netlink.LinkByName("eth0")
	must(t, err)
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		must(t, err)
		a.Flags = syscall.IFA_F_NODAD
		must(t, netlink.AddrAdd(eth, a))
	}
	must(t, netlink.LinkSetUp(eth))
}

// dial connects from outside.
func (c *client) dial(t *testing.T, network, address string) net.Conn {
	t.Helper()
	conn, err := c.try(network, address, 0)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (c *client) try(network, address string, from int) (net.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer here.Close()
	if err := netns.Set(c.ns); err != nil {
		return nil, err
	}
	defer netns.Set(here)
	d := net.Dialer{Timeout: patience}
	if from > 0 {
		d.LocalAddr = &net.UDPAddr{Port: from}
	}
	return d.Dial(network, address)
}

// ask says something and returns who answers.
func ask(c net.Conn) (string, error) {
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.WriteString(c, "who?"); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

func answers(t *testing.T, c net.Conn, want string) {
	t.Helper()
	if got, err := ask(c); got != want {
		t.Errorf("%s %s answers %q, want %q: %v", c.RemoteAddr().Network(), c.RemoteAddr(), got, want, err)
	}
}

// original listens as the pod's own program does.
func original(t *testing.T, network, address string) {
	t.Helper()
	l, err := (&channel.Host{}).Listen(t.Context(), network, address)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go answer(l, "original")
}

// A takerProcess is a process that takes ports.
type takerProcess struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startTaker(t *testing.T, ports string) *takerProcess {
	t.Helper()
	p := &takerProcess{Cmd: exec.Command("/proc/self/exe")}
	p.Env = append(os.Environ(), taker+"="+ports)
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.Stderr = os.Stderr
	in, err := p.StdinPipe()
	must(t, err)
	out, err := p.StdoutPipe()
	must(t, err)
	runtime.LockOSThread() // whose death would be the child's
	must(t, p.Start())
	t.Cleanup(func() { p.Process.Kill(); p.Wait(); runtime.UnlockOSThread() })
	p.in, p.out = in, bufio.NewReader(out)
	p.hear(t, "up")
	return p
}

func (p *takerProcess) hear(t *testing.T, want string) {
	t.Helper()
	if line, err := p.out.ReadString('\n'); err != nil || strings.TrimSpace(line) != want {
		t.Fatalf("the process that takes ports says %q, %v", line, err)
	}
}

// tables lists those that the kernel has.
func tables(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "tables").CombinedOutput()
	if err != nil {
		t.Skipf("nft: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestTakesAndRestores(t *testing.T) {
	for _, test := range []struct{ network, listen, address string }{
		{"tcp", ":8080", podAddress + ":8080"},
		{"tcp", ":8081", "[" + podAddress6 + "]:8081"},
		{"udp", ":8080", podAddress + ":8080"},
		{"udp", ":8081", "[" + podAddress6 + "]:8081"},
	} {
		t.Run(test.network+" "+test.address, func(t *testing.T) {
			outside := theClient(t)
			original(t, test.network, test.listen)
			before := outside.dial(t, test.network, test.address)
			answers(t, before, "original")
			n, err := redirect.Open(&channel.Host{})
			must(t, err)
			l, err := n.Listen(t.Context(), test.network, test.listen)
			must(t, err)
			served := make(chan struct{})
			go func() { defer close(served); answer(l, "taken") }()

			led := outside.dial(t, test.network, test.address)
			answers(t, led, "taken")
			if test.network == "tcp" {
				answers(t, before, "original") // it was open
			} else {
				answers(t, before, "taken") // each datagram is a beginning
			}
			own, err := net.Dial(test.network, test.address)
			must(t, err)
			answers(t, own, "original")
			own.Close()

			must(t, n.Restore(t.Context()))
			must(t, n.Restore(t.Context()))
			if !n.Restored() {
				t.Error("it does not know")
			}
			answers(t, outside.dial(t, test.network, test.address), "original")
			if test.network == "tcp" {
				answers(t, led, "taken") // until it ends
			} else {
				answers(t, led, "original")
			}
			if _, err := n.Listen(t.Context(), test.network, test.listen); !errors.Is(err, net.ErrClosed) {
				t.Errorf("it takes again: %v", err)
			}
			led.Close()
			l.Close()
			<-served
			must(t, n.Close())
			if left := tables(t); left != "" {
				t.Errorf("left: %s", left)
			}
		})
	}
}

// Whatever ends the process ends the redirect, and who was served learns it.
func TestKilled(t *testing.T) {
	outside := theClient(t)
	original(t, "tcp", ":8080")
	original(t, "udp", ":8080")
	p := startTaker(t, "tcp/8080 udp/8080")
	held := outside.dial(t, "tcp", podAddress+":8080")
	flow, err := outside.try("udp", podAddress+":8080", 5555)
	must(t, err)
	defer flow.Close()
	answers(t, held, "taken")
	answers(t, flow, "taken")
	if n := strings.Count(tables(t), "table inet culvert-"); n != 1 {
		t.Errorf("%d tables: %s", n, tables(t))
	}
	must(t, p.Process.Kill())
	_ = p.Wait()
	killed := time.Now()
	_ = held.SetReadDeadline(time.Now().Add(patience))
	if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a client that waits is not told: %v", err)
	}
	t.Logf("a client that waited was told after %v", time.Since(killed))
	if left := tables(t); left != "" {
		t.Errorf("left: %s", left)
	}
	answers(t, outside.dial(t, "tcp", podAddress+":8080"), "original")
	answers(t, flow, "original")

	// Flows that the kernel still takes for the dead one's are led to the next.
	next := startTaker(t, "tcp/8080 udp/8080")
	answers(t, flow, "taken")
	fmt.Fprintln(next.in, "restore")
	next.hear(t, "restore <nil>")
	answers(t, flow, "original")
}

func TestNothingRunsOn(t *testing.T) {
	needNetns(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	n, err := redirect.Open(&channel.Host{})
	must(t, err)
	for _, network := range []string{"tcp", "udp"} {
		l, err := n.Listen(t.Context(), network, ":8080")
		must(t, err)
		must(t, l.Close())
	}
	if l, err := n.Listen(t.Context(), "tcp", "8080"); err == nil {
		l.Close()
		t.Error("no port is no error")
	}
	must(t, n.Close())
	must(t, n.Close())
}

// Two of them, for other ports, are not in each other's way.
func TestTwo(t *testing.T) {
	outside := theClient(t)
	for _, address := range []string{":8080", ":9090"} {
		original(t, "tcp", address)
	}
	a := startTaker(t, "tcp/8080")
	startTaker(t, "tcp/9090")
	answers(t, outside.dial(t, "tcp", podAddress+":8080"), "taken")
	answers(t, outside.dial(t, "tcp", podAddress+":9090"), "taken")
	must(t, a.Process.Kill())
	_ = a.Wait()
	answers(t, outside.dial(t, "tcp", podAddress+":8080"), "original")
	answers(t, outside.dial(t, "tcp", podAddress+":9090"), "taken")
}

func TestNotPermitted(t *testing.T) {
	if os.Getuid() == 0 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), taker+"=tcp/8080")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.Output()
		if err == nil || !strings.Contains(string(out), "open a table for redirects: make a table: ") || !strings.Contains(string(out), "not permitted") {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	if n, err := redirect.Open(&channel.Host{}); err == nil {
		n.Close()
		t.Error("anybody may redirect")
	}
}
