package wiretest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// slow is a connection that sends no faster than a poor uplink, with as much
// in front of it as its buffer holds.
type slow struct {
	net.Conn
	line chan []byte
	gone chan struct{}
	once sync.Once
}

const slowPiece = 1 << 10

func slowDown(c net.Conn, perSecond, buffer int) *slow {
	s := &slow{Conn: c, line: make(chan []byte, buffer/slowPiece), gone: make(chan struct{})}
	go s.send(perSecond)
	return s
}

func (s *slow) send(perSecond int) {
	for {
		select {
		case b := <-s.line:
			time.Sleep(time.Second * time.Duration(len(b)) / time.Duration(perSecond))
			s.Conn.Write(b)
		case <-s.gone:
			return
		}
	}
}

func (s *slow) Write(p []byte) (n int, err error) {
	for n < len(p) {
		b := append([]byte(nil), p[n:min(n+slowPiece, len(p))]...)
		select {
		case s.line <- b:
			n += len(b)
		case <-s.gone:
			return n, net.ErrClosed
		}
	}
	return n, nil
}

func (s *slow) Close() error {
	s.once.Do(func() { close(s.gone) })
	return s.Conn.Close()
}

// join makes a channel of two configurations.
func join(t *testing.T, e Ends, a, b net.Conn) channel.Channel {
	t.Helper()
	served := serve(context.Background(), b, e, &channel.Host{})
	ch, err := e.Dial(context.Background(), a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		receive(t, served)
		a.Close()
		b.Close()
	})
	return ch
}

func dialTCP(t *testing.T, ch channel.Channel, address string) net.Conn {
	t.Helper()
	c, err := ch.DialContext(within(t), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { relay.Abort(c, net.ErrClosed) })
	return c
}

// pour writes until the connection ends.
func pour(c net.Conn) {
	buf := make([]byte, 256<<10)
	for {
		if _, err := c.Write(buf); err != nil {
			return
		}
	}
}

// hello is answered, and then the far end closes.
func hello(c net.Conn) {
	io.ReadFull(c, make([]byte, 5))
	c.Write([]byte("hello"))
}

// testSlowWire: while as much as possible is sent, in one direction and in both,
// other connections come and go as if the wire was only slow.
func testSlowWire(t *testing.T, sites NewSite) {
	for _, test := range []struct {
		name string
		way  Way
	}{{"up", Way{Up: 50 << 10}}, {"both", Way{Up: 50 << 10, Down: 50 << 10}}} {
		t.Run(test.name, func(t *testing.T) {
			channeltest.NoLeak(t)
			ch := reach(t, sites, Beats{Every: 300 * time.Millisecond}, test.way, &channel.Host{})
			sink := channeltest.ServeTCP(t, func(c net.Conn) { io.Copy(io.Discard, c) })
			source := channeltest.ServeTCP(t, pour)
			var ups []net.Conn
			for range 6 {
				ups = append(ups, dialTCP(t, ch, sink))
				if test.way.Down > 0 {
					down := dialTCP(t, ch, source)
					go io.Copy(io.Discard, down)
				}
			}
			for _, up := range ups {
				go pour(up)
			}
			small(t, ch, 3*time.Second)
		})
	}
}

// testLongPath: CASES 3.D 24. One flow fills a long path: 4 MiB go to and fro in less than
// half the time that they would take by a window of 64 KiB, as SPDY's, one way.
func testLongPath(t *testing.T, ends NewEnds) {
	channeltest.NoLeak(t)
	const there = 40 * time.Millisecond
	ch := reach(t, sites(ends), Beats{}, Way{Delay: there}, &channel.Host{})
	began := time.Now()
	transfer(t, dialTCP(t, ch, channeltest.ServeTCP(t, channeltest.Echo)))
	took, limit := time.Since(began), (4<<20)/(64<<10)*2*there/2
	if t.Logf("%v, where a small window would take %v", took, 2*limit); took > limit {
		t.Error("too slow")
	}
}

// small has small connections, old and new, for a while.
func small(t *testing.T, ch channel.Channel, while time.Duration) {
	t.Helper()
	old := dialTCP(t, ch, channeltest.ServeTCP(t, channeltest.Echo))
	address := channeltest.ServeTCP(t, hello)
	var worst [2]time.Duration
	for end := time.Now().Add(while); time.Now().Before(end); {
		began := time.Now()
		exchange(t, old)
		worst[0] = max(worst[0], time.Since(began))

		began = time.Now()
		c := dialTCP(t, ch, address)
		exchange(t, c)
		if n, err := c.Read(make([]byte, 1)); n > 0 || err != io.EOF {
			t.Fatalf("read %d, %v; want EOF", n, err)
		}
		c.Close()
		worst[1] = max(worst[1], time.Since(began))
	}
	t.Logf("an echo took %v at most, a whole connection %v", worst[0], worst[1])
	if worst[0] > 3*time.Second || worst[1] > 6*time.Second {
		t.Error("too slow")
	}
}

func exchange(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
}

// stuck takes nothing any more once it is cut.
type stuck struct {
	*frozen
	tried chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	select {
	case <-s.cut:
		select {
		case s.tried <- struct{}{}:
		default:
		}
		<-s.gone
		return 0, net.ErrClosed
	default:
		return s.Conn.Write(p)
	}
}

// testStuckWire: closing does not wait for a wire that takes nothing.
func testStuckWire(t *testing.T, ends NewEnds) {
	channeltest.NoLeak(t)
	address := channeltest.ServeTCP(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	e := ends(t, Beats{})
	a, b := tcpPipe(t)
	cut := make(chan struct{})
	tried := make(chan struct{}, 1)
	ch := join(t, e, stuck{freeze(a, cut), tried}, b)
	conns := []net.Conn{dialTCP(t, ch, address), dialTCP(t, ch, address)}
	close(cut)
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() { pour(c) })
	}
	receive(t, tried)
	time.Sleep(50 * time.Millisecond) // what there is room for is queued behind that
	began := time.Now()
	conns[0].Close()
	relay.Abort(conns[1], syscall.ECONNRESET)
	wg.Wait()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("closed after %v", took)
	}
}

// testFullWindows: flows that nobody reads do not hold up others.
func testFullWindows(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	ch := reach(t, sites, Beats{}, Way{}, &channel.Host{})
	hold := make(chan struct{})
	deaf := channeltest.ServeTCP(t, func(net.Conn) { <-hold })
	t.Cleanup(func() { close(hold) })
	for range 2 * wiring.Pieces {
		c := dialTCP(t, ch, deaf)
		go pour(c)
	}
	c := dialTCP(t, ch, channeltest.ServeTCP(t, channeltest.Echo))
	transfer(t, c)
}

// testSignsInUpload: data that comes is a sign of life, while requests are far
// behind in it; and so are those signs that the other end gives meanwhile.
func testSignsInUpload(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	const every = 200 * time.Millisecond
	var gaps [2]gap
	ch := reach(t, sites, Beats{every, gaps[0].sign, gaps[1].sign}, Way{Up: 400 << 10, Buffer: 512 << 10}, &channel.Host{})
	c := dialTCP(t, ch, channeltest.ServeTCP(t, func(c net.Conn) { io.Copy(io.Discard, c) }))
	c.SetWriteDeadline(time.Now().Add(1500 * time.Millisecond))
	pour(c)
	for i, end := range []string{"near", "far"} {
		if worst := gaps[i].longest(); worst > 3*every {
			t.Errorf("the %s end saw no sign of life for %v", end, worst)
		}
	}
}

// gap measures the longest time between two signs.
type gap struct {
	mu    sync.Mutex
	last  time.Time
	worst time.Duration
	begun bool
}

func (g *gap) sign() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.begun {
		g.worst = max(g.worst, time.Since(g.last))
	}
	g.last, g.begun = time.Now(), true
}

func (g *gap) longest() time.Duration {
	g.sign()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.worst
}

// testWriteLate: a write that the wire has no room for ends at its deadline.
func testWriteLate(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	ch := reach(t, sites, Beats{}, Way{Up: 50 << 10}, &channel.Host{})
	address := channeltest.ServeTCP(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	c := dialTCP(t, ch, address)
	for range 4 {
		other := dialTCP(t, ch, address)
		go pour(other)
	}
	c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for {
		if _, err := c.Write(make([]byte, 64<<10)); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// testReset: a reset of the wire is none of the connections over it.
func testReset(t *testing.T, ends NewEnds) {
	channeltest.NoLeak(t)
	a, b := tcpPipe(t)
	e := ends(t, Beats{})
	ch := join(t, e, a, b)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	flows := map[string]net.Conn{"tcp": dialTCP(t, ch, channeltest.ServeTCP(t, channeltest.Echo))}
	for network, address := range map[string]string{"udp": udp.LocalAddr().String(), "ping": "127.0.0.1"} {
		if flows[network], err = ch.DialContext(within(t), network, address); err != nil {
			t.Fatal(err)
		}
		defer flows[network].Close()
	}
	b.(*net.TCPConn).SetLinger(0)
	b.Close()
	if err := ch.Wait(); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("Wait: %v, want ECONNRESET", err)
	}
	for network, c := range flows {
		_, rerr := c.Read(make([]byte, 1))
		_, werr := c.Write([]byte("x"))
		_, derr := ch.DialContext(within(t), network, c.RemoteAddr().String())
		for op, err := range map[string]error{"read": rerr, "write": werr, "dial": derr} {
			if !errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || err == io.EOF {
				t.Errorf("%s %s: %v, want net.ErrClosed", op, network, err)
			}
		}
	}
}
