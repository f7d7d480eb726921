package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// tcpPipe is a connection over the loopback.
func tcpPipe(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		d.Close()
	})
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// plain hides what makes a TCP connection special.
type plain struct{ net.Conn }

func (p plain) CloseWrite() error     { return p.Conn.(*net.TCPConn).CloseWrite() }
func (p plain) SetLinger(s int) error { return p.Conn.(*net.TCPConn).SetLinger(s) }

type result struct {
	ab, ba int64
	err    error
}

// joined is a client and a server with a relay between them, through the kernel
// or not.
func joined(t testing.TB, kernel bool) (client, server *net.TCPConn, res <-chan result) {
	client, a := tcpPipe(t)
	b, server := tcpPipe(t)
	done := make(chan result, 1)
	go func() {
		var r result
		if kernel {
			r.ab, r.ba, r.err = Join(a, b)
		} else {
			r.ab, r.ba, r.err = Join(plain{a}, plain{b})
		}
		done <- r
	}()
	return client, server, done
}

func both(t *testing.T, run func(*testing.T, bool)) {
	t.Run("kernel", func(t *testing.T) { run(t, true) })
	t.Run("buffers", func(t *testing.T) { run(t, false) })
}

func receive[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
	return v
}

// TestD25HalfClose: the server answers 10 MiB after it has read the client's FIN.
func TestD25HalfClose(t *testing.T) {
	both(t, func(t *testing.T, kernel bool) {
		client, server, res := joined(t, kernel)
		answer := bytes.Repeat([]byte("0123456789"), 1<<20)
		go func() {
			io.Copy(io.Discard, server)
			server.Write(answer)
			server.Close()
		}()
		client.Write([]byte("question"))
		client.CloseWrite()
		got, err := io.ReadAll(client)
		if err != nil || !bytes.Equal(got, answer) {
			t.Errorf("read %d bytes of %d, %v", len(got), len(answer), err)
		}
		client.Close()
		if r := receive(t, res); r != (result{8, int64(len(answer)), nil}) {
			t.Errorf("%+v", r)
		}
	})
}

// TestReset: a reset comes out as a reset, on either side.
func TestReset(t *testing.T) {
	both(t, func(t *testing.T, kernel bool) {
		for _, swap := range []bool{false, true} {
			one, other, res := joined(t, kernel)
			if swap {
				one, other = other, one
			}
			one.Write([]byte("x"))
			io.ReadFull(other, make([]byte, 1))
			one.SetLinger(0)
			one.Close()
			if _, err := io.ReadAll(other); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read: %v, want ECONNRESET", err)
			}
			if r := receive(t, res); !errors.Is(r.err, syscall.ECONNRESET) {
				t.Errorf("%+v", r)
			}
		}
	})
}

// TestCopyGrows: small and large reads, in all orders, lose nothing.
func TestCopyGrows(t *testing.T) {
	var want bytes.Buffer
	r, w := io.Pipe()
	go func() {
		for i := range 200 {
			b := bytes.Repeat([]byte{byte(i)}, []int{1, smallBuffer, 100, largeBuffer + 1}[i/20%4])
			want.Write(b)
			w.Write(b)
		}
		w.Close()
	}()
	var got bytes.Buffer
	n, err := Copy(&got, r)
	if err != nil || n != int64(want.Len()) || !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes of %d, %v", n, want.Len(), err)
	}
}

// udpPair is two connected sockets.
func udpPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc.Close()
	b, err = net.ListenUDP("udp", pc.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	a, err = net.Dial("udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	b, err = net.DialUDP("udp", pc.LocalAddr().(*net.UDPAddr), a.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

func TestDatagrams(t *testing.T) {
	client, a := udpPair(t)
	b, server := udpPair(t)
	res := make(chan result, 1)
	const idle = 100 * time.Millisecond
	go func() {
		var r result
		r.ab, r.ba, r.err = Datagrams(a, b, idle)
		res <- r
	}()
	buf := make([]byte, 1<<16)
	for _, size := range []int{0, 1, 1200, 65507, 3} {
		for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
			way[0].Write(buf[:size])
			way[1].SetReadDeadline(time.Now().Add(patience))
			if n, err := way[1].Read(buf); err != nil || n != size {
				t.Errorf("%d bytes of %d, %v", n, size, err)
			}
		}
	}
	last := time.Now()
	r := receive(t, res)
	if r != (result{5, 5, nil}) {
		t.Errorf("%+v", r)
	}
	if silent := time.Since(last); silent < idle/2 {
		t.Errorf("ended after %v", silent)
	}
}

// TestDatagramsIdle: traffic of one way keeps both alive.
func TestDatagramsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, a := net.Pipe()
		b, server := net.Pipe()
		res := make(chan error, 1)
		go func() {
			_, _, err := Datagrams(a, b, time.Minute)
			res <- err
		}()
		go io.Copy(io.Discard, server)
		for range 10 {
			time.Sleep(50 * time.Second)
			client.Write([]byte("alive"))
		}
		began := time.Now()
		if err := <-res; err != nil {
			t.Error(err)
		}
		if silent := time.Since(began); silent != time.Minute {
			t.Errorf("ended after %v", silent)
		}
	})
}

// TestDatagramsRefused: what the far kernel says reaches the near side.
func TestDatagramsRefused(t *testing.T) {
	client, a := net.Pipe()
	defer client.Close()
	b, server := udpPair(t)
	server.Close()
	said := &abortable{Conn: a}
	go client.Write([]byte("anybody?"))
	_, _, err := Datagrams(said, b, patience)
	if !errors.Is(err, syscall.ECONNREFUSED) || !errors.Is(said.reason, syscall.ECONNREFUSED) {
		t.Errorf("%v, aborted with %v; want ECONNREFUSED", err, said.reason)
	}
}

// TestDatagramTooLarge: what the kernel does not take is lost, and the flow goes on.
func TestDatagramTooLarge(t *testing.T) {
	client, a := net.Pipe()
	b, server := udpPair(t)
	res := make(chan result, 1)
	go func() {
		var r result
		r.ab, r.ba, r.err = Datagrams(a, b, patience)
		res <- r
	}()
	client.Write(make([]byte, 65535)) // EMSGSIZE
	client.Write([]byte("small"))
	server.SetReadDeadline(time.Now().Add(patience))
	if n, err := server.Read(make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	client.Close()
	if r := receive(t, res); r != (result{1, 0, nil}) {
		t.Errorf("%+v", r)
	}
}

// full is a listener that has no file to spare at first.
type full struct {
	net.Listener
	times int
}

func (f *full) Accept() (net.Conn, error) {
	if f.times--; f.times >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return f.Listener.Accept()
}

// TestForwardFull: a shortage does not end it.
func TestForwardFull(t *testing.T) {
	front := listen(t)
	dialed := make(dials, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	res := make(chan error, 1)
	go func() { res <- Forward(ctx, &full{front, 2}, dialed, "tcp", "") }()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	receive(t, dialed)
	cancel()
	if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want net.ErrClosed", err)
	}
}

// dials counts.
type dials chan struct{}

func (d dials) DialContext(context.Context, string, string) (net.Conn, error) {
	d <- struct{}{}
	return nil, syscall.ECONNREFUSED
}

// abortable can be told a reason.
type abortable struct {
	net.Conn
	reason error
}

func (a *abortable) Abort(reason error) error {
	a.reason = reason
	return a.Close()
}

func TestForward(t *testing.T) {
	echo := listen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	front := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() { res <- Forward(ctx, front, &net.Dialer{}, "tcp", echo.Addr().String()) }()

	var conns []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", front.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte("hello"))
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	cancel()
	if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want net.ErrClosed", err)
	}
	for _, c := range conns {
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want ECONNRESET", err)
		}
	}
	echo.Close()
	wg.Wait()
}

// TestForwardRefused: who connects sees that nobody is there.
func TestForwardRefused(t *testing.T) {
	closed := listen(t)
	closed.Close()
	front := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() { res <- Forward(ctx, front, &net.Dialer{}, "tcp", closed.Addr().String()) }()
	c, err := net.Dial("tcp", front.Addr().String())
	if err == nil { // the reset may come even before
		_, err = io.ReadAll(c)
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want ECONNRESET", err)
	}
	cancel()
	receive(t, res)
}

// TestForwardPending: who waits for an answer hears what the dial met.
func TestForwardPending(t *testing.T) {
	var n memchan.Network
	l, err := n.Listen(t.Context(), "tcp", "web:80")
	if err != nil {
		t.Fatal(err)
	}
	target := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() { res <- Forward(ctx, l, &net.Dialer{}, "tcp", target.Addr().String()) }()
	c, err := n.DialContext(t.Context(), "tcp", "web:80")
	if err != nil {
		t.Fatal(err)
	}
	target.Close()
	if _, err := n.DialContext(t.Context(), "tcp", "web:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
	cancel()
	receive(t, res)
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want ECONNRESET", err)
	}
	c.Close()
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func BenchmarkJoin(b *testing.B) {
	for _, kernel := range []bool{true, false} {
		b.Run(map[bool]string{true: "kernel", false: "buffers"}[kernel], func(b *testing.B) {
			client, server, res := joined(b, kernel)
			go func() {
				io.Copy(io.Discard, server)
				server.Close()
			}()
			buf := make([]byte, 1<<20)
			b.SetBytes(1 << 20)
			for b.Loop() {
				client.Write(buf)
			}
			client.CloseWrite()
			<-res
		})
	}
}
