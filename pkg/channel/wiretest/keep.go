package wiretest

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

// testKeep: a Keep is a Channel like any other.
func testKeep(t *testing.T, sites NewSite) {
	channeltest.Run(t, func(t *testing.T, n channel.Network) channel.Channel {
		k, _ := keep(t, sites, n, channel.KeepConfig{})
		return k
	})
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// testKeepReopens: flows end with their wire, dials wait for the next.
func testKeepReopens(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	states := make(chan channel.KeepState, 100)
	k, s := keep(t, sites, &channel.Host{}, channel.KeepConfig{MinBackoff: time.Millisecond, OnState: func(st channel.KeepState) { states <- st }})
	address := channeltest.ServeTCP(t, channeltest.Echo)
	for i := range 3 {
		c, err := k.DialContext(within(t), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if st := receive(t, states); !st.Up || st.Reopened != i || st.Since.IsZero() {
			t.Errorf("state %+v", st)
		}
		s.Cut()
		if _, err := io.ReadAll(c); err == nil {
			t.Error("a flow ended as if it was whole")
		}
		if st := receive(t, states); st.Up || st.Err == nil {
			t.Errorf("state %+v", st)
		}
	}
}

// testKeepListens: a listener lives on over wires, at its address.
func testKeepListens(t *testing.T, sites NewSite) {
	channeltest.NoLeak(t)
	k, s := keep(t, sites, &channel.Host{}, channel.KeepConfig{MinBackoff: time.Millisecond})
	l, err := k.Listen(within(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() { accepted <- echoAll(l) }()
	for range 3 {
		answered(t, l.Addr().String())
		s.Cut()
	}
	l.Close()
	if err := receive(t, accepted); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v, want net.ErrClosed", err)
	}
	if l, err = k.Listen(within(t), "tcp", l.Addr().String()); err != nil {
		t.Error("listen again:", err)
	}
	defer l.Close()
	if _, err := k.Listen(within(t), "tcp", l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen at a taken port: %v, want EADDRINUSE", err)
	}
}

// echoAll serves a listener until that ends.
func echoAll(l net.Listener) error { return serveAll(l, channeltest.Echo) }

func serveAll(l net.Listener, handle func(net.Conn)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer c.Close()
			handle(c)
		})
	}
}

// answered dials until there is an echo: a listener may be about to end with
// its wire, or not there again yet.
func answered(t *testing.T, address string) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		c, err := net.Dial("tcp", address)
		if err != nil {
			continue
		}
		c.Write([]byte("hello"))
		_, err = io.ReadFull(c, make([]byte, 5))
		c.Close()
		if err == nil {
			return
		}
	}
	t.Fatal("nobody answers at", address)
}

// away is a far end in memory that may refuse who connects to it.
type away struct {
	ends Ends
	wg   sync.WaitGroup

	mu     sync.Mutex
	refuse error
	opened int
}

func (s *away) open(ctx context.Context) (channel.Channel, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	if s.refuse != nil {
		return nil, s.refuse
	}
	a, b := net.Pipe()
	s.wg.Go(func() { s.ends.Serve(context.Background(), b, &channel.Host{}) })
	return s.ends.Dial(ctx, a)
}

// set is what the next attempts meet.
func (s *away) set(refuse error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = refuse
}

// testKeepPatience: while the wire is down, a dial waits as long as it may, and
// then says why; attempts grow rarer but never end.
func testKeepPatience(t *testing.T, ends NewEnds) {
	synctest.Test(t, func(t *testing.T) {
		away := &away{ends: ends(t, Beats{})}
		noPod := errors.New("no such pod")
		away.set(noPod)
		k := channel.NewKeep(channel.KeepConfig{Open: away.open})
		go k.Run(context.Background())
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := k.DialContext(ctx, "tcp", "web:80")
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, noPod) {
			t.Errorf("%v, want DeadlineExceeded and %q", err, noPod)
		}
		if st := k.State(); st.Up || !errors.Is(st.Err, noPod) || !st.Since.IsZero() {
			t.Errorf("state %+v", st)
		}
		away.mu.Lock()
		minute := away.opened
		away.mu.Unlock()
		if minute < 14 || minute > 30 {
			t.Errorf("%d attempts in a minute", minute)
		}
		time.Sleep(time.Hour)
		away.set(nil) // the pod is there
		if err := k.Ready(context.Background()); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		if st := k.State(); !st.Up || st.Reopened != 0 || time.Since(st.Since) > 65*time.Second {
			t.Errorf("state %+v", st)
		}
		k.Close()
		if err := k.Wait(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Wait: %v, want net.ErrClosed", err)
		}
		if err := k.Ready(context.Background()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Ready: %v, want net.ErrClosed", err)
		}
		away.wg.Wait()
	})
}

// testKeepBetter: a better wire takes over when there is one, at first and after it
// was lost, though later and later; what is open elsewhere goes on there.
func testKeepBetter(t *testing.T, ends NewEnds) {
	synctest.Test(t, func(t *testing.T) {
		r := &road{}
		r.ends = ends(t, Beats{})
		l, err := r.network.Listen(t.Context(), "tcp", echoAt)
		if err != nil {
			t.Fatal(err)
		}
		go echoAll(l)
		var mu sync.Mutex
		var tried []time.Time
		tries := func() []time.Time {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(tried)
		}
		var there atomic.Bool
		var wire atomic.Pointer[channel.Channel] // the last better one
		k := channel.NewKeep(channel.KeepConfig{Open: r.open, Beside: r.open, Better: func(ctx context.Context) (channel.Channel, error) {
			mu.Lock()
			tried = append(tried, time.Now())
			mu.Unlock()
			if !there.Load() {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			ch, err := r.open(ctx)
			wire.Store(&ch)
			return ch, err
		}})
		go k.Run(context.Background())
		if err := k.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		old := dialEcho(t, k)
		time.Sleep(20 * time.Minute)
		if s := k.State(); s.Better || !errors.Is(s.NoBetter, context.DeadlineExceeded) || s.Reopened != 0 {
			t.Errorf("none is there: %+v", s)
		}
		if at := tries(); len(at) < 5 || len(at) > 10 || at[1].Sub(at[0]) < 15*time.Second || at[len(at)-1].Sub(at[len(at)-2]) > 6*time.Minute {
			t.Errorf("tried at %v", at)
		}
		there.Store(true)
		time.Sleep(12 * time.Minute)
		if s := k.State(); !s.Better || s.NoBetter != nil || s.Reopened != 0 {
			t.Errorf("it is there: %+v", s)
		}
		exchange(t, old)
		dialEcho(t, k).Close()
		n := len(tries())
		for range 2 { // the first was good for long, the second was not
			(*wire.Load()).Close()
			dialEcho(t, k).Close()
			time.Sleep(2 * time.Minute)
			if s := k.State(); !s.Better || len(tries()) != n+1 {
				t.Errorf("after %d tries %+v", len(tries())-n, s)
			}
			n++
		}
		exchange(t, old)
		old.Close()
		k.Close()
		k.Wait()
		l.Close()
		synctest.Wait()
		if _, served, _ := r.counts(); served != 0 {
			t.Errorf("%d wires are left", served)
		}
	})
}
