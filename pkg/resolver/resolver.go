// Package resolver tells the operating system to ask culvert's own DNS server
// for the cluster's names, and to ask everybody else as before.
//
// Where the system has per-link settings (systemd-resolved) they are used: they
// split by name, they die with the link, and nothing of the machine's own is
// replaced. A bare resolv.conf knows no split, so there the server is put in
// front of all and forwards what is not the cluster's to Upstreams. That file
// can outlive culvert, so it says on its first line whose it is and the original
// lies beside it, hard-linked, so that putting it back is one rename that keeps
// owner, mode, attributes and symlink. It also quotes the original, for copies of
// it that others make and put back when we are long gone. Beside it, too, each session has an
// entry, locked while it lives. From the living entries and the original
// follows what resolv.conf is to say, and one function (settle) makes it so,
// whatever happened: a session began, ended or was killed, or somebody else
// wrote the file, which makes theirs the original. A C library asks servers in
// order and not by zone, so resolv.conf names the server of the session that
// came last; that one passes what it does not know to the one before.
//
// Nothing is polled: Run hears of changes from inotify, which also tells when a
// session's entry is closed by its death. openresolv writes resolv.conf from
// what it is told and may refuse to write it again once it is not its own, so it
// is told of us instead, as of any interface. Everybody else who writes the file
// (DHCP clients, NetworkManager with and without dnsmasq, Debian's resolvconf,
// VPN clients, people) is followed; who edits ours has edited the original. A read-only /etc is refused before anything is changed: a mount
// over the file would not be seen by who has mounts of their own, and no mark
// on it could tell "clean" whose it is.
//
// Detect decides from a World that is handed in, so that the table of all
// systems is tested on each of them. Set takes the whole wanted state; the zero
// Settings wants nothing of ours. The package runs with root's rights on the
// user's wishes, therefore Set checks what it is given.
package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
)

// ErrBusy says that another living session has the place of this one, as where
// two network namespaces share one /etc.
var ErrBusy = errors.New("in use by another session")

// Settings is all that is wanted of the system's resolver.
type Settings struct {
	Link      string     // the TUN's name
	LinkIndex int        // and its index
	Server    netip.Addr // our server, on port 53

	// Search is appended to names without dots, in this order. What is
	// searched is also asked of Server.
	Search []string

	// Zones are asked of Server and never searched: "cluster.local", "svc",
	// reverse zones, names of namespaces. The most wanted come first: systemd-
	// resolved takes 256 in all in many versions, and is not given the rest.
	Zones []string
}

// IsZero tells whether nothing is wanted.
func (s Settings) IsZero() bool {
	return s.Link == "" && s.LinkIndex == 0 && !s.Server.IsValid() && len(s.Search) == 0 && len(s.Zones) == 0
}

// Config says where the system is. The zero Config is the machine itself.
type Config struct {
	Root string // instead of "/"
	Bus  string // address of the system bus, instead of the usual one
	Log  *slog.Logger
}

func (c Config) path(p string) string { return filepath.Join("/", c.Root, p) }

// Resolver sets the system's resolver and puts it back.
type Resolver struct {
	cfg Config

	mu    sync.Mutex
	plan  Plan
	place place // where settings are now; nil when nothing is set
}

// A place is one way of telling the system. revert of what is already gone is
// no error.
type place interface {
	set(context.Context, Settings) error
	revert(context.Context) error
}

// New makes a Resolver and touches nothing.
func New(cfg Config) *Resolver {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Resolver{cfg: cfg}
}

// Set makes the system as s says, from whatever an earlier Set left.
func (r *Resolver) Set(ctx context.Context, s Settings) error {
	if s.IsZero() {
		return r.revert(ctx)
	}
	if err := s.check(); err != nil {
		return fmt.Errorf("resolver settings: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.place == nil {
		return r.begin(ctx, s)
	}
	return r.place.set(ctx, s)
}

// begin chooses the place. It is kept until everything is reverted, even if
// the system changes meanwhile.
func (r *Resolver) begin(ctx context.Context, s Settings) error {
	if err := r.Restore(ctx); err != nil { // what a dead session left is no original
		return fmt.Errorf("put back the resolver of an earlier session: %w", err)
	}
	plan := Detect(look(ctx, r.cfg))
	place, err := open(r.cfg, plan)
	if err != nil {
		return fmt.Errorf("set the resolver by %s (%s): %w", plan.Mode, plan.Why, err)
	}
	if err := place.set(ctx, s); err != nil {
		return errors.Join(fmt.Errorf("set the resolver by %s: %w", plan.Mode, err), place.revert(ctx))
	}
	r.plan, r.place = plan, place
	return nil
}

// Preview tells what Set would do, without rights and without doing it.
func (r *Resolver) Preview(ctx context.Context) Plan { return Detect(look(ctx, r.cfg)) }

// Plan says what is in use; the zero Plan when nothing is.
func (r *Resolver) Plan() Plan {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.plan
}

// Close puts everything back. It may be called more than once.
func (r *Resolver) Close() error { return r.revert(context.Background()) }

func (r *Resolver) revert(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.place == nil {
		return nil
	}
	err := r.place.revert(ctx)
	if err != nil {
		return fmt.Errorf("put the resolver back (%s): %w", r.plan.Mode, err)
	}
	r.plan, r.place = Plan{}, nil
	return nil
}
