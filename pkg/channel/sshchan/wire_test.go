package sshchan

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// patience is for what must happen.
const patience = 20 * time.Second

func noLeak(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
}

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

// TestSilence: with the default settings, a wire that carries nothing any more
// is dead at both ends within 15 seconds, and one that is merely idle lives.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := pair(t)
		a, b := net.Pipe()
		cut := make(chan struct{})
		served := serve(context.Background(), freeze(b, cut), far, &channel.Host{})
		ch, err := Dial(context.Background(), freeze(a, cut), near)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if err := ch.w.tap.cause(); err != nil {
			t.Fatal("died of idleness:", err)
		}
		close(cut)
		began := time.Now()
		var silent errSilent
		if err := ch.Wait(); !errors.As(err, &silent) {
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

// TestBroken: what was read from a wire that broke is not taken for the whole.
func TestBroken(t *testing.T) {
	noLeak(t)
	a, b := tcpPipe(t)
	ch := connect(t, a, b, &channel.Host{})
	address := serveTCP(t, func(c net.Conn) {
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
		if string(rest) != "lf" || err == nil {
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

// serveTCP is a listener on the loopback, and what it does with connections.
func serveTCP(t *testing.T, handle func(net.Conn)) (address string) {
	t.Helper()
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
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

func echo(c net.Conn) { io.Copy(c, c) }

// TestStrangers: each end talks to exactly the key it was told of.
func TestStrangers(t *testing.T) {
	noLeak(t)
	stranger, _ := pair(t)
	for _, test := range []struct {
		name   string
		change func(near, far *Config)
	}{
		{"client", func(near, _ *Config) { near.Identity.Key = stranger.Identity.Key }},
		{"server", func(_, far *Config) { far.Identity.Key = stranger.Identity.Key }},
		{"client trusts nobody", func(near, _ *Config) { near.Identity.Peer = nil }},
		{"server trusts nobody", func(_, far *Config) { far.Identity.Peer = nil }},
		{"client without a key", func(near, _ *Config) { near.Identity.Key = nil }},
		{"server without a key", func(_, far *Config) { far.Identity.Key = nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			near, far := pair(t)
			test.change(&near, &far)
			a, b := tcpPipe(t)
			served := serve(context.Background(), b, far, &channel.Host{})
			if ch, err := Dial(context.Background(), a, near); err == nil {
				ch.Close()
				t.Error("the near end made a channel")
			}
			if err := receive(t, served); err == nil {
				t.Error("the far end served")
			}
		})
	}
}

// TestHandshakeBounded: on connections without deadlines, towards a peer that
// says nothing.
func TestHandshakeBounded(t *testing.T) {
	noLeak(t)
	near, far := pair(t)
	for _, shake := range []func(context.Context, net.Conn) error{
		func(ctx context.Context, c net.Conn) error { _, err := Dial(ctx, c, near); return err },
		func(ctx context.Context, c net.Conn) error { return Serve(ctx, c, far, &channel.Host{}) },
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

// TestServeEnds: with its context, and with all that ran for it.
func TestServeEnds(t *testing.T) {
	noLeak(t)
	near, far := pair(t)
	a, b := tcpPipe(t)
	ctx, cancel := context.WithCancel(context.Background())
	served := serve(ctx, b, far, &channel.Host{})
	ch, err := Dial(context.Background(), a, near)
	if err != nil {
		t.Fatal(err)
	}
	defer ch.Close()
	if _, err := ch.DialContext(ctx, "tcp", serveTCP(t, echo)); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := receive(t, served); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want net.ErrClosed", err)
	}
	if err := ch.Wait(); !errors.Is(err, errHungUp) {
		t.Errorf("Wait: %v, want %v", err, errHungUp)
	}
}

// TestSigns: both ends see the other live, and the near end measures.
func TestSigns(t *testing.T) {
	noLeak(t)
	near, far := pair(t)
	near.Keepalive, far.Keepalive = 20*time.Millisecond, 20*time.Millisecond
	signs := [2]chan struct{}{make(chan struct{}, 5), make(chan struct{}, 5)}
	for i, cfg := range []*Config{&near, &far} {
		cfg.OnAlive = func() {
			select {
			case signs[i] <- struct{}{}:
			default:
			}
		}
	}
	a, b := tcpPipe(t)
	served := serve(context.Background(), b, far, &channel.Host{})
	ch, err := Dial(context.Background(), a, near)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		receive(t, signs[0])
		receive(t, signs[1])
	}
	if rtt := ch.RTT(); rtt <= 0 || rtt > patience {
		t.Errorf("RTT %v", rtt)
	}
	ch.Close()
	ch.Wait()
	receive(t, served)
}

// TestHandshakeSilent: it is bounded where its context is not.
func TestHandshakeSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, _ := pair(t)
		a, b := net.Pipe()
		defer b.Close()
		go io.Copy(io.Discard, b)
		began := time.Now()
		if _, err := Dial(context.Background(), a, near); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want DeadlineExceeded", err)
		}
		if took := time.Since(began); took != 14*time.Second {
			t.Errorf("gave up after %v", took)
		}
	})
}

// TestKeysStay: no change of keys by amount in the life of a session.
func TestKeysStay(t *testing.T) {
	near, far := pair(t)
	sc, err := far.server()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*ssh.Config{&near.client().Config, &sc.Config} {
		if c.SetDefaults(); c.RekeyThreshold != 1<<40 {
			t.Errorf("new keys after %d bytes", c.RekeyThreshold)
		}
	}
}

func TestCiphers(t *testing.T) {
	if c := ciphers(true); !strings.HasPrefix(c[0], "aes128-gcm") {
		t.Error("with AES:", c)
	}
	if c := ciphers(false); !strings.HasPrefix(c[0], "chacha20") {
		t.Error("without AES:", c)
	}
}
