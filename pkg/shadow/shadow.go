// Package shadow is the far end of a session: what runs in the pod.
//
// It listens on one port. Whoever connects asks, in HTTP/1.1, either for
// /healthz, which is for the kubelet, or to upgrade to one of the wires; from then
// on the bytes are the wire's, which knows the laptop by its key. HTTP is
// there for the sake of the API server, whose pods/proxy carries an upgrade
// faster than a port-forward carries anything; the other ways say the same, so
// that there is one door. There may be several wires at once: a new one is
// opened while the old one is not yet known to be dead.
//
// What a wire leads to is the Network of the pod, less what is not the
// cluster's (loopback, link-local with its metadata services), plus one host of
// the shadow's own, ControlAddress, which answers what only the pod knows: its
// addresses and its resolver, which tell the cluster's DNS without any right.
//
// The shadow outlives its laptop by the grace time and no more. It measures
// silence on its own monotonic clock: nothing is compared with another
// machine's. A laptop that comes back while the cluster cannot yet be told of
// its end finds its session as it was.
//
// A shadow with Routes is a router, too: it stands where a Service's pods stood,
// and belongs to that Service rather than to one laptop. A laptop listens, over
// its wire, at addresses of its claim, and asks ControlAddress for the claim; the
// router dials those addresses in memory, and goes to the original where they do
// not answer. A wire that is lost takes its listeners with it, so that nothing has
// to be told. See claims.go for what is asked, and leave.go for the ways to end
// without harm: each of them first sees to it that nothing comes any more.
package shadow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/router"
)

const (
	// DefaultGrace is how long a laptop may be silent.
	DefaultGrace = time.Minute

	firstRetry   = time.Second
	longestRetry = 30 * time.Second
)

// Config says what a shadow is to be.
type Config struct {
	Version string
	Listen  string // address, ":7465"
	KeysDir string // with host_key (OpenSSH PEM) and authorized_key
	Keys    *Keys  // or these themselves

	// Grace is how long the laptop may be silent, also at first. Zero means
	// DefaultGrace.
	Grace time.Duration

	// Heal, if set, is called after Grace, again until it succeeds, to put the
	// cluster back as it was.
	Heal func(context.Context) error

	// Routes make it a router. One without Heal never ends by itself: nobody
	// would serve the Service after it.
	Routes []router.Route

	// Redirect, if set, is where the Routes listen, and not Network: before a
	// program in this very pod. What the kubelet asks of that, it is asked still.
	Redirect channel.Network

	// Service, if set, is the one whose traffic the Routes carry. It is watched,
	// and put back after Grace, before Heal.
	Service Service

	// Workload, if set, made room for the router on behalf of the claim For. It is
	// put back before the Service, and already when that claim has been silent for
	// Grace, whoever else holds the router.
	Workload Workload
	For      string

	// TTL, if set, tells how long others remember the router's address, who are led
	// to it by a name. It then goes on for as long after the Service was put back.
	TTL func(context.Context) (time.Duration, error)

	Network channel.Network // nil: the pod's own, a channel.Host
	Log     *slog.Logger
}

// Keys are what a shadow is known by and knows the laptop by, as in KeysDir.
type Keys struct{ Host, Authorized []byte }

// A Shadow is the far end of one session.
type Shadow struct {
	cfg     Config
	pulse   *pulse
	network *network
	door    door
	udp     udp
	router  *router.Router // nil without Routes
	arrival *arrivals      // of its connections
	service serviceState
	names   remembered
	claimed *pulse        // of the claim For
	leaving atomic.Bool   // it was told to end
	lapsing atomic.Bool   // nobody was here for the grace time
	retry   time.Duration // the first one; tests have no time
	bound   chan net.Addr // gets the listener's address
	ended   chan struct{} // gets a word when a laptop has ended the router
}

// New starts nothing.
func New(cfg Config) *Shadow {
	if cfg.Grace <= 0 {
		cfg.Grace = DefaultGrace
	}
	if cfg.Network == nil {
		cfg.Network = &channel.Host{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Shadow{cfg: cfg, pulse: newPulse(), claimed: newPulse(), retry: firstRetry, bound: make(chan net.Addr, 1), ended: make(chan struct{}, 1)}
	s.network = newNetwork(cfg.Network, readResolvConf("/etc/resolv.conf"), len(cfg.Routes) > 0)
	s.door.porch.Most = maxStrangers
	s.udp.peers, s.udp.admitted = map[string]bool{}, make(chan peer)
	s.service.again = make(chan struct{}, 1)
	if len(cfg.Routes) > 0 {
		s.arrival = &arrivals{Network: cmp.Or(cfg.Redirect, cfg.Network), pulse: newPulse()}
		s.router = router.New(router.Config{
			Routes: cfg.Routes, Network: s.arrival, Grace: cfg.Grace, SpareProbes: cfg.Redirect != nil, Log: cfg.Log,
		})
	}
	return s
}

// What ends Run in good order.
var (
	errLapsed = errors.New("lease lapsed")          // the laptop is gone and the cluster is as before
	errLeft   = errors.New("told to end, and done") // nothing comes to the router any more
)

// Run serves until ctx ends, or the laptop has been silent for the grace time
// and Heal has succeeded; then it returns nil. After ctx a router goes on for as
// long as it has connections, but not for long.
func (s *Shadow) Run(ctx context.Context) error {
	keys, err := s.cfg.keys()
	if err != nil {
		return err
	}
	ln, err := (&net.ListenConfig{Control: channel.Congestion}).Listen(ctx, "tcp", s.cfg.Listen)
	if err != nil {
		return fmt.Errorf("listen for wires: %w", err)
	}
	control, err := s.network.memory.Listen(ctx, "tcp", ControlAddress)
	if err != nil {
		ln.Close()
		return err
	}
	s.udp.number = uint16(ln.Addr().(*net.TCPAddr).Port)
	s.bound <- ln.Addr()
	s.pulse.beat()
	defer s.network.wait()
	err = s.serve(ctx, ln, control, keys)
	if errors.Is(err, errLapsed) || errors.Is(err, errLeft) {
		return nil
	}
	return err
}

// serve runs the parts. All end with life; wires may have to end before.
func (s *Shadow) serve(ctx context.Context, ln, control net.Listener, keys wires.Keys) error {
	g, life := errgroup.WithContext(s.lifetime(ctx))
	connected, hangUp := context.WithCancel(life)
	defer hangUp()
	working, stop := context.WithCancel(life)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	g.Go(func() error { <-life.Done(); return ln.Close() })
	g.Go(func() error { return s.control(life, control, keys) })
	g.Go(func() error { return s.accept(life, connected, ln, keys) })
	g.Go(func() error { return s.outlive(working) })
	g.Go(func() error { return s.serveUDP(connected) })
	if s.router != nil {
		g.Go(func() error { return s.route(life) })
		g.Go(func() error { return s.leave(ctx, life, hangUp) })
		g.Go(func() error { return s.untilEnded(working) })
	}
	if s.router != nil && s.cfg.Service != nil {
		g.Go(func() error { return s.watch(working) })
	}
	if s.cfg.TTL != nil {
		g.Go(func() error { return s.askNames(working) })
	}
	return g.Wait()
}

// lifetime is that of ctx, except for a router, which ends itself after it.
func (s *Shadow) lifetime(ctx context.Context) context.Context {
	if s.router == nil {
		return ctx
	}
	return context.WithoutCancel(ctx)
}

func (c Config) keys() (wires.Keys, error) {
	if c.Keys == nil {
		return readKeys(c.KeysDir)
	}
	return wires.ParseKeys(c.Keys.Host, c.Keys.Authorized)
}

func readKeys(dir string) (wires.Keys, error) {
	private, err := os.ReadFile(filepath.Join(dir, "host_key"))
	if err != nil {
		return wires.Keys{}, fmt.Errorf("read keys: %w", err)
	}
	peer, err := os.ReadFile(filepath.Join(dir, "authorized_key"))
	if err != nil {
		return wires.Keys{}, fmt.Errorf("read keys: %w", err)
	}
	keys, err := wires.ParseKeys(private, peer)
	if err != nil {
		return wires.Keys{}, fmt.Errorf("read keys in %s: %w", dir, err)
	}
	return keys, nil
}

// accept serves connections until ctx ends, and returns when they are gone.
func (s *Shadow) accept(ctx, connected context.Context, ln net.Listener, keys wires.Keys) error {
	var all sync.WaitGroup
	defer all.Wait()
	for {
		conn, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("listen for wires: %w", err)
		case err != nil: // out of descriptors, mostly; some will be free again
			s.cfg.Log.Warn("connection not accepted", "err", err)
			pause(ctx, 100*time.Millisecond)
			continue
		}
		all.Go(func() { s.answer(ctx, connected, conn, keys) })
	}
}

// outlive waits for the laptop to be silent for too long, and then for the
// cluster to be healed.
func (s *Shadow) outlive(ctx context.Context) error {
	for s.pulse.stops(ctx, s.cfg.Grace) {
		if s.router != nil && s.cfg.Heal == nil {
			s.cfg.Log.Info("laptop is silent; the original goes on being served, since nobody else would", "grace", s.cfg.Grace)
			<-ctx.Done()
			return nil
		}
		s.cfg.Log.Info("laptop is silent, session ends", "grace", s.cfg.Grace)
		if s.putBack(ctx) && s.heal(ctx, s.cfg.Heal) {
			return errLapsed
		}
	}
	return nil
}

// heal tries until it succeeds. It gives up when ctx ends or the laptop is back.
func (s *Shadow) heal(ctx context.Context, how func(context.Context) error) bool {
	if how == nil {
		return true
	}
	for wait := s.retry; ; wait = min(2*wait, longestRetry) {
		err := how(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		s.cfg.Log.Warn("session not ended, trying again", "err", err, "wait", wait)
		if !pause(ctx, wait) || s.pulse.silence() < s.cfg.Grace {
			return false
		}
	}
}

// pause tells whether ctx still goes on afterwards.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
