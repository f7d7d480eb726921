package wiretest

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

const mostLanes = 8

// testChannelOfLanes: several wires are a Channel like any other.
func testChannelOfLanes(t *testing.T, ends NewEnds) {
	channeltest.Run(t, func(t *testing.T, n channel.Network) channel.Channel {
		s := sites(ends)(t, Beats{}, Way{Delay: 5 * time.Millisecond}, withEcho{n})
		opened := make(chan struct{}, mostLanes)
		ch := spread(t, func(ctx context.Context) (channel.Channel, error) {
			ch, err := s.Open(ctx)
			if err == nil {
				opened <- struct{}{}
			}
			return ch, err
		})
		t.Cleanup(func() {
			ch.Close()
			ch.Wait()
			s.End()
		})
		for len(opened) < mostLanes {
			dialEcho(t, ch)
		}
		return ch
	})
}

// withEcho is a Network that has an echo, too.
type withEcho struct{ channel.Network }

func (w withEcho) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if address != echoAt {
		return w.Network.DialContext(ctx, network, address)
	}
	a, b := net.Pipe()
	go func() {
		defer b.Close()
		io.Copy(b, b)
	}()
	return a, nil
}

// spread opens a wire, and has it open others.
func spread(t *testing.T, open func(context.Context) (channel.Channel, error)) channel.Lane {
	t.Helper()
	another := func(ctx context.Context) (channel.Lane, error) {
		ch, err := open(ctx)
		if err != nil {
			return nil, err
		}
		return ch.(channel.Lane), nil
	}
	first, err := another(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return channel.Spread(first, another)
}

// onLanes runs a test on lanes over a road, as onRoad does.
func onLanes(t *testing.T, ends NewEnds, delay time.Duration, test func(*testing.T, *road, channel.Lane)) {
	synctest.Test(t, func(t *testing.T) {
		r := &road{delay: delay}
		r.ends = ends(t, Beats{})
		l, err := r.network.Listen(t.Context(), "tcp", echoAt)
		if err != nil {
			t.Fatal(err)
		}
		go echoAll(l)
		ch := spread(t, r.open)
		time.Sleep(10*time.Minute + 1700*time.Millisecond)
		test(t, r, ch)
		ch.Close()
		ch.Wait()
		l.Close()
		time.Sleep(time.Minute) // the far end hears of it later
		if _, served, _ := r.counts(); served != 0 {
			t.Errorf("%d wires are left", served)
		}
	})
}

// dialMany gives each flow the time that a lane takes to open.
func dialMany(t *testing.T, ch channel.Network, n int) (flows []net.Conn) {
	t.Helper()
	for range n {
		flows = append(flows, dialEcho(t, ch))
		time.Sleep(500 * time.Millisecond)
	}
	return flows
}

func closeFlows(flows []net.Conn) {
	for _, c := range flows {
		c.Close()
	}
}

// broken are those of flows that have ended, and not by themselves.
func broken(t *testing.T, flows []net.Conn) (n int) {
	t.Helper()
	for _, c := range flows {
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		switch _, err := c.Read(make([]byte, 1)); {
		case errors.Is(err, net.ErrClosed):
			n++
		case err == nil || err == io.EOF:
			t.Error("a flow ended as if it was whole")
		default:
			exchange(t, c)
		}
	}
	return n
}

// testLanes: there are as many as flows, up to a bound, and each has its share; those
// that are of no use go, and come again.
func testLanes(t *testing.T, ends NewEnds) {
	onLanes(t, ends, 10*time.Millisecond, func(t *testing.T, r *road, ch channel.Lane) {
		for range 100 { // one after the other
			dialEcho(t, ch).Close()
			time.Sleep(100 * time.Millisecond)
		}
		if wires, _, _ := r.counts(); wires != 1 {
			t.Errorf("%d wires for a flow at a time", wires)
		}
		for range 2 {
			flows := dialMany(t, ch, 3*mostLanes)
			if _, served, _ := r.counts(); served != mostLanes || ch.Flows() != len(flows) {
				t.Errorf("%d wires for %d flows, and %d", served, len(flows), ch.Flows())
			}
			time.Sleep(10 * time.Minute) // held, and used again
			if n := broken(t, flows); n != 0 {
				t.Errorf("%d flows are broken", n)
			}
			closeFlows(flows)
			time.Sleep(3 * time.Minute)
			if _, served, _ := r.counts(); served != 1 {
				t.Errorf("%d wires for no flows", served)
			}
		}
		if wires, _, _ := r.counts(); wires != 2*mostLanes-1 {
			t.Errorf("%d wires in all", wires)
		}
	})
}

// testLanesNear: where the path is short, one wire carries all.
func testLanesNear(t *testing.T, ends NewEnds) {
	onLanes(t, ends, time.Millisecond, func(t *testing.T, r *road, ch channel.Lane) {
		flows := dialMany(t, ch, 3*mostLanes)
		if wires, _, _ := r.counts(); wires != 1 {
			t.Errorf("%d wires", wires)
		}
		closeFlows(flows)
	})
}

// testLanesRefused: where there is only to be one wire, it carries all, and others
// are asked for later and later.
func testLanesRefused(t *testing.T, ends NewEnds) {
	onLanes(t, ends, 10*time.Millisecond, func(t *testing.T, r *road, ch channel.Lane) {
		r.drop()
		r.release()
		for range 3 {
			closeFlows(dialMany(t, ch, 20*60))
		}
		if wires, _, attempts := r.counts(); wires != 1 || attempts < 20 || attempts > 100 {
			t.Errorf("%d wires, %d attempts in half an hour", wires, attempts)
		}
	})
}

// testLaneSilent: a lane that is not heard is given nothing, takes what it has along
// when it is dead, and another comes in its place.
func testLaneSilent(t *testing.T, ends NewEnds) {
	onLanes(t, ends, 10*time.Millisecond, func(t *testing.T, r *road, ch channel.Lane) {
		flows := dialMany(t, ch, 3*mostLanes)
		r.hush(1)
		time.Sleep(5 * time.Second)
		more := dialMany(t, ch, mostLanes)
		time.Sleep(15 * time.Second)
		if ch.Silence() > 3*time.Second {
			t.Error("the whole is silent")
		}
		if n := broken(t, flows); n != 3 {
			t.Errorf("%d flows are broken, want 3", n)
		}
		if n := broken(t, more); n != 0 {
			t.Errorf("%d flows are broken that came later", n)
		}
		more = append(more, dialMany(t, ch, 3)...)
		if wires, served, _ := r.counts(); wires != mostLanes+1 || served != mostLanes {
			t.Errorf("%d wires, %d served", wires, served)
		}
		closeFlows(slices.Concat(flows, more))
	})
}

// testLanesEnd: all end with the first, and nothing is opened any more.
func testLanesEnd(t *testing.T, ends NewEnds) {
	onLanes(t, ends, 10*time.Millisecond, func(t *testing.T, r *road, ch channel.Lane) {
		flows := dialMany(t, ch, mostLanes)
		r.hush(0)
		if err := ch.Wait(); err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want the wire's own error", err)
		}
		if n := broken(t, flows); n != len(flows) {
			t.Errorf("%d flows are broken", n)
		}
		if _, err := ch.DialContext(t.Context(), "tcp", echoAt); !errors.Is(err, net.ErrClosed) {
			t.Errorf("dial: %v", err)
		}
		if _, err := ch.Listen(t.Context(), "tcp", "web:80"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("listen: %v", err)
		}
		closeFlows(flows)
	})
}

// testLanesKept: where another takes over from a silent first wire, what is open on
// the others goes on, and they end with it.
func testLanesKept(t *testing.T, ends NewEnds) {
	synctest.Test(t, func(t *testing.T) {
		r := &road{delay: 10 * time.Millisecond}
		r.ends = ends(t, Beats{})
		l, err := r.network.Listen(t.Context(), "tcp", echoAt)
		if err != nil {
			t.Fatal(err)
		}
		go echoAll(l)
		open := func(ctx context.Context) (channel.Channel, error) { return spread(t, r.open), nil }
		k := channel.NewKeep(channel.KeepConfig{Open: open, Beside: open})
		go k.Run(context.Background())
		flows := dialMany(t, k, mostLanes)
		r.hush(0)
		time.Sleep(10 * time.Minute)
		if n := broken(t, flows); n != 2 { // it had the second, too, for want of another
			t.Errorf("%d flows are broken, want those of the first wire", n)
		}
		if wires, served, _ := r.counts(); wires != mostLanes+1 || served != mostLanes-1 || k.State().Reopened != 1 {
			t.Errorf("%d wires, %d served, %+v", wires, served, k.State())
		}
		if _, err := k.DialContext(t.Context(), "tcp", "nobody:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
		closeFlows(flows)
		time.Sleep(10 * time.Second)
		if _, served, _ := r.counts(); served != 1 {
			t.Errorf("%d wires are left of those before", served-1)
		}
		k.Close()
		k.Wait()
		l.Close()
		time.Sleep(time.Minute) // the far end hears of it later
		if _, served, _ := r.counts(); served != 0 {
			t.Errorf("%d wires are left", served)
		}
	})
}
