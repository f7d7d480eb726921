package wiretest

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Site is a far end that one can connect to again and again.
type Site interface {
	// Open makes a wire to it.
	Open(ctx context.Context) (channel.Silent, error)

	// Cut ends the present wire, at the far end.
	Cut()

	// Hush lets nothing pass any more, either way, as a cut cable does.
	Hush()

	// End ends the far end, as its context does, and gives what it returned last.
	End() error
}

// Way is what lies between the ends: as fast as it can be, where it is not told to
// carry so many bytes a second, with as many in front of it as a buffer holds, and
// that they all take so long.
type Way struct {
	Up, Down, Buffer int
	Delay            time.Duration // either way
}

// NewSite makes one with keys of its own.
type NewSite func(t testing.TB, b Beats, w Way, n channel.Network) Site

// sites are those of a wire over a byte stream.
func sites(ends NewEnds) NewSite {
	return func(t testing.TB, b Beats, w Way, n channel.Network) Site {
		s := &streamSite{t: t, ends: ends(t, b), network: n, way: w, cut: make(chan struct{})}
		s.ctx, s.end = context.WithCancel(context.Background())
		return s
	}
}

// streamSite serves each connection by itself.
type streamSite struct {
	t       testing.TB
	ends    Ends
	network channel.Network
	way     Way
	cut     chan struct{}
	ctx     context.Context
	end     context.CancelFunc
	wg      sync.WaitGroup

	mu      sync.Mutex
	present net.Conn // the far end's connection
	err     error    // of the last Serve
}

func (s *streamSite) Open(ctx context.Context) (channel.Silent, error) {
	a, b := tcpPipe(s.t)
	if s.way.Delay > 0 {
		other, relayed := tcpPipe(s.t)
		go lag(relayed, b, s.way.Delay)
		go lag(b, relayed, s.way.Delay)
		b = other
	}
	s.mu.Lock()
	s.present = b
	s.mu.Unlock()
	s.wg.Go(func() {
		err := s.ends.Serve(s.ctx, s.slow(freeze(b, s.cut), s.way.Down), s.network)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.err = err
	})
	return s.ends.Dial(ctx, s.slow(freeze(a, s.cut), s.way.Up))
}

func (s *streamSite) slow(c net.Conn, perSecond int) net.Conn {
	if perSecond == 0 {
		return c
	}
	return slowDown(c, perSecond, s.way.Buffer)
}

func (s *streamSite) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.present != nil {
		s.present.Close()
	}
}

func (s *streamSite) Hush() { close(s.cut) }

func (s *streamSite) End() error {
	s.end()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// reach makes a channel to a new site, and ends both.
func reach(t testing.TB, sites NewSite, b Beats, w Way, n channel.Network) channel.Silent {
	t.Helper()
	s := sites(t, b, w, n)
	ch, err := s.Open(context.Background())
	if err != nil {
		s.End()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		s.End()
	})
	return ch
}

// keptSite is a site as a Keep knows it, where it may also be refused.
type keptSite struct {
	Site
	mu     sync.Mutex
	refuse error
	opened int
}

func (s *keptSite) open(ctx context.Context) (channel.Channel, error) {
	s.mu.Lock()
	s.opened++
	refuse := s.refuse
	s.mu.Unlock()
	if refuse != nil {
		return nil, refuse
	}
	ch, err := s.Open(ctx)
	if err != nil {
		return nil, err
	}
	return ch, nil
}

// keep runs a Keep over a new site until the test ends.
func keep(t *testing.T, sites NewSite, n channel.Network, cfg channel.KeepConfig) (*channel.Keep, *keptSite) {
	t.Helper()
	s := &keptSite{Site: sites(t, Beats{}, Way{}, n)}
	cfg.Open = s.open
	k := channel.NewKeep(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error, 1)
	go func() { res <- k.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-res; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run: %v, want net.ErrClosed", err)
		}
		s.End()
	})
	return k, s
}
