package channeltest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// farNetwork is a Network whose dials a test answers.
type farNetwork struct {
	channel.Host
	dial func(ctx context.Context) error
}

func (f *farNetwork) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	return nil, f.dial(ctx)
}

func testDialCancelled(t *testing.T, open Open) {
	dialing, ended := make(chan struct{}, 2), make(chan struct{}, 2)
	ch := open(t, &farNetwork{dial: func(ctx context.Context) error {
		dialing <- struct{}{}
		<-ctx.Done()
		ended <- struct{}{}
		return ctx.Err()
	}})
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() {
		_, err := ch.DialContext(ctx, "tcp", "192.0.2.1:1")
		res <- err
	}()
	receive(t, dialing)
	cancel()
	if err := receive(t, res); !errors.Is(err, context.Canceled) {
		t.Errorf("dial: %v, want context.Canceled", err)
	}
	if _, err := ch.DialContext(ctx, "tcp", "192.0.2.1:1"); !errors.Is(err, context.Canceled) {
		t.Errorf("dial: %v, want context.Canceled at once", err)
	}
	ch.Close()
	receive(t, ended) // the far dial ends with the wire
}

// testErrorsCross: what the far kernel said is what errors.Is finds here.
func testErrorsCross(t *testing.T, open Open) {
	var fail atomic.Pointer[net.OpError]
	ch := open(t, &farNetwork{dial: func(context.Context) error { return fail.Load() }})
	for _, want := range []error{
		syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT, syscall.EACCES,
	} {
		fail.Store(&net.OpError{Op: "dial", Net: "tcp", Err: want})
		if _, err := ch.DialContext(soon(t), "tcp", "db:1"); !errors.Is(err, want) {
			t.Errorf("dial: %v, want %v", err, want)
		}
	}
}

func testClose(t *testing.T, open Open) {
	ch := open(t, &channel.Host{})
	c := dial(t, ch, "tcp", echoTCP(t))
	u := dial(t, ch, "udp", echoUDP(t))
	l := listen(t, ch, "tcp")
	exchange(t, c, []byte("hello"))
	exchange(t, u, []byte("hello"))

	res := make(chan error, 4)
	for _, blocked := range []func() error{
		func() error { _, err := io.ReadAll(c); return err },
		func() error { _, err := u.Read(make([]byte, 1)); return err },
		func() error { _, err := l.Accept(); return err },
		ch.Wait,
	} {
		go func() { res <- blocked() }()
	}
	ch.Close()
	for range cap(res) {
		if err := receive(t, res); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want net.ErrClosed", err)
		}
	}
	testAfterClose(t, ch, c)
}

func testAfterClose(t *testing.T, ch channel.Channel, c net.Conn) {
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v, want net.ErrClosed", err)
	}
	if _, err := ch.DialContext(soon(t), "tcp", "127.0.0.1:1"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial after Close: %v, want net.ErrClosed", err)
	}
	if _, err := ch.Listen(soon(t), "tcp", "127.0.0.1:0"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listen after Close: %v, want net.ErrClosed", err)
	}
	if err := ch.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// testCloseEndsFar: a server at the far end sees that it was not the whole.
func testCloseEndsFar(t *testing.T, open Open) {
	got := make(chan error, 1)
	ch := open(t, &channel.Host{})
	c := dial(t, ch, "tcp", ServeTCP(t, func(c net.Conn) {
		c.Write([]byte("x"))
		_, err := io.ReadAll(c)
		got <- err
	}))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ch.Close()
	if err := receive(t, got); err == nil {
		t.Error("the far connection ended as if it was whole")
	}
}
