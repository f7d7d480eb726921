package wgchan

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
	"github.com/culvert-dev/culvert/pkg/relay"
)

func troubled(t *testing.T, beat time.Duration, n channel.Network) *site {
	t.Helper()
	return siteAt(t, wiretest.Beats{Every: beat}, newLane(0, 0, 0), newLane(0, 0, 0), n)
}

// lost has what f says be lost on its way.
func (s *site) lost(f func()) {
	s.way.hushed.Store(true)
	f()
	time.Sleep(50 * time.Millisecond) // it has gone
	s.way.hushed.Store(false)
}

// TestForgottenWire: the far end has dropped the wire, and what it said of that was
// lost; its signs of life go on.
func TestForgottenWire(t *testing.T) {
	s := troubled(t, 200*time.Millisecond, &channel.Host{})
	s.stop()
	far, err := s.port.newServer(s.peer, s.network)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- far.run(ctx, cancel) }()
	ch, err := Dial(t.Context(), s.near)
	if err != nil {
		t.Fatal(err)
	}
	s.lost(func() {
		far.mu.Lock()
		defer far.mu.Unlock()
		relay.Abort(far.wire.control, net.ErrClosed)
	})
	if err := ch.Wait(); err != wiring.ErrHungUp {
		t.Errorf("the wire ended with %v", err)
	}
	cancel(net.ErrClosed)
	<-ran
	s.port.Close()
	s.way.close()
}

// TestLostReset: what came before a reset is read, and then the reset, even if that
// was lost.
func TestLostReset(t *testing.T) {
	s := troubled(t, 100*time.Millisecond, &channel.Host{})
	ch := s.connect()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := ch.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("before "), 100)
	far.Write(sent)
	io.ReadFull(c, make([]byte, 7))
	s.lost(func() { relay.Abort(far, net.ErrClosed) })
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	got, err := io.ReadAll(c)
	if !bytes.Equal(got, sent[7:]) || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d bytes of %d, and then %v", len(got), len(sent)-7, err)
	}
}

// TestMostFlows: one flow too many is refused, and takes nothing from the others.
func TestMostFlows(t *testing.T) {
	s := troubled(t, 100*time.Millisecond, &farTranslate{})
	s.stop()
	s.peer.MaxTCP = 2
	s.serve()
	ch := s.connect()
	first, second := newEchoes(t, ch), newEchoes(t, ch)
	for _, to := range []string{"127.0.0.1", translated} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if _, err := ch.DialContext(ctx, "tcp", to+":1"); err == nil || errors.Is(err, syscall.ECONNREFUSED) == (to == "127.0.0.1") {
			t.Errorf("one more, to %s: %v", to, err)
		}
	}
	first.move(1 << 10)
	second.move(1 << 10)
}

// shortListener runs out of descriptors twice, and then fails for good.
type shortListener struct {
	net.Listener
	errs []error
}

func (l *shortListener) Accept() (net.Conn, error) {
	if len(l.errs) == 0 {
		return l.Listener.Accept()
	}
	err := l.errs[0]
	l.errs = l.errs[1:]
	if err == nil {
		return l.Listener.Accept()
	}
	return nil, &net.OpError{Op: "accept", Net: "tcp", Err: err}
}

type shortNetwork struct{ channel.Host }

func (n *shortNetwork) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := n.Host.Listen(ctx, network, address)
	return &shortListener{l, []error{syscall.EMFILE, syscall.ENFILE, nil, nil, syscall.EACCES}}, err
}

// TestListenerEnds: a listener at the far end outlives what passes, and is told of
// at this end when it fails.
func TestListenerEnds(t *testing.T) {
	ch := troubled(t, 0, &shortNetwork{}).connect()
	l, err := ch.Listen(t.Context(), "tcp", "127.0.0.1:"+quietPort(t))
	if err != nil {
		t.Fatal(err)
	}
	for taken := 0; ; taken++ {
		if taken < 2 {
			if c, err := net.Dial("tcp", l.Addr().String()); err == nil { // it may be reset at once
				defer c.Close()
			}
		}
		in, err := l.Accept()
		if err == nil {
			in.Close()
			continue
		}
		if taken == 0 || !errors.Is(err, syscall.EACCES) {
			t.Errorf("accept after %d: %v, want EACCES", taken, err)
		}
		break
	}
	if l, err = ch.Listen(t.Context(), "tcp", l.Addr().String()); err != nil {
		t.Error(err)
	} else {
		l.Close()
	}
}

// quietPort is one that nobody gets who asks for any.
func quietPort(t *testing.T) string {
	t.Helper()
	for port := 20_000 + os.Getpid()%10_000; port < 32_000; port++ {
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return strconv.Itoa(port)
		}
	}
	t.Fatal("no port is free")
	return ""
}

// TestAwayAWhile: who is away has not become narrower.
func TestAwayAWhile(t *testing.T) {
	s := troubled(t, 100*time.Millisecond, &channel.Host{})
	ch := s.connect()
	until(t, "the MTU is found", func() bool { return ch.MTU() == sizes[len(sizes)-1] })
	s.way.hushed.Store(true)
	time.Sleep(550 * time.Millisecond)
	s.way.hushed.Store(false)
	newEchoes(t, ch).move(1 << 20)
	if got := ch.MTU(); got != sizes[len(sizes)-1] {
		t.Errorf("the MTU is %d", got)
	}
}

// TestPaces: one peer's packets that don't leave are in nobody else's way, and those
// that do are counted as its own.
func TestPaces(t *testing.T) {
	s := newSeam()
	stuck, free := newLeg(s, farAddress, farAddress), newLeg(s, farAddress, farAddress)
	stuck.sent.enter(mostInside)
	read := make(chan int)
	go func() {
		n, _ := s.Read([][]byte{make([]byte, maxPacket)}, []int{0}, 0)
		read <- n
	}()
	began := time.Now()
	free.send(sign{}, 0)
	if n, took := <-read, time.Since(began); n != 1 || took > lostAfter/2 {
		t.Errorf("%d packets after %v", n, took)
	}

	ch := troubled(t, 0, &channel.Host{}).connect()
	newEchoes(t, ch).move(16 << 20)
	until(t, "they have left", func() bool { // but for some that knocked
		p := ch.t.sole.sent
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.n < 2*len(sizes)
	})
}
