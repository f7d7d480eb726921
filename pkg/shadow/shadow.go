// Package shadow is the far end of a session: what runs in the pod.
//
// It listens on one port. Whoever connects asks, in HTTP/1.1, either for
// /healthz, which is for the kubelet, or to upgrade to "culvert-ssh"; from then
// on the bytes are those of sshchan, which knows the laptop by its key. HTTP is
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
package shadow

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
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

	// Grace is how long the laptop may be silent, also at first. Zero means
	// DefaultGrace.
	Grace time.Duration

	// Heal, if set, is called after Grace, again until it succeeds, to put the
	// cluster back as it was.
	Heal func(context.Context) error

	Network channel.Network // nil: the pod's own, a channel.Host
	Log     *slog.Logger
}

// A Shadow is the far end of one session.
type Shadow struct {
	cfg     Config
	pulse   *pulse
	network *network
	door    door
	retry   time.Duration // the first one; tests have no time
	bound   chan net.Addr // gets the listener's address
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
	s := &Shadow{cfg: cfg, pulse: newPulse(), retry: firstRetry, bound: make(chan net.Addr, 1)}
	s.network = newNetwork(cfg.Network, readResolvConf("/etc/resolv.conf"), s.info)
	return s
}

// errLapsed ends Run: the laptop is gone and the cluster is as before.
var errLapsed = errors.New("lease lapsed")

// Run serves until ctx ends, or the laptop has been silent for the grace time
// and Heal has succeeded; then it returns nil.
func (s *Shadow) Run(ctx context.Context) error {
	id, err := readIdentity(s.cfg.KeysDir)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return fmt.Errorf("listen for wires: %w", err)
	}
	s.bound <- ln.Addr()
	s.pulse.beat()
	defer s.network.wait()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { <-ctx.Done(); return ln.Close() })
	g.Go(func() error { return s.accept(ctx, ln, id) })
	g.Go(func() error { return s.outlive(ctx) })
	if err := g.Wait(); !errors.Is(err, errLapsed) {
		return err
	}
	return nil
}

func readIdentity(dir string) (sshchan.Identity, error) {
	private, err := os.ReadFile(filepath.Join(dir, "host_key"))
	if err != nil {
		return sshchan.Identity{}, fmt.Errorf("read keys: %w", err)
	}
	peer, err := os.ReadFile(filepath.Join(dir, "authorized_key"))
	if err != nil {
		return sshchan.Identity{}, fmt.Errorf("read keys: %w", err)
	}
	id, err := sshchan.ParseIdentity(private, peer)
	if err != nil {
		return sshchan.Identity{}, fmt.Errorf("read keys in %s: %w", dir, err)
	}
	return id, nil
}

// accept serves connections until ctx ends, and returns when they are gone.
func (s *Shadow) accept(ctx context.Context, ln net.Listener, id sshchan.Identity) error {
	var wires sync.WaitGroup
	defer wires.Wait()
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
		wires.Go(func() { s.answer(ctx, conn, id) })
	}
}

// outlive waits for the laptop to be silent for too long, and then for the
// cluster to be healed.
func (s *Shadow) outlive(ctx context.Context) error {
	for s.pulse.stops(ctx, s.cfg.Grace) {
		s.cfg.Log.Info("laptop is silent, session ends", "grace", s.cfg.Grace)
		if s.heal(ctx) {
			return errLapsed
		}
	}
	return nil
}

// heal tries until it succeeds. It gives up when ctx ends or the laptop is back.
func (s *Shadow) heal(ctx context.Context) bool {
	if s.cfg.Heal == nil {
		return true
	}
	for wait := s.retry; ; wait = min(2*wait, longestRetry) {
		err := s.cfg.Heal(ctx)
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
