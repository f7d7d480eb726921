package memchan

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func receive[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
	return v
}

type met struct {
	c   net.Conn
	err error
}

// meet dials, and gives what the listener accepted and what the dial will return.
func meet(t testing.TB, n *Network, ctx context.Context, network string) (far channel.Pending, near <-chan met) {
	t.Helper()
	l, err := n.Listen(ctx, network, "web:80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	res := make(chan met, 1)
	go func() {
		c, err := n.DialContext(ctx, network, "web:80")
		res <- met{c, err}
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(channel.Pending), res
}

func joined(t testing.TB, network string) (near, far net.Conn) {
	t.Helper()
	p, res := meet(t, &Network{}, context.Background(), network)
	if err := p.Answer(nil); err != nil {
		t.Fatal(err)
	}
	m := <-res
	if m.err != nil {
		t.Fatal(m.err)
	}
	t.Cleanup(func() { m.c.Close(); p.Close() })
	return m.c, p
}

// waits tells that the dial has not returned yet.
func waits(t *testing.T, near <-chan met) {
	t.Helper()
	select {
	case m := <-near:
		t.Fatalf("dialled before the answer: %v", m.err)
	case <-time.After(20 * time.Millisecond):
	}
}

func TestAnswer(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		for name, tc := range map[string]struct {
			do   func(channel.Pending) error
			want error
		}{
			"taken":   {func(p channel.Pending) error { return p.Answer(nil) }, nil},
			"refused": {func(p channel.Pending) error { return p.Answer(syscall.EHOSTUNREACH) }, syscall.EHOSTUNREACH},
			"aborted": {func(p channel.Pending) error { return p.(interface{ Abort(error) error }).Abort(syscall.ETIMEDOUT) }, syscall.ETIMEDOUT},
			"closed":  {func(p channel.Pending) error { return p.Close() }, syscall.ECONNREFUSED},
			"written": {func(p channel.Pending) error { _, err := p.Write([]byte("x")); return err }, nil},
		} {
			t.Run(network+" "+name, func(t *testing.T) {
				p, near := meet(t, &Network{}, t.Context(), network)
				waits(t, near)
				if err := tc.do(p); err != nil {
					t.Error(err)
				}
				m := receive(t, near)
				if !errors.Is(m.err, tc.want) || (m.c == nil) != (tc.want != nil) {
					t.Errorf("dial: %v, want %v", m.err, tc.want)
				}
				if _, err := p.Write(nil); (err == nil) != (tc.want == nil) {
					t.Errorf("write afterwards: %v", err)
				}
			})
		}
	}
}

// TestAnswerTooLate: who dialled has not waited.
func TestAnswerTooLate(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	p, near := meet(t, &Network{}, ctx, "tcp")
	cancel()
	if m := receive(t, near); !errors.Is(m.err, context.Canceled) {
		t.Errorf("dial: %v", m.err)
	}
	if err := p.Answer(nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("answer: %v, want net.ErrClosed", err)
	}
	if _, err := p.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v, want net.ErrClosed", err)
	}
	p.Close()
}

// TestAnswerTwice: an error breaks off what was taken.
func TestAnswerTwice(t *testing.T) {
	near, far := joined(t, "tcp")
	far.(channel.Pending).Answer(syscall.ETIMEDOUT)
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("read: %v, want ETIMEDOUT", err)
	}
	if _, err := near.Write([]byte("x")); !errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("write: %v, want ETIMEDOUT", err)
	}
}

func TestNobodyListens(t *testing.T) {
	var n Network
	refused := func() {
		t.Helper()
		if _, err := n.DialContext(t.Context(), "tcp", "web:80"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want ECONNREFUSED", err)
		}
	}
	refused()
	l, err := n.Listen(t.Context(), "tcp", "web:80")
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { l.Close() })
	refused() // nobody accepts
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v, want net.ErrClosed", err)
	}
	refused()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestTakeOver: the later listener has the address, whatever the earlier one
// does, which has it again when the later one is closed.
func TestTakeOver(t *testing.T) {
	var n Network
	heard := make(chan string, 10)
	listen := func(name string) net.Listener {
		l, err := n.Listen(t.Context(), "tcp", "web:80")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for c, err := l.Accept(); err == nil; c, err = l.Accept() {
				heard <- name
				c.(channel.Pending).Answer(nil)
			}
		}()
		return l
	}
	ask := func(want string) {
		t.Helper()
		c, err := n.DialContext(t.Context(), "tcp", "web:80")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if name := receive(t, heard); name != want {
			t.Errorf("%s answers, want %s", name, want)
		}
	}
	first, second, third := listen("first"), listen("second"), listen("third")
	ask("third")
	second.Close()
	ask("third")
	third.Close()
	ask("first")
	first.Close()
	if _, err := n.DialContext(t.Context(), "tcp", "web:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
}

func TestAddresses(t *testing.T) {
	var n Network
	from := &net.TCPAddr{IP: net.IPv4(10, 244, 0, 7), Port: 4711}
	p, near := meet(t, &n, From(t.Context(), from), "tcp")
	p.Answer(nil)
	m := receive(t, near)
	if p.RemoteAddr() != net.Addr(from) || p.LocalAddr().String() != "web:80" || m.c.RemoteAddr().String() != "web:80" {
		t.Errorf("addresses %v %v %v", p.RemoteAddr(), p.LocalAddr(), m.c.RemoteAddr())
	}
	for _, address := range []string{"web", "web:", "web:0"} {
		if _, err := n.Listen(t.Context(), "tcp", address); err == nil {
			t.Errorf("listen at %q", address)
		}
	}
	var unknown net.UnknownNetworkError
	if _, err := n.Listen(t.Context(), "ping", "web"); !errors.As(err, &unknown) {
		t.Error(err)
	}
	if _, err := n.DialContext(t.Context(), "ping", "web"); !errors.As(err, &unknown) {
		t.Error(err)
	}
}

// TestHalves: a large body each way, the answer after the end of the question.
func TestHalves(t *testing.T) {
	for _, writerTo := range []bool{false, true} {
		near, far := joined(t, "tcp")
		data := make([]byte, 5<<20+7)
		rand.Read(data)
		go func() {
			got := readAll(far, writerTo)
			far.Write(got)
			far.Close()
		}()
		go func() {
			for rest := data; len(rest) > 0; {
				n := min(len(rest), 1+len(rest)/3)
				near.Write(rest[:n])
				rest = rest[n:]
			}
			near.(channel.CloseWriter).CloseWrite()
		}()
		if got := readAll(near, writerTo); sha256.Sum256(got) != sha256.Sum256(data) {
			t.Errorf("%d bytes of %d", len(got), len(data))
		}
		if _, err := near.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write: %v, want EPIPE", err)
		}
	}
}

func readAll(c net.Conn, writerTo bool) []byte {
	var got bytes.Buffer
	if writerTo {
		c.(io.WriterTo).WriteTo(&got)
	} else {
		io.Copy(&got, struct{ io.Reader }{c})
	}
	return got.Bytes()
}

func TestCloseWithData(t *testing.T) {
	near, far := joined(t, "tcp")
	near.Write([]byte("last words"))
	near.Close()
	if b, err := io.ReadAll(far); string(b) != "last words" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := far.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write: %v, want EPIPE", err)
	}
	if _, err := near.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v, want net.ErrClosed", err)
	}
}

func TestAbort(t *testing.T) {
	for reason, want := range map[error]error{
		syscall.ETIMEDOUT: syscall.ETIMEDOUT, net.ErrClosed: syscall.ECONNRESET, nil: syscall.ECONNRESET,
	} {
		near, far := joined(t, "tcp")
		near.Write([]byte("half of it"))
		near.(interface{ Abort(error) error }).Abort(reason)
		if b, err := io.ReadAll(far); !errors.Is(err, want) {
			t.Errorf("%q, %v; want %v", b, err, want)
		}
		if _, err := far.Write([]byte("x")); !errors.Is(err, want) {
			t.Errorf("write: %v, want %v", err, want)
		}
	}
}

func flood(c net.Conn) error {
	for {
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			return err
		}
	}
}

func TestCloseUnblocks(t *testing.T) {
	near, _ := joined(t, "tcp")
	res := make(chan error, 2)
	go func() { res <- flood(near) }()
	go func() {
		_, err := near.Read(make([]byte, 1))
		res <- err
	}()
	time.AfterFunc(50*time.Millisecond, func() { near.Close() })
	for range 2 {
		if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want net.ErrClosed", err)
		}
	}
}

func TestDeadlines(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		near, far := joined(t, network)
		buf := make([]byte, 10)
		for _, d := range []time.Duration{-time.Second, 20 * time.Millisecond} {
			near.SetReadDeadline(time.Now().Add(d))
			if _, err := near.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("read: %v, want a timeout", err)
			}
		}
		near.SetReadDeadline(time.Time{})
		far.Write([]byte("still good"))
		if n, err := near.Read(buf); n != 10 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		near.SetDeadline(time.Now().Add(-time.Second))
		if _, err := near.Write(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %v, want a timeout", err)
		}
	}
	near, _ := joined(t, "tcp")
	near.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	if err := flood(near); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("flood: %v, want a timeout", err)
	}
}

func TestDatagrams(t *testing.T) {
	near, far := joined(t, "udp")
	buf := make([]byte, 1<<16)
	for _, size := range []int{0, 1, 1200, 65507, 3} {
		for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
			way[0].Write(buf[:size])
			if n, err := way[1].Read(buf); err != nil || n != size {
				t.Errorf("%d bytes of %d, %v", n, size, err)
			}
		}
	}
	if _, err := near.Write(make([]byte, 70_000)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("write of 70000 bytes: %v, want EMSGSIZE", err)
	}
	for range 2 * flowQueue { // nobody reads, nobody waits
		if _, err := near.Write(buf[:1]); err != nil {
			t.Fatal(err)
		}
	}
	near.(interface{ Abort(error) error }).Abort(syscall.ECONNREFUSED)
	for range flowQueue {
		if _, err := far.Read(buf); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := far.Read(buf); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("read: %v, want ECONNREFUSED", err)
	}
}

// TestManyAtOnce: blocks that are shared among connections are never mixed up.
func TestManyAtOnce(t *testing.T) {
	var all sync.WaitGroup
	for i := range 50 {
		near, far := joined(t, "tcp")
		want := bytes.Repeat([]byte{byte(i)}, 300_000)
		all.Go(func() {
			for off := 0; off < len(want); {
				n := min(1+off%9000, len(want)-off)
				near.Write(want[off : off+n])
				off += n
			}
			near.Close()
		})
		all.Go(func() {
			if got := readAll(far, i%2 == 0); !bytes.Equal(got, want) {
				t.Errorf("%d bytes differ", len(got))
			}
		})
	}
	all.Wait()
}

// ends are pairs to compare with.
var ends = map[string]func(b *testing.B) (near, far net.Conn){
	"memchan": func(b *testing.B) (near, far net.Conn) { return joined(b, "tcp") },
	"netpipe": func(*testing.B) (near, far net.Conn) { return net.Pipe() },
	"kernel": func(b *testing.B) (near, far net.Conn) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		near, _ = net.Dial("tcp", l.Addr().String())
		far, _ = l.Accept()
		return near, far
	},
}

func BenchmarkStream(b *testing.B) {
	for name, end := range ends {
		for _, size := range []int{256, 32 << 10, 1 << 20} {
			b.Run(name+"/"+map[int]string{256: "256", 32 << 10: "32K", 1 << 20: "1M"}[size], func(b *testing.B) {
				near, far := end(b)
				done := make(chan struct{})
				go func() {
					defer close(done)
					io.Copy(discard{}, far)
				}()
				buf := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					near.Write(buf)
				}
				near.Close()
				<-done
				far.Close()
			})
		}
	}
}

// discard has no ReadFrom.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkRoundTrip(b *testing.B) {
	for name, end := range ends {
		b.Run(name, func(b *testing.B) {
			near, far := end(b)
			go func() {
				buf := make([]byte, 256)
				for {
					n, err := far.Read(buf)
					if err != nil {
						return
					}
					far.Write(buf[:n])
				}
			}()
			buf := make([]byte, 256)
			b.ReportAllocs()
			for b.Loop() {
				near.Write(buf)
				near.Read(buf)
			}
			near.Close()
			far.Close()
		})
	}
}
