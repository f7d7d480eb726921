// Package wiretest is what every wire has to hold to, beside what package channeltest
// asks of a Channel: it lives and dies as said, is bounded in all that it does, is
// fair to its flows on a poor line, and can be kept. Run is for a wire over a byte
// stream, of which more is asked than RunSites does of any.
package wiretest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

// Ends are both ends of a wire, which know each other.
type Ends struct {
	Dial  func(ctx context.Context, conn net.Conn) (channel.Silent, error)
	Serve func(ctx context.Context, conn net.Conn, n channel.Network) error

	// Rest tells that what came before a wire broke can be read after that.
	Rest bool
}

// Beats is how the ends show that they live.
type Beats struct {
	Every     time.Duration // zero: as the wire has it, which is 2 s
	Near, Far func()        // called at the ends when the other one did; may be nil
}

// NewEnds makes ends with keys of their own.
type NewEnds func(t testing.TB, b Beats) Ends

// RunSites puts a wire to the test.
func RunSites(t *testing.T, sites NewSite) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, NewSite)
	}{
		{"channel", testChannel},
		{"channel kept", testKeep},
		{"hushed", testHushed},
		{"serve ends", testServeEnds},
		{"signs", testSigns},
		{"signs in upload", testSignsInUpload},
		{"slow wire", testSlowWire},
		{"full windows", testFullWindows},
		{"write late", testWriteLate},
		{"keep reopens", testKeepReopens},
		{"keep listens", testKeepListens},
		{"churn", testChurn},
		{"forward refused", testForwardRefused},
		{"forward burst", testForwardBurst},
		{"forward given up", testForwardGivenUp},
		{"forward kept", testForwardKept},
		{"forward udp", testForwardUDP},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, sites) })
	}
}

// Run puts a wire over a byte stream to the test.
func Run(t *testing.T, ends NewEnds) {
	RunSites(t, sites(ends))
	for _, test := range []struct {
		name string
		run  func(*testing.T, NewEnds)
	}{
		{"channel in memory", testChannelInMemory},
		{"silence", testSilence},
		{"broken", testBroken},
		{"dies busy", testDiesBusy},
		{"reset", testReset},
		{"handshake bounded", testHandshakeBounded},
		{"handshake silent", testHandshakeSilent},
		{"load is no silence", testLoadIsNoSilence},
		{"long path D24", testLongPath},
		{"stuck wire", testStuckWire},
		{"keep patience", testKeepPatience},
		{"keep beside", testKeepBeside},
		{"keep beside in vain", testKeepBesideInVain},
		{"keep beside nothing", testKeepBesideNothing},
		{"keep beside dead", testKeepBesideDead},
		{"keep beside nothing open", testKeepBesideNothingOpen},
		{"keep better", testKeepBetter},
		{"keep age", testKeepAge},
		{"channel of lanes", testChannelOfLanes},
		{"lanes", testLanes},
		{"lanes on a short path", testLanesNear},
		{"lanes refused", testLanesRefused},
		{"lane silent", testLaneSilent},
		{"lanes end", testLanesEnd},
		{"lanes kept", testLanesKept},
		{"renew", testRenew},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, ends) })
	}
}

func testChannel(t *testing.T, sites NewSite) {
	channeltest.Run(t, func(t *testing.T, n channel.Network) channel.Channel {
		return reach(t, sites, Beats{}, Way{}, n)
	})
}

func testChannelInMemory(t *testing.T, ends NewEnds) {
	channeltest.Run(t, func(t *testing.T, n channel.Network) channel.Channel {
		a, b := net.Pipe()
		return connect(t, ends, a, b, n)
	})
}

// tcpPipe is a connection over the loopback.
func tcpPipe(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// serve runs the far end and gives what it returned.
func serve(ctx context.Context, conn net.Conn, e Ends, n channel.Network) <-chan error {
	res := make(chan error, 1)
	go func() { res <- e.Serve(ctx, conn, n) }()
	return res
}

// connect makes a channel over a pair of connections.
func connect(t testing.TB, ends NewEnds, a, b net.Conn, n channel.Network) channel.Channel {
	t.Helper()
	e := ends(t, Beats{})
	served := serve(context.Background(), b, e, n)
	ch, err := e.Dial(context.Background(), a)
	if err != nil {
		t.Fatal(err, <-served)
	}
	t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		<-served
	})
	return ch
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
