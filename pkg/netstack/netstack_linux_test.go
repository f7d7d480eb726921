package netstack_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// each runs the test on every kind of link and family.
func each(t *testing.T, f func(t *testing.T, e *farEnd, host string, s *netstack.Stack)) {
	needNetns(t)
	for _, mtu := range []int{1500, 65535} {
		for _, host := range []string{web4, web6} {
			t.Run(fmt.Sprintf("%s mtu %d", host, mtu), func(t *testing.T) {
				e := newFarEnd(t)
				f(t, e, host, start(t, mtu, e))
			})
		}
	}
	t.Run("no virtio header", func(t *testing.T) {
		e := newFarEnd(t)
		f(t, e, web4, start(t, 1500, e, func(c *netstack.Config) { c.Device = whole(t, c.Device) }))
	})
}

// whole takes the offloads from a device, so that it can do without the header.
func whole(t testing.TB, d netstack.Device) netstack.Device {
	dev := d.(*tun.Device)
	raw, err := dev.File().SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, 0) }))
	must(t, err)
	return plain{dev}
}

// serve accepts on the far end.
func serve(t testing.TB, e *farEnd, address string, f func(net.Conn)) {
	t.Helper()
	l, err := e.Listen(context.Background(), "tcp", address)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c)
		}
	}()
}

func dial(t testing.TB, network, address string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(network, address, 20*time.Second)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(60 * time.Second))
	return c
}

func TestDialErrnos(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	s := start(t, 65535, e)
	for _, c := range []struct {
		host string
		want syscall.Errno
	}{
		{web4, syscall.ECONNREFUSED}, {web6, syscall.ECONNREFUSED},
		{noHost4, syscall.EHOSTUNREACH}, {noHost6, syscall.EHOSTUNREACH},
		{forbid4, syscall.EHOSTUNREACH}, // ICMP has a code for it, and Linux makes this of it
		{forbid6, syscall.EACCES},
	} {
		for _, network := range []string{"tcp", "udp"} {
			began := time.Now()
			d := net.Dialer{Timeout: 20 * time.Second, Control: tellAll}
			conn, err := d.Dial(network, net.JoinHostPort(c.host, "1"))
			if network == "udp" {
				must(t, err)
				_, err = conn.Write([]byte("?"))
				must(t, err)
				conn.SetReadDeadline(time.Now().Add(20 * time.Second))
				_, err = conn.Read(make([]byte, 1))
			}
			if !errors.Is(err, c.want) {
				t.Errorf("%s to %s: %v, want %v", network, c.host, err, c.want)
			}
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("%s to %s: told after %v", network, c.host, took)
			}
			if conn != nil {
				conn.Close()
			}
		}
	}
	if st := s.Stats(); st.TCP.DialFailures != 6 {
		t.Errorf("%+v", st)
	}
}

// tellAll has a UDP socket told of every ICMP error. Without it, Linux says only
// what it holds for final.
func tellAll(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVERR, 1)
		unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVERR, 1)
	})
}

// TestSilenceIsSilence: nobody answers there, so nobody answers here.
func TestSilenceIsSilence(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	start(t, 65535, e, func(c *netstack.Config) { c.DialTimeout = 500 * time.Millisecond })
	for _, host := range []string{deaf4, deaf6} {
		_, err := net.DialTimeout("tcp", net.JoinHostPort(host, "80"), 3*time.Second)
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("dial %s: %v", host, err)
		}
	}
}

// TestDialFirst: the app is connected no sooner than the far end is, and one
// dial serves a SYN however often it's sent.
func TestDialFirst(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	serve(t, e, net.JoinHostPort(web4, "80"), func(c net.Conn) { io.Copy(c, c); c.Close() })
	g := newGate(e)
	start(t, 65535, g)
	connected := make(chan net.Conn, 1)
	go func() { connected <- dial(t, "tcp", net.JoinHostPort(web4, "80")) }()
	<-g.entered
	select {
	case <-connected:
		t.Fatal("connected before the dial was done")
	case <-g.entered:
		t.Fatal("a second dial for the same SYN")
	case <-time.After(2500 * time.Millisecond): // SYNs at 0, 1 and 2 s
	}
	close(g.open)
	c := <-connected
	fmt.Fprint(c, "ping")
	if got := readN(t, c, 4); got != "ping" {
		t.Errorf("echo of %q", got)
	}
}

// TestShutdownWhileDialing: Run does not wait for a Network that is stuck.
func TestShutdownWhileDialing(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	g := newGate(e)
	start(t, 65535, g)
	ctx, cancel := context.WithCancel(context.Background())
	var d net.Dialer
	go d.DialContext(ctx, "tcp", net.JoinHostPort(web4, "80"))
	<-g.entered
	u := dial(t, "udp", net.JoinHostPort(web4, "80"))
	u.Write([]byte("x"))
	<-g.entered
	cancel()
}

func readN(t testing.TB, c io.Reader, n int) string {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestD25HalfClose(t *testing.T) {
	each(t, func(t *testing.T, e *farEnd, host string, s *netstack.Stack) {
		// The far end answers only when it has heard the end.
		serve(t, e, net.JoinHostPort(host, "80"), func(c net.Conn) {
			b, _ := io.ReadAll(c)
			fmt.Fprintf(c, "heard %d", len(b))
			c.Close()
		})
		c := dial(t, "tcp", net.JoinHostPort(host, "80"))
		c.Write(make([]byte, 300000))
		must(t, c.(*net.TCPConn).CloseWrite())
		b, err := io.ReadAll(c)
		if err != nil || string(b) != "heard 300000" {
			t.Errorf("%q, %v", b, err)
		}
		// And the other way about: the far end has said all, and listens.
		heard := make(chan string, 1)
		serve(t, e, net.JoinHostPort(host, "81"), func(c net.Conn) {
			fmt.Fprint(c, "hello")
			c.(*net.TCPConn).CloseWrite()
			b, _ := io.ReadAll(c)
			heard <- string(b)
			c.Close()
		})
		c = dial(t, "tcp", net.JoinHostPort(host, "81"))
		b, err = io.ReadAll(c)
		if err != nil || string(b) != "hello" {
			t.Errorf("%q, %v", b, err)
		}
		fmt.Fprint(c, "late words")
		c.Close()
		if got := <-heard; got != "late words" {
			t.Errorf("the far end heard %q", got)
		}
	})
}

// Who opens many connections has each port come again, at once or while the stack still
// waits for what strays.
func TestPortComesAgain(t *testing.T) {
	t.Run("remote", func(t *testing.T) {
		needNetns(t)
		e := newFarEnd(t)
		start(t, 1500, e, func(c *netstack.Config) { c.Remote = true })
		portComesAgain(t, e, web4)
	})
	each(t, func(t *testing.T, e *farEnd, host string, s *netstack.Stack) { portComesAgain(t, e, host) })
}

func portComesAgain(t *testing.T, e *farEnd, host string) {
	const rounds = 50
	address, late := net.JoinHostPort(host, "80"), 0
	serve(t, e, address, func(c net.Conn) { c.Close() })
	d := net.Dialer{Timeout: 500 * time.Millisecond, LocalAddr: &net.TCPAddr{}} // a SYN is said again after 1 s
	for range rounds {
		c, err := d.Dial("tcp", address)
		for errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.EADDRINUSE) {
			if errors.Is(err, syscall.EADDRINUSE) { // this kernel does not know of the end yet
				time.Sleep(time.Millisecond)
			} else {
				late++ // or before the stack knew of it
			}
			c, err = d.Dial("tcp", address)
		}
		must(t, err)
		io.ReadAll(c)
		d.LocalAddr = c.LocalAddr()
		c.Close()
		time.Sleep(10 * time.Millisecond) // less than any wait
	}
	if late > rounds/10 {
		t.Errorf("%d of %d were not answered at once", late, rounds)
	}
}

func TestResetBothWays(t *testing.T) {
	each(t, func(t *testing.T, e *farEnd, host string, s *netstack.Stack) {
		serve(t, e, net.JoinHostPort(host, "80"), func(c net.Conn) {
			readN(t, c, 1)
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		})
		c := dial(t, "tcp", net.JoinHostPort(host, "80"))
		c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the far end's reset is %v", err)
		}
		got := make(chan error, 1)
		serve(t, e, net.JoinHostPort(host, "81"), func(c net.Conn) {
			c.Write([]byte("x"))
			_, err := c.Read(make([]byte, 1))
			got <- err
			c.Close()
		})
		c = dial(t, "tcp", net.JoinHostPort(host, "81"))
		readN(t, c, 1)
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
		if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the app's reset is %v", err)
		}
	})
}

// TestShutdownResets: an app whose flow ends with the Stack is told.
func TestShutdownResets(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	serve(t, e, net.JoinHostPort(web4, "80"), func(c net.Conn) { io.Copy(c, c); c.Close() })
	_, s := prepare(t, 65535, e)
	stop := run(s)
	c := dial(t, "tcp", net.JoinHostPort(web4, "80"))
	fmt.Fprint(c, "x")
	readN(t, c, 1)
	must(t, stop())
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read after the end of Run: %v", err)
	}
}

func TestPosts(t *testing.T) {
	each(t, func(t *testing.T, e *farEnd, host string, s *netstack.Stack) {
		const flows = 13
		size := int64(20 << 20)
		if strings.Contains(t.Name(), "no_virtio") {
			size = 2 << 20 // every segment on its own is slow
		}
		serve(t, e, net.JoinHostPort(host, "80"), func(c net.Conn) { io.Copy(c, c); c.(*net.TCPConn).CloseWrite(); c.Close() })
		var all sync.WaitGroup
		for i := range flows {
			c := dial(t, "tcp", net.JoinHostPort(host, "80"))
			all.Go(func() {
				if _, err := io.CopyN(c, noise(i), size); err != nil {
					t.Error(err)
				}
				c.(*net.TCPConn).CloseWrite()
			})
			all.Go(func() {
				if err := same(c, io.LimitReader(noise(i), size)); err != nil {
					t.Errorf("flow %d: %v", i, err)
				}
			})
		}
		all.Wait()
		for _, n := range []uint64{s.Stats().TCP.Sent, s.Stats().TCP.Received} {
			if n != uint64(size)*flows {
				t.Errorf("%d bytes were counted, want %d", n, size*flows)
			}
		}
	})
}

func noise(seed int) io.Reader {
	var key [32]byte
	key[0] = byte(seed)
	return rand.NewChaCha8(key)
}

func same(a, b io.Reader) error {
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := 0; ; at += len(x) {
		n, err := io.ReadFull(a, x)
		m, _ := io.ReadFull(b, y)
		if !bytes.Equal(x[:n], y[:m]) {
			return fmt.Errorf("differs after %d bytes (%d and %d more, %v)", at, n, m, err)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// echoUDP answers every datagram on the far end.
func echoUDP(t testing.TB, e *farEnd, address string) {
	t.Helper()
	var pc net.PacketConn
	must(t, e.in(func() (err error) {
		pc, err = net.ListenPacket("udp", address)
		return err
	}))
	t.Cleanup(func() { pc.Close() })
	go func() {
		b := make([]byte, 65535)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:n], from)
		}
	}()
}

func TestUDPOfEverySize(t *testing.T) {
	each(t, func(t *testing.T, e *farEnd, host string, s *netstack.Stack) {
		echoUDP(t, e, net.JoinHostPort(host, "53"))
		c := dial(t, "udp", net.JoinHostPort(host, "53"))
		for i, size := range []int{0, 1, 512, 1232, 1472, 1473, 4096, 9000, 16384, 65000, 65507} {
			want := make([]byte, size)
			io.ReadFull(noise(i), want)
			got := make([]byte, 65535)
			_, err := c.Write(want)
			must(t, err)
			n, err := c.Read(got)
			must(t, err)
			if !bytes.Equal(got[:n], want) {
				t.Errorf("of %d bytes came back %d", size, n)
			}
		}
	})
}

// TestUDPFlows: each socket is a flow of its own, which ends when it's idle, and
// one that has ended begins again.
func TestUDPFlows(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	s := start(t, 65535, e, func(c *netstack.Config) { c.UDPIdle = 300 * time.Millisecond; c.MaxUDP = 5 })
	echoUDP(t, e, web4+":9")
	var conns []net.Conn
	say := func(c net.Conn) error {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprint(c, c.LocalAddr())
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err == nil && string(b[:n]) != c.LocalAddr().String() {
			t.Errorf("%v hears %s", c.LocalAddr(), b[:n])
		}
		return err
	}
	for range 5 {
		conns = append(conns, dial(t, "udp", web4+":9"))
		must(t, say(conns[len(conns)-1]))
	}
	until(t, "five flows end", func() bool { return s.Stats().UDP.Open == 0 })
	for range 2 {
		for _, c := range conns {
			must(t, say(c))
		}
	}
	if n := s.Stats().UDP.Open; n != 5 {
		t.Errorf("%d flows are open", n)
	}
}

// TestUDPRefusedLate: a flow that was carried once is refused when its server
// goes.
func TestUDPRefusedLate(t *testing.T) {
	each(t, func(t *testing.T, e *farEnd, host string, s *netstack.Stack) {
		address := net.JoinHostPort(host, "9")
		var pc net.PacketConn
		must(t, e.in(func() (err error) {
			pc, err = net.ListenPacket("udp", address)
			return err
		}))
		c := dial(t, "udp", address)
		fmt.Fprint(c, "a")
		b := make([]byte, 10)
		_, from, err := pc.ReadFrom(b)
		must(t, err)
		pc.WriteTo(b[:1], from)
		readN(t, c, 1)
		pc.Close()
		fmt.Fprint(c, "b")
		if _, err := c.Read(b); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("after the server went: %v", err)
		}
	})
}

func TestPing(t *testing.T) {
	needNetns(t)
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip("needs ping, of iputils-ping")
	}
	for _, mtu := range []int{1500, 65535} {
		t.Run(fmt.Sprint("mtu ", mtu), func(t *testing.T) { testPing(t, start(t, mtu, newFarEnd(t)), mtu) })
	}
}

func ping(host, size string, args ...string) (string, error) {
	out, err := exec.Command("ping", append([]string{"-n", "-i0.1", "-c2", "-s" + size, host}, args...)...).CombinedOutput()
	return string(out), err
}

func testPing(t *testing.T, s *netstack.Stack, mtu int) {
	sizes := map[string][]string{
		web4: {"0", "56", "1400", "1472", "1473", "9000", "65000"}, // the kernel cuts the large ones in pieces
		web6: {"0", "56", "1400", "1452"},
	}
	if mtu > 65000 {
		sizes[web6] = append(sizes[web6], "65000")
	}
	for host, sizes := range sizes {
		for _, size := range sizes {
			out, err := ping(host, size, "-W5")
			if err != nil || !strings.Contains(out, "2 packets transmitted, 2 received") || strings.Contains(out, "DUP") || strings.Contains(out, "wrong") {
				t.Errorf("ping %s of %s bytes: %v\n%s", host, size, err, out)
			}
		}
	}
	for _, host := range []string{deaf4, deaf6} {
		for _, size := range []string{"56", "9000"} {
			out, err := ping(host, size, "-W1")
			if err == nil || !strings.Contains(out, "2 packets transmitted, 0 received") || strings.Contains(out, "errors") {
				t.Errorf("nobody is at %s: %v\n%s", host, err, out)
			}
		}
	}
	for host, words := range map[string]string{
		noHost4: "Destination Host Unreachable", noHost6: "Address unreachable",
		forbid4: "Packet filtered", forbid6: "Administratively prohibited",
	} {
		out, err := ping(host, "56", "-W5")
		if err == nil || !strings.Contains(out, words) {
			t.Errorf("ping %s: %v\n%s", host, err, out)
		}
	}
	if st := s.Stats().Ping; st.DialFailures != 8 || st.Sent == 0 || st.Received == 0 {
		t.Errorf("%+v", st)
	}
}

// TestDeviceGone: Run ends when its device does, whatever is open, and says so.
func TestDeviceGone(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	serve(t, e, web4+":80", func(c net.Conn) { io.Copy(c, c); c.Close() })
	before := goleak.IgnoreCurrent()
	d, s := prepare(t, 65535, e)
	ended := make(chan error, 1)
	go func() { ended <- s.Run(context.Background()) }()
	c := dial(t, "tcp", web4+":80")
	fmt.Fprint(c, "x")
	readN(t, c, 1)
	must(t, d.Close())
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Run goes on without a device")
	}
	if n := s.Stats().TCP.Open; n != 0 {
		t.Errorf("%d flows are left", n)
	}
	c.Close()
	until(t, "the far end's goroutine ends", func() bool { return goleak.Find(before) == nil })
}

// TestIdleFlows: a thousand connections are open, work, and end.
func TestIdleFlows(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	serve(t, e, web4+":80", func(c net.Conn) { io.Copy(c, c); c.Close() })
	s := start(t, 65535, e)
	const flows = 1000
	conns := make([]net.Conn, flows)
	var next atomic.Int64
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for i := next.Add(1) - 1; i < flows; i = next.Add(1) - 1 {
				conns[i] = dial(t, "tcp", web4+":80")
			}
		})
	}
	all.Wait()
	until(t, "all flows are open", func() bool { return s.Stats().TCP.Open == flows })
	for i, c := range conns {
		fmt.Fprintf(c, "%04d", i)
	}
	for i, c := range conns {
		if got := readN(t, c, 4); got != fmt.Sprintf("%04d", i) {
			t.Fatalf("flow %d says %s", i, got)
		}
		c.Close()
	}
	until(t, "all flows end", func() bool { return s.Stats().TCP.Open == 0 })
}

// What the far end sends to this machine, as a cluster on it may, is not sent there again.
func TestNoLoop(t *testing.T) {
	needNetns(t)
	e := newFarEnd(t)
	serve(t, e, web4+":80", func(c net.Conn) { c.Close() })
	start(t, 65535, e, func(c *netstack.Config) {
		c.Behind = netip.MustParsePrefix(routes4).Contains
	})
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	pod, err := netlink.ParseAddr("10.98.0.99/32")
	must(t, err)
	must(t, netlink.AddrAdd(lo, pod))
	began := time.Now()
	_, err = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: pod.IP}}).Dial("tcp", web4+":80")
	if !errors.Is(err, syscall.EHOSTUNREACH) || time.Since(began) > 3*time.Second {
		t.Errorf("from the far end: %v after %v", err, time.Since(began))
	}
	dial(t, "tcp", web4+":80").Close()
}
