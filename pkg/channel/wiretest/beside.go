package wiretest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// held is a connection whose bytes can be held back, as TCP does with what was
// lost until it tries again.
type held struct {
	net.Conn
	*gate
	gone chan struct{}
	once sync.Once
}

func (h *held) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	select {
	case <-h.passes():
		return n, err
	case <-h.gone:
		return 0, net.ErrClosed
	}
}

func (h *held) Close() error {
	h.once.Do(func() { close(h.gone) })
	return h.Conn.Close()
}

// gate is what lets bytes pass, or holds them back.
type gate struct {
	mu   sync.Mutex
	open chan struct{}
}

func newGate() *gate {
	g := &gate{open: make(chan struct{})}
	close(g.open)
	return g
}

func (g *gate) passes() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open = make(chan struct{})
}

func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.open)
}

// road leads from a Keep to a far end in memory, and can be cut.
type road struct {
	ends    Ends
	network memchan.Network
	delay   time.Duration // either way

	mu       sync.Mutex
	cut      bool
	gates    []*gate // of the wires, in order
	attempts int
	served   int // wires that live at the far end
}

func (r *road) open(ctx context.Context) (channel.Channel, error) {
	r.mu.Lock()
	r.attempts++
	if r.cut {
		r.mu.Unlock()
		<-ctx.Done() // the first packet was lost
		return nil, ctx.Err()
	}
	g := newGate()
	r.gates = append(r.gates, g)
	r.served++
	r.mu.Unlock()
	a, b := net.Pipe()
	if r.delay > 0 {
		other, relayed := net.Pipe()
		go lag(relayed, b, r.delay)
		go lag(b, relayed, r.delay)
		b = other
	}
	go func() {
		r.ends.Serve(context.Background(), &held{Conn: b, gate: g, gone: make(chan struct{})}, &r.network)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.served--
	}()
	ch, err := r.ends.Dial(ctx, &held{Conn: a, gate: g, gone: make(chan struct{})})
	if err != nil {
		return nil, err
	}
	return ch, nil
}

// drop holds all wires up and lets no other begin; heal is for those to come.
func (r *road) drop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = true
	for _, g := range r.gates {
		g.shut()
	}
}

func (r *road) heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = false
}

// hush holds one wire up.
func (r *road) hush(wire int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gates[wire].shut()
}

// release lets the first wire be heard again.
func (r *road) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gates[0].release()
}

func (r *road) counts() (wires, served, attempts int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.gates), r.served, r.attempts
}

// onRoad runs a test on a Keep over a road, with an echo at echo:7. There, time
// is what the test makes of it.
func onRoad(t *testing.T, ends NewEnds, test func(t *testing.T, r *road, k *channel.Keep, states <-chan channel.KeepState)) {
	synctest.Test(t, func(t *testing.T) {
		r := &road{}
		r.ends = ends(t, Beats{})
		l, err := r.network.Listen(t.Context(), "tcp", echoAt)
		if err != nil {
			t.Fatal(err)
		}
		go echoAll(l)
		states := make(chan channel.KeepState, 100)
		k := channel.NewKeep(channel.KeepConfig{Open: r.open, Beside: r.open, OnState: func(s channel.KeepState) { states <- s }})
		go k.Run(context.Background())
		if err := k.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-states
		time.Sleep(10*time.Minute + 1700*time.Millisecond) // idle, and no beat just now
		test(t, r, k, states)
		k.Close()
		k.Wait()
		l.Close()
		synctest.Wait()
		if _, served, _ := r.counts(); served != 0 {
			t.Errorf("%d wires are left", served)
		}
	})
}

const echoAt = "echo:7"

func dialEcho(t *testing.T, n channel.Network) net.Conn {
	t.Helper()
	c, err := n.DialContext(t.Context(), "tcp", echoAt)
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, c)
	return c
}

// testKeepBeside: after seven seconds without a network there is another wire as
// soon as there can be. Dials move, listeners too, and what was open goes on when
// the old wire is heard again, which ends with the last of it.
func testKeepBeside(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, k *channel.Keep, states <-chan channel.KeepState) {
		old := dialEcho(t, k)
		l, err := k.Listen(t.Context(), "tcp", "here:80")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go echoAll(l)
		r.drop()
		dialled := make(chan net.Conn, 1)
		go func() { dialled <- dialEcho(t, k) }()
		time.Sleep(7 * time.Second)
		r.heal()
		healed := time.Now()
		(<-dialled).Close()
		if took := time.Since(healed); took > 2500*time.Millisecond {
			t.Errorf("a dial took %v longer than the cut", took)
		}
		if s := <-states; !s.Up || s.Reopened != 1 || s.Err == nil {
			t.Errorf("state %+v", s)
		}
		time.Sleep(time.Second)
		c, err := r.network.DialContext(t.Context(), "tcp", "here:80")
		if err != nil {
			t.Fatal("the listener has not moved:", err)
		}
		exchange(t, c)
		c.Close()
		if took := time.Since(healed); took > 4*time.Second {
			t.Errorf("and over the listener %v", took)
		}

		r.release()
		exchange(t, old)
		if wires, served, _ := r.counts(); wires != 2 || served != 2 {
			t.Errorf("%d wires, %d served", wires, served)
		}
		old.Close()
		time.Sleep(2 * time.Second)
		if _, served, _ := r.counts(); served != 1 {
			t.Errorf("%d served when nothing is open on the old wire", served)
		}
		dialEcho(t, k).Close()
		time.Sleep(10 * time.Minute)
		if wires, _, _ := r.counts(); wires != 2 || len(states) > 0 {
			t.Errorf("%d wires, %d more states", wires, len(states))
		}
	})
}

// testKeepBesideInVain: the old wire is heard again before another is open.
func testKeepBesideInVain(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, k *channel.Keep, states <-chan channel.KeepState) {
		old := dialEcho(t, k)
		r.drop()
		time.Sleep(10 * time.Second)
		r.release()
		began := time.Now()
		exchange(t, old)
		dialEcho(t, k).Close()
		if took := time.Since(began); took > 0 {
			t.Errorf("not heard at once, but after %v", took)
		}
		old.Close()
		time.Sleep(10 * time.Minute)
		wires, _, attempts := r.counts()
		if wires != 1 || attempts < 3 || attempts > 6 || len(states) > 0 {
			t.Errorf("%d wires, %d attempts, %d states", wires, attempts, len(states))
		}
	})
}

// testKeepBesideNothing: the far end went while nothing was heard of it, as it does when
// the laptop sleeps for long. That is not waited out.
func testKeepBesideNothing(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, _ *channel.Keep, _ <-chan channel.KeepState) {
		errGone := fmt.Errorf("%w: it is gone", net.ErrClosed)
		states := make(chan channel.KeepState, 100)
		k := channel.NewKeep(channel.KeepConfig{
			Open: r.open, OnState: func(s channel.KeepState) { states <- s },
			Beside: func(context.Context) (channel.Channel, error) { return nil, errGone },
		})
		go k.Run(context.Background())
		dialEcho(t, k).Close()
		<-states
		r.drop()
		r.heal()
		began := time.Now()
		dialEcho(t, k).Close()
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("another wire after %v", took)
		}
		if s := <-states; s.Up || !errors.Is(s.Err, errGone) {
			t.Errorf("state %+v", s)
		}
		if s := <-states; !s.Up || s.Reopened != 1 || k.State().Silent != 0 {
			t.Errorf("state %+v", s)
		}
		k.Close()
		k.Wait()
	})
}

// testRenew: the far end is about to go, and says so.
func testRenew(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, k *channel.Keep, states <-chan channel.KeepState) {
		old := dialEcho(t, k)
		k.Renew()
		k.Renew()
		if s := <-states; !s.Up || s.Reopened != 1 || s.Err != nil {
			t.Errorf("state %+v", s)
		}
		exchange(t, old)
		dialEcho(t, k).Close()
		old.Close()
		time.Sleep(10 * time.Minute)
		if wires, served, _ := r.counts(); wires != 2 || served != 1 || len(states) > 0 {
			t.Errorf("%d wires, %d served, %d more states", wires, served, len(states))
		}
	})
}

// testKeepAge: there is a new wire before the old one is too old, of which a flow
// does not know.
func testKeepAge(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, _ *channel.Keep, _ <-chan channel.KeepState) {
		k := channel.NewKeep(channel.KeepConfig{Open: r.open, Beside: r.open, Age: time.Hour})
		go k.Run(context.Background())
		c := dialEcho(t, k)
		time.Sleep(150 * time.Minute)
		exchange(t, c)
		if s := k.State(); s.Reopened != 0 || !s.Renewed || s.Err != nil {
			t.Errorf("state %+v", s)
		}
		if _, served, _ := r.counts(); served != 3 { // the other Keep's, that of the flow, and the present one
			t.Errorf("%d served", served)
		}
		c.Close()
		k.Close()
		k.Wait()
	})
}

// testKeepBesideDead: a wire that is not heard again takes what is open with it.
func testKeepBesideDead(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, k *channel.Keep, _ <-chan channel.KeepState) {
		old := dialEcho(t, k)
		r.drop()
		r.heal()
		began := time.Now()
		dialEcho(t, k).Close()
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("a dial took %v", took)
		}
		if _, err := old.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read: %v, want an error", err)
		}
		if took := time.Since(began); took < 9*time.Second || took > 15*time.Second {
			t.Errorf("dead after %v", took)
		}
		old.Close()
		dialEcho(t, k).Close()
	})
}

// testKeepBesideNothingOpen: a silent wire without connections is closed at once.
func testKeepBesideNothingOpen(t *testing.T, ends NewEnds) {
	onRoad(t, ends, func(t *testing.T, r *road, k *channel.Keep, _ <-chan channel.KeepState) {
		r.drop()
		r.heal()
		time.Sleep(5 * time.Second)
		r.release()
		synctest.Wait()
		if wires, served, _ := r.counts(); wires != 2 || served != 1 {
			t.Errorf("%d wires, %d served", wires, served)
		}
	})
}

// testLoadIsNoSilence: as much as possible is sent, over a wire with a buffer
// that takes minutes to get through. It is heard all the time.
func testLoadIsNoSilence(t *testing.T, ends NewEnds) {
	for _, test := range []struct {
		name     string
		up, down bool
	}{{"up", true, false}, {"down", false, true}, {"both", true, true}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var far memchan.Network
				for at, handle := range map[string]func(net.Conn){"sink:9": func(c net.Conn) { io.Copy(io.Discard, c) }, "source:19": pour} {
					l, err := far.Listen(t.Context(), "tcp", at)
					if err != nil {
						t.Fatal(err)
					}
					defer l.Close()
					go func() {
						for c, err := l.Accept(); err == nil; c, err = l.Accept() {
							go handle(c)
						}
					}()
				}
				e := ends(t, Beats{})
				a, b := net.Pipe()
				served := serve(context.Background(), slowDown(b, 20<<10, 1<<20), e, &far)
				ch, err := e.Dial(t.Context(), slowDown(a, 20<<10, 1<<20))
				if err != nil {
					t.Fatal(err)
				}
				for range 3 {
					if test.up {
						c, err := ch.DialContext(t.Context(), "tcp", "sink:9")
						if err != nil {
							t.Fatal(err)
						}
						go pour(c)
					}
					if test.down {
						c, err := ch.DialContext(t.Context(), "tcp", "source:19")
						if err != nil {
							t.Fatal(err)
						}
						go io.Copy(io.Discard, c)
					}
				}
				var worst time.Duration
				for range 10 * 300 {
					time.Sleep(100 * time.Millisecond)
					worst = max(worst, ch.Silence())
				}
				t.Logf("%v of silence at most", worst)
				if worst >= 3*time.Second {
					t.Error("that is taken for silence")
				}
				ch.Close()
				ch.Wait()
				<-served
				time.Sleep(time.Minute) // what is in the buffers
			})
		})
	}
}
