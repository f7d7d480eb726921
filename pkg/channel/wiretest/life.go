package wiretest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// patience is for what must happen.
const patience = 20 * time.Second

// receive waits for what must come.
func receive[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
	return v
}

// frozen is a connection that can stop to carry anything, as a cut cable does.
type frozen struct {
	net.Conn
	cut  chan struct{}
	gone chan struct{}
	once sync.Once
}

func freeze(c net.Conn, cut chan struct{}) *frozen {
	return &frozen{Conn: c, cut: cut, gone: make(chan struct{})}
}

func (f *frozen) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	select {
	case <-f.cut:
		<-f.gone
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (f *frozen) Write(p []byte) (int, error) {
	select {
	case <-f.cut:
		return len(p), nil
	default:
		return f.Conn.Write(p)
	}
}

func (f *frozen) Close() error {
	f.once.Do(func() { close(f.gone) })
	return f.Conn.Close() // which the other end does not get to see
}

// testSilence: with the default settings, a wire that carries nothing any more
// is dead at both ends within 15 seconds, and one that is merely idle lives.
func testSilence(t *testing.T, ends NewEnds) {
	synctest.Test(t, func(t *testing.T) {
		e := ends(t, Beats{})
		a, b := net.Pipe()
		cut := make(chan struct{})
		served := serve(context.Background(), freeze(b, cut), e, &channel.Host{})
		ch, err := e.Dial(context.Background(), freeze(a, cut))
		if err != nil {
			t.Fatal(err)
		}
		died := make(chan error, 1)
		go func() { died <- ch.Wait() }()
		time.Sleep(time.Hour)
		if len(died) > 0 {
			t.Fatal("died of idleness:", <-died)
		}
		close(cut)
		began := time.Now()
		var silent wiring.ErrSilent
		if err := <-died; !errors.As(err, &silent) {
			t.Errorf("near end: %v, want silence", err)
		}
		if err := <-served; !errors.As(err, &silent) {
			t.Errorf("far end: %v, want silence", err)
		}
		if took := time.Since(began); took < 9*time.Second || took > 15*time.Second {
			t.Errorf("dead after %v", took)
		}
		a.Close()
		b.Close()
		synctest.Wait()
	})
}

// testBroken: what was read from a wire that broke is not taken for the whole.
func testBroken(t *testing.T, ends NewEnds) {
	channeltest.NoLeak(t)
	a, b := tcpPipe(t)
	ch := connect(t, ends, a, b, &channel.Host{})
	want := ""
	if ends(t, Beats{}).Rest {
		want = "lf"
	}
	address := channeltest.ServeTCP(t, func(c net.Conn) {
		c.Write([]byte("half"))
		io.Copy(io.Discard, c)
	})
	var conns []net.Conn
	for range 3 {
		c, err := ch.DialContext(context.Background(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	b.Close()
	if err := ch.Wait(); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("Wait: %v, want the wire's own error", err)
	}
	for _, c := range conns {
		rest, err := io.ReadAll(c)
		if string(rest) != want || err == nil {
			t.Errorf("read %q, %v; want the rest, and an error", rest, err)
		}
		if _, err := c.Write([]byte("x")); err == nil {
			t.Error("write on a broken wire succeeded")
		}
	}
	if _, err := ch.DialContext(context.Background(), "tcp", address); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v, want net.ErrClosed", err)
	}
}

// testDiesBusy: whatever goes on when a wire breaks ends with it, at both ends.
func testDiesBusy(t *testing.T, ends NewEnds) {
	channeltest.NoLeak(t)
	far := &memchan.Network{}
	serve := func(name string, handle func(net.Conn)) {
		l, err := far.Listen(t.Context(), "tcp", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go serveAll(l, handle)
	}
	serve("echo:7", channeltest.Echo)
	serve("source:19", pour)
	serve("deaf:9", func(c net.Conn) {
		c.(channel.Pending).Answer(nil)
		<-t.Context().Done()
	})
	s := sites(ends)(t, Beats{}, Way{}, neverThere{far})
	defer s.End()
	for round := range 5 {
		ch, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		busy := makeBusy(t, ch, far)
		time.Sleep(time.Duration(round) * 20 * time.Millisecond) // each is somewhere else then
		s.Cut()
		if err := ch.Wait(); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("Wait: %v, want the wire's own error", err)
		}
		for range cap(busy) {
			if err := receive(t, busy); err == nil {
				t.Error("something went on")
			}
		}
	}
}

// makeBusy begins what lasts as long as the wire, and then says how it ended.
func makeBusy(t *testing.T, ch channel.Channel, far channel.Network) <-chan error {
	t.Helper()
	listen, err := ch.Listen(t.Context(), "tcp", "here:80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listen.Close() })
	silent, unread, full := dialTCP(t, ch, echoAt), dialTCP(t, ch, "source:19"), dialTCP(t, ch, "deaf:9")
	work := []func() error{
		func() error { _, err := silent.Read(make([]byte, 1)); return err },
		func() error { _, err := full.Write(make([]byte, 64<<20)); return err },
		func() error { _, err := io.Copy(io.Discard, unread); return err },
		func() error { _, err := ch.DialContext(t.Context(), "tcp", "never:1"); return err },
		func() error { _, err := ch.Listen(t.Context(), "tcp", "never:1"); return err },
		func() error { _, err := far.DialContext(t.Context(), "tcp", "here:80"); return err },
		func() error {
			_, err := listen.Accept() // and never answers
			if err == nil {
				_, err = listen.Accept()
			}
			return err
		},
	}
	busy := make(chan error, len(work))
	for _, do := range work {
		go func() { busy <- do() }()
	}
	return busy
}

// neverThere has an address that never answers.
type neverThere struct{ channel.Network }

func (n neverThere) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if address == "never:1" {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return n.Network.DialContext(ctx, network, address)
}

func (n neverThere) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	if address == "never:1" {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return n.Network.Listen(ctx, network, address)
}

// testHandshakeBounded: on connections without deadlines, towards a peer that
// says nothing.
func testHandshakeBounded(t *testing.T, ends NewEnds) {
	channeltest.NoLeak(t)
	e := ends(t, Beats{})
	for _, shake := range []func(context.Context, net.Conn) error{
		func(ctx context.Context, c net.Conn) error { _, err := e.Dial(ctx, c); return err },
		func(ctx context.Context, c net.Conn) error { return e.Serve(ctx, c, &channel.Host{}) },
	} {
		a, b := net.Pipe()
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if err := shake(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want DeadlineExceeded", err)
		}
		cancel()
		b.Close()
	}
}

// testHushed: a wire that carries nothing any more is dead at both ends after seven
// beats, and what was read from it is not taken for the whole.
func testHushed(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	const every = 100 * time.Millisecond
	s := sites(t, Beats{Every: every}, Way{}, &channel.Host{})
	ch, err := s.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.End()
	defer ch.Close()
	ended := make(chan struct{})
	c := dialTCP(t, ch, channeltest.ServeTCP(t, func(c net.Conn) {
		defer close(ended)
		c.Write([]byte("half"))
		io.Copy(io.Discard, c)
	}))
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * every) // idle
	s.Hush()
	began := time.Now()
	var silent wiring.ErrSilent
	if err := ch.Wait(); !errors.As(err, &silent) {
		t.Errorf("near end: %v, want silence", err)
	}
	receive(t, ended)
	if took := time.Since(began); took < 4*every || took > 20*every {
		t.Errorf("dead after %v", took)
	}
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || err == io.EOF {
		t.Errorf("read %d, %v; want an error", n, err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("write on a dead wire succeeded")
	}
	if _, err := ch.DialContext(within(t), "tcp", "127.0.0.1:1"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v, want net.ErrClosed", err)
	}
}

// testServeEnds: with its context, and with all that ran for it.
func testServeEnds(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	s := sites(t, Beats{}, Way{}, &channel.Host{})
	ch, err := s.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer ch.Close()
	if _, err := ch.DialContext(within(t), "tcp", channeltest.ServeTCP(t, channeltest.Echo)); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.Listen(within(t), "tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	if err := s.End(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want net.ErrClosed", err)
	}
	if err := ch.Wait(); !errors.Is(err, wiring.ErrHungUp) {
		t.Errorf("Wait: %v, want %v", err, wiring.ErrHungUp)
	}
}

// testSigns: both ends see the other live, and the near end measures.
func testSigns(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	signs := [2]chan struct{}{make(chan struct{}, 5), make(chan struct{}, 5)}
	sign := func(to chan struct{}) func() {
		return func() {
			select {
			case to <- struct{}{}:
			default:
			}
		}
	}
	b := Beats{20 * time.Millisecond, sign(signs[0]), sign(signs[1])}
	ch := reach(t, sites, b, Way{}, &channel.Host{})
	for range 20 {
		receive(t, signs[0])
		receive(t, signs[1])
	}
	if rtt := ch.(interface{ RTT() time.Duration }).RTT(); rtt <= 0 || rtt > patience {
		t.Errorf("RTT %v", rtt)
	}
}

// testHandshakeSilent: it is bounded where its context is not.
func testHandshakeSilent(t *testing.T, ends NewEnds) {
	synctest.Test(t, func(t *testing.T) {
		e := ends(t, Beats{})
		a, b := net.Pipe()
		defer b.Close()
		go io.Copy(io.Discard, b)
		began := time.Now()
		if _, err := e.Dial(context.Background(), a); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want DeadlineExceeded", err)
		}
		if took := time.Since(began); took != 14*time.Second {
			t.Errorf("gave up after %v", took)
		}
	})
}
