// Package channeltest is what every Channel, and every Network, has to hold to:
// package channel's promises, one test each, with real sockets at the far end.
package channeltest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Open makes a Channel whose far end serves a Network. It closes the Channel,
// and waits for its far end, in t.Cleanup.
type Open func(t *testing.T, far channel.Network) channel.Channel

// patience is for what must happen: nobody waits so long unless a test fails.
const patience = 20 * time.Second

// Run puts a Channel to the test.
func Run(t *testing.T, open Open) {
	host := func(t *testing.T) channel.Network { return open(t, &channel.Host{}) }
	RunNetwork(t, host)
	for _, test := range []struct {
		name string
		run  func(*testing.T, Open)
	}{
		{"dial cancelled", testDialCancelled},
		{"errors cross", testErrorsCross},
		{"close", testClose},
		{"close ends far end", testCloseEndsFar},
		{"pending taken", testPendingTaken},
		{"pending refused", testPendingRefused},
		{"pending closed", testPendingClosed},
		{"pending by wire", testPendingWire},
	} {
		t.Run(test.name, func(t *testing.T) {
			NoLeak(t)
			test.run(t, open)
		})
	}
}

// RunNetwork puts a Network to the test that reaches this machine's sockets.
func RunNetwork(t *testing.T, open func(*testing.T) channel.Network) {
	RunStreams(t, open)
	run(t, open, []networkTest{
		{"tcp reset", testReset},
		{"tcp listen", testListen},
		{"tcp listener close", testListenerClose},
		{"tcp listen refused", testListenRefused},
		{"udp", testUDP},
		{"udp refused", testUDPRefused},
		{"udp boundaries", testBoundaries},
		{"udp deadlines", testUDPDeadlines},
		{"udp listen", testListenUDP},
		{"ping", testPing},
		{"unknown network", testUnknown},
	})
}

// RunStreams is the part of it that every far end can do: streams that are dialled.
func RunStreams(t *testing.T, open func(*testing.T) channel.Network) {
	run(t, open, []networkTest{
		{"tcp", testTCP},
		{"tcp by name", testName},
		{"tcp refused", testRefused},
		{"tcp half-close near", testHalfCloseNear},
		{"tcp half-close far", testHalfCloseFar},
		{"tcp close with data", testCloseWithData},
		{"tcp large both ways", testLarge},
		{"tcp many", testMany},
		{"tcp slow reader", testSlowReader},
		{"tcp deadlines", testDeadlines},
		{"tcp write deadline", testWriteDeadline},
		{"tcp close unblocks", testCloseUnblocks},
	})
}

type networkTest struct {
	name string
	run  func(*testing.T, channel.Network)
}

func run(t *testing.T, open func(*testing.T) channel.Network, tests []networkTest) {
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			NoLeak(t)
			test.run(t, open(t))
		})
	}
}

// NoLeak fails a test that leaves a goroutine.
func NoLeak(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
}

func testTCP(t *testing.T, n channel.Network) {
	c := dial(t, n, "tcp", echoTCP(t))
	exchange(t, c, []byte("hello"))
	exchange(t, c, []byte("again"))
	testAddrs(t, c, "tcp")
}

func testAddrs(t *testing.T, c net.Conn, network string) {
	t.Helper()
	for _, a := range []net.Addr{c.LocalAddr(), c.RemoteAddr()} {
		if a == nil || a.Network() != network || a.String() == "" {
			t.Errorf("address %#v of a %s connection", a, network)
		}
	}
}

func testName(t *testing.T, n channel.Network) {
	_, port, _ := net.SplitHostPort(echoTCP(t))
	exchange(t, dial(t, n, "tcp", "localhost:"+port), []byte("hello"))

	_, err := n.DialContext(soon(t), "tcp", "no-such-host.invalid:80")
	var name *net.DNSError
	if !errors.As(err, &name) {
		t.Errorf("dial of an unknown name: %v, want a DNS error", err)
	}
}

func testRefused(t *testing.T, n channel.Network) {
	_, err := n.DialContext(soon(t), "tcp", closedPort(t, "tcp"))
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
}

// testHalfCloseNear: the far end answers only after the near end's FIN.
func testHalfCloseNear(t *testing.T, n channel.Network) {
	answer := random(10 << 20)
	c := dial(t, n, "tcp", ServeTCP(t, func(c net.Conn) {
		io.Copy(io.Discard, c)
		c.Write(answer)
	}))
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	closeWrite(t, c)
	if _, err := c.Write([]byte("more")); err == nil {
		t.Error("write after CloseWrite succeeded")
	}
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, answer) {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, len(answer))
	}
}

// testHalfCloseFar: the near end goes on writing after the far end's FIN.
func testHalfCloseFar(t *testing.T, n channel.Network) {
	got := make(chan []byte, 1)
	c := dial(t, n, "tcp", ServeTCP(t, func(c net.Conn) {
		c.Write([]byte("greeting"))
		c.(*net.TCPConn).CloseWrite()
		b, _ := io.ReadAll(c)
		got <- b
	}))
	if b, err := io.ReadAll(c); err != nil || string(b) != "greeting" {
		t.Fatalf("read %q, %v", b, err)
	}
	data := random(3 << 20)
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	closeWrite(t, c)
	if b := receive(t, got); !bytes.Equal(b, data) {
		t.Errorf("far end read %d bytes, want %d", len(b), len(data))
	}
}

// testReset: what a peer broke off cannot be taken for the whole.
func testReset(t *testing.T, n channel.Network) {
	c := dial(t, n, "tcp", ServeTCP(t, func(c net.Conn) {
		io.ReadFull(c, make([]byte, 1))
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}))
	c.Write([]byte("x"))
	if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %q, %v; want ECONNRESET", b, err)
	}
}

// testCloseWithData: Close lets arrive what was written before.
func testCloseWithData(t *testing.T, n channel.Network) {
	got := make(chan []byte, 1)
	c := dial(t, n, "tcp", ServeTCP(t, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		got <- b
	}))
	data := random(1 << 20)
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if b := receive(t, got); !bytes.Equal(b, data) {
		t.Errorf("far end read %d bytes, want %d", len(b), len(data))
	}
}

func testLarge(t *testing.T, n channel.Network) {
	const size = 16 << 20
	down := random(size)
	up := make(chan [32]byte, 1)
	c := dial(t, n, "tcp", ServeTCP(t, func(c net.Conn) {
		var wg sync.WaitGroup
		wg.Go(func() {
			c.Write(down)
			c.(*net.TCPConn).CloseWrite()
		})
		up <- hashAll(c)
		wg.Wait()
	}))
	data := random(size)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Write(data); err != nil {
			t.Error("write:", err)
		}
		closeWrite(t, c)
	})
	if hashAll(c) != sha256.Sum256(down) {
		t.Error("what came down differs")
	}
	wg.Wait()
	if receive(t, up) != sha256.Sum256(data) {
		t.Error("what went up differs")
	}
}

func testMany(t *testing.T, n channel.Network) {
	address := echoTCP(t)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			c, err := n.DialContext(soon(t), "tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			data := random(100_000)
			go c.Write(data)
			got := make([]byte, len(data))
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("echo differs, %v", err)
			}
		})
	}
	wg.Wait()
}

// testSlowReader: one connection that nobody reads does not stop the others.
func testSlowReader(t *testing.T, n channel.Network) {
	flood := ServeTCP(t, func(c net.Conn) {
		buf := make([]byte, 1<<20)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	for range 4 {
		dial(t, n, "tcp", flood)
	}
	c := dial(t, n, "tcp", echoTCP(t))
	for range 50 {
		exchange(t, c, random(10_000))
	}
}

func testDeadlines(t *testing.T, n channel.Network) {
	testReadDeadline(t, dial(t, n, "tcp", echoTCP(t)))
}

func testUDPDeadlines(t *testing.T, n channel.Network) {
	testReadDeadline(t, dial(t, n, "udp", echoUDP(t)))
}

func testReadDeadline(t *testing.T, c net.Conn) {
	buf := make([]byte, 10)
	timedOut := func(what string) {
		t.Helper()
		var ne net.Error
		if _, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%s: %v, want a timeout", what, err)
		}
	}
	c.SetReadDeadline(time.Now().Add(-time.Second))
	timedOut("past deadline")
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	timedOut("near deadline")
	c.SetReadDeadline(time.Time{})
	early := time.AfterFunc(20*time.Millisecond, func() { c.SetReadDeadline(time.Now()) })
	timedOut("deadline set while reading")
	early.Stop()
	c.SetDeadline(time.Time{})
	exchange(t, c, []byte("still good"))
	c.SetDeadline(time.Now().Add(patience))
	exchange(t, c, []byte("with time"))
}

func testWriteDeadline(t *testing.T, n channel.Network) {
	release := make(chan struct{})
	silent := ServeTCP(t, func(net.Conn) { <-release })
	t.Cleanup(func() { close(release) })
	for _, late := range []bool{false, true} {
		c := dial(t, n, "tcp", silent)
		if late {
			defer time.AfterFunc(50*time.Millisecond, func() { c.SetDeadline(time.Now()) }).Stop()
		} else {
			c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		}
		if err := flood(c); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("late=%v: %v, want a timeout", late, err)
		}
	}
}

// flood writes until that fails.
func flood(c net.Conn) error {
	buf := make([]byte, 1<<20)
	for {
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
}

func testCloseUnblocks(t *testing.T, n channel.Network) {
	release := make(chan struct{})
	silent := ServeTCP(t, func(net.Conn) { <-release })
	t.Cleanup(func() { close(release) })
	c := dial(t, n, "tcp", silent)
	res := make(chan error, 2)
	go func() { res <- flood(c) }()
	go func() {
		_, err := c.Read(make([]byte, 1))
		res <- err
	}()
	time.AfterFunc(50*time.Millisecond, func() { c.Close() })
	for range 2 {
		if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want net.ErrClosed", err)
		}
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v, want net.ErrClosed", err)
	}
}

func testListen(t *testing.T, n channel.Network) {
	l := listen(t, n, "tcp")
	for _, closeFirst := range []string{"near", "far"} {
		far, near := meet(t, l, "tcp")
		testAddrs(t, near, "tcp")
		if got, want := near.RemoteAddr().String(), far.LocalAddr().String(); got != want {
			t.Errorf("remote address %s, want %s", got, want)
		}
		a, b := near, far
		if closeFirst == "far" {
			a, b = far, near
		}
		data := random(1 << 20)
		go func() {
			a.Write(data)
			a.(channel.CloseWriter).CloseWrite()
		}()
		if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
		b.Write([]byte("bye"))
		b.Close()
		if got, err := io.ReadAll(a); err != nil || string(got) != "bye" {
			t.Errorf("read %q, %v", got, err)
		}
	}
}

// meet connects to a listener from the far end's side.
func meet(t *testing.T, l net.Listener, network string) (far, near net.Conn) {
	t.Helper()
	far, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	if network == "udp" {
		far.Write([]byte("first"))
	}
	near, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	return far, near
}

func testListenerClose(t *testing.T, n channel.Network) {
	l := listen(t, n, "tcp")
	far, near := meet(t, l, "tcp")
	res := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		res <- err
	}()
	l.Close()
	if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v, want net.ErrClosed", err)
	}
	go io.Copy(far, far)
	exchange(t, near, []byte("an accepted connection lives on"))

	again, err := n.Listen(soon(t), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal("listen again:", err)
	}
	defer again.Close()
	meet(t, again, "tcp")
}

func testListenRefused(t *testing.T, n channel.Network) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, err = n.Listen(soon(t), "tcp", taken.Addr().String())
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen: %v, want EADDRINUSE", err)
	}
}

func testUDP(t *testing.T, n channel.Network) {
	address := echoUDP(t)
	c := dial(t, n, "udp", address)
	testAddrs(t, c, "udp")
	if c.RemoteAddr().String() != address {
		t.Errorf("remote address %s, want %s", c.RemoteAddr(), address)
	}
	exchange(t, c, []byte("hello"))
	exchange(t, c, []byte("again"))
}

// testUDPRefused: an ICMP port unreachable is an error of Read.
func testUDPRefused(t *testing.T, n channel.Network) {
	c := dial(t, n, "udp", closedPort(t, "udp"))
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("anybody?")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("read: %v, want ECONNREFUSED", err)
	}
}

func testBoundaries(t *testing.T, n channel.Network) {
	c := dial(t, n, "udp", echoUDP(t))
	for _, size := range []int{0, 1, 1200, 65507, 3} {
		exchange(t, c, random(size))
	}
	data := random(1000)
	c.Write(data)
	c.Write([]byte("next"))
	short := make([]byte, 10)
	if m, err := c.Read(short); err != nil || !bytes.Equal(short[:m], data[:10]) {
		t.Errorf("short read: %d bytes, %v", m, err)
	}
	if m, err := c.Read(short); err != nil || string(short[:m]) != "next" {
		t.Errorf("read %q, %v: the rest of a datagram is gone", short[:m], err)
	}
	if _, err := c.Write(make([]byte, 70_000)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("write of 70000 bytes: %v, want EMSGSIZE", err)
	}
}

func testListenUDP(t *testing.T, n channel.Network) {
	l := listen(t, n, "udp")
	for range 3 {
		far, near := meet(t, l, "udp")
		testAddrs(t, near, "udp")
		if got, want := near.RemoteAddr().String(), far.LocalAddr().String(); got != want {
			t.Errorf("remote address %s, want %s", got, want)
		}
		buf := make([]byte, 100)
		near.SetReadDeadline(time.Now().Add(patience))
		if m, err := near.Read(buf); err != nil || string(buf[:m]) != "first" {
			t.Fatalf("read %q, %v", buf[:m], err)
		}
		go echoAll(far)
		for _, size := range []int{0, 1, 1200} {
			exchange(t, near, random(size))
		}
	}
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after Close: %v, want net.ErrClosed", err)
	}
}

func testPing(t *testing.T, n channel.Network) {
	for _, to := range []struct {
		address    string
		ask, reply byte
	}{{"127.0.0.1", 8, 0}, {"::1", 128, 129}} {
		c, err := n.DialContext(soon(t), "ping", to.address)
		if errors.Is(err, syscall.EACCES) || errors.Is(err, errors.ErrUnsupported) {
			t.Skip("no echo sockets here:", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		testEcho(t, c, to.ask, to.reply)
	}
}

// testEcho sends requests of several identifiers over one connection.
func testEcho(t *testing.T, c net.Conn, ask, reply byte) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	for i := range byte(5) {
		msg := append([]byte{ask, 0, 0, 0, 0xab, i, 0, i}, random(56)...)
		if _, err := c.Write(msg); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 100)
		m, err := c.Read(got)
		if err != nil {
			t.Fatal(err)
		}
		if m != len(msg) || got[0] != reply || !bytes.Equal(got[4:m], msg[4:]) {
			t.Errorf("reply %x to %x", got[:m], msg)
		}
		if reply == 0 && checksum(got[:m]) != 0 {
			t.Errorf("wrong checksum in %x", got[:m])
		}
	}
}

// checksum of a message that holds its checksum is 0.
func checksum(msg []byte) uint16 {
	var sum uint32
	for i := 0; i < len(msg); i += 2 {
		sum += uint32(msg[i])<<8 | uint32(msg[i+1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func testUnknown(t *testing.T, n channel.Network) {
	var unknown net.UnknownNetworkError
	if _, err := n.DialContext(soon(t), "sctp", "127.0.0.1:1"); !errors.As(err, &unknown) {
		t.Errorf("dial: %v, want UnknownNetworkError", err)
	}
	if _, err := n.Listen(soon(t), "sctp", "127.0.0.1:0"); !errors.As(err, &unknown) {
		t.Errorf("listen: %v, want UnknownNetworkError", err)
	}
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func random(n int) []byte {
	b := make([]byte, n)
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	rand.NewChaCha8(seed).Read(b)
	return b
}
