package channeltest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// callers dial, at the far end, what is listened at through a Channel.
type callers struct {
	t  *testing.T
	l  net.Listener
	at *memchan.Network
}

func newCallers(t *testing.T, open Open) (*callers, channel.Channel) {
	t.Helper()
	at := &memchan.Network{}
	ch := open(t, at)
	l, err := ch.Listen(soon(t), "tcp", "web:80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &callers{t, l, at}, ch
}

type dialled struct {
	net.Conn
	err error
}

// call dials, and gives what was accepted and what the dial will return.
func (c *callers) call() (near channel.Pending, far <-chan dialled) {
	c.t.Helper()
	res := make(chan dialled, 1)
	go func() {
		conn, err := c.at.DialContext(soon(c.t), "tcp", "web:80")
		res <- dialled{conn, err}
	}()
	a, err := c.l.Accept()
	if err != nil {
		c.t.Fatal(err)
	}
	near, ok := a.(channel.Pending)
	if !ok {
		c.t.Fatalf("%T is not pending", a)
	}
	return near, res
}

// answered has call's dial succeed.
func answered(t *testing.T, far <-chan dialled) net.Conn {
	t.Helper()
	d := receive(t, far)
	if d.err != nil {
		t.Fatal("far dial:", d.err)
	}
	t.Cleanup(func() { d.Close() })
	return d.Conn
}

// testPendingTaken: the far dial waits for the answer, or for what implies it.
func testPendingTaken(t *testing.T, open Open) {
	c, _ := newCallers(t, open)
	for _, take := range []func(channel.Pending) error{
		func(p channel.Pending) error { return p.Answer(nil) },
		func(p channel.Pending) error { _, err := p.Write([]byte("hello")); return err },
		func(p channel.Pending) error { return p.(channel.CloseWriter).CloseWrite() },
		func(p channel.Pending) error { return p.SetDeadline(time.Now().Add(patience)) },
	} {
		near, far := c.call()
		select {
		case d := <-far:
			t.Fatalf("dialled before the answer, %v", d.err)
		case <-time.After(20 * time.Millisecond):
		}
		if err := take(near); err != nil {
			t.Error(err)
		}
		caller := answered(t, far)
		testStream(t, near, caller)
	}
}

// testStream: what was answered is a connection like any other.
func testStream(t *testing.T, near, caller net.Conn) {
	t.Helper()
	data := random(1 << 20)
	go func() {
		caller.Write(data)
		caller.(channel.CloseWriter).CloseWrite()
	}()
	if got, err := io.ReadAll(near); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	near.Close()
	if _, err := io.ReadAll(caller); err != nil {
		t.Errorf("read after Close: %v", err)
	}
}

// testPendingRefused: the far dial fails as the answer says, and at once.
func testPendingRefused(t *testing.T, open Open) {
	c, _ := newCallers(t, open)
	for _, want := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ETIMEDOUT, syscall.EACCES} {
		near, far := c.call()
		if err := near.Answer(&net.OpError{Op: "dial", Net: "tcp", Err: want}); err != nil {
			t.Error(err)
		}
		if d := receive(t, far); !errors.Is(d.err, want) {
			t.Errorf("dial: %v, want %v", d.err, want)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read: %v, want net.ErrClosed", err)
		}
	}
}

// testPendingClosed: what is closed unanswered, or never accepted, is refused.
func testPendingClosed(t *testing.T, open Open) {
	c, _ := newCallers(t, open)
	near, far := c.call()
	near.Close()
	if d := receive(t, far); !errors.Is(d.err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", d.err)
	}
	near, far = c.call()
	c.l.Close()
	if err := near.Answer(nil); err != nil {
		t.Error("a connection that was accepted lives on:", err)
	}
	testStream(t, near, answered(t, far))
}

// testPendingWire: the far dial ends with the wire.
func testPendingWire(t *testing.T, open Open) {
	c, ch := newCallers(t, open)
	near, far := c.call()
	ch.Close()
	if d := receive(t, far); d.err == nil {
		t.Error("dialled over a wire that is gone")
	}
	near.Close()
	if err := near.Answer(nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("answer: %v, want net.ErrClosed", err)
	}
}
