package session

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/resolver"
)

// namesRead is how long a connect waits for the names to be read. They answer
// before that too: the cluster's DNS is asked meanwhile.
const namesRead = 5 * time.Second

// makeNames makes the server of the cluster's names, which listens nowhere yet. ours is
// where it will.
func (t *tunnel) makeNames(ours netip.Addr) {
	server, domain := clusterDNS(t.cfg.Cluster.Namespace, t.far.ResolvConf)
	cfg := dns.Config{
		ClusterDomain: domain, Namespace: t.cfg.Cluster.Namespace,
		Self: t.probe(), SelfAddr: ours,
		Suffix: t.cfg.As, Cluster: t.keep, ClusterDNS: server, Reached: func() error { return reachedBy(t.keep) }, Log: t.log,
		Shown: t.around.shown, Real: t.around.real,
	}
	if !t.only {
		cfg.Upstream = t.upstreams(ours, t.tellMoved)
	}
	t.names = dns.New(cfg)
	t.naming = naming{server: ours, namespace: t.cfg.Cluster.Namespace, domain: domain, suffix: t.cfg.As, probe: t.probe()}
	t.names.Zone().SetPrefixes(prefixes(t.routes))
}

// wireBlip is for how long a question waits for a wire that was lost just now.
const wireBlip = 2 * time.Second

// reachedBy tells why questions are not to wait for a wire.
func reachedBy(keep *channel.Keep) error {
	s := keep.State()
	if s.Up && s.Silent == 0 || !s.Up && time.Since(s.Since) < wireBlip {
		return nil
	}
	return fmt.Errorf("no wire: %w", cmp.Or(s.Err, os.ErrDeadlineExceeded))
}

// probe is a name that the session's own server alone knows. Nobody else has any below
// internal, which is set aside for names like these.
func (t *tunnel) probe() string { return t.id + ".culvert.internal" }

func (c *Connect) serveNames(ctx context.Context) (string, error) {
	c.makeNames(c.server)
	c.naming.device, c.naming.index = c.device.Name(), c.device.Index
	return c.answerNames(c.names), c.watchNames(ctx, c.tellZones)
}

// upstreams are this machine's own nameservers, read anew as it moves between
// networks, but not for every question. moved is called when they are others than before.
func (c *course) upstreams(ours netip.Addr, moved func()) func() []netip.AddrPort {
	system := resolver.New(resolver.Config{Log: c.log})
	var mu sync.Mutex
	var last []netip.AddrPort
	var at time.Time
	return func() []netip.AddrPort {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) < time.Second {
			return last
		}
		at = time.Now()
		now, err := system.Upstreams(ours)
		if err != nil {
			c.log.Warn("upstream nameservers not read", "error", err)
			return last
		}
		if last != nil && !slices.Equal(last, now) {
			moved()
		}
		last = now
		return last
	}
}

// watchNames fills the zone, and waits a little for it to be whole. changed is called
// when there are other namespaces, or others may be seen.
func (t *tunnel) watchNames(ctx context.Context, changed func()) error {
	read := make(chan struct{})
	sink := &tee{Sink: t.names.Zone(), read: sync.OnceFunc(func() { close(read) }), used: t.tellUses, changed: func(s sinkState) {
		t.mu.Lock()
		t.seen = s
		t.mu.Unlock()
		changed()
	}}
	t.background("watch of names", func(ctx context.Context) error {
		return t.cfg.Cluster.Watch(ctx, sink, func(missing string) { t.log.Info("not allowed", "missing", missing) })
	})
	select {
	case <-read:
	case <-time.After(namesRead):
		t.log.Info("names are not all read yet")
	case <-ctx.Done():
	}
	return ctx.Err()
}

// setResolver tells the OS of our server, and from then on of zones that come
// and go.
func (c *Connect) setResolver(ctx context.Context) (string, error) {
	told := c.wantedSettings()
	result, err := c.tellResolver(ctx, told)
	if err == nil && result != "" {
		c.background("zones", func(ctx context.Context) error { return c.followZones(ctx, told) })
	}
	return result, err
}

const (
	settleTime  = 200 * time.Millisecond // several changes are followed as one
	settleAgain = 5 * time.Second        // after a failure
)

// settled follows changes until ctx ends: a moment after one, however many come
// meanwhile, and again after a failure.
func settled(ctx context.Context, changed <-chan struct{}, follow func() (ok bool)) error {
	due := time.NewTimer(time.Hour)
	due.Stop()
	defer due.Stop()
	for waiting := changed; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-waiting:
			waiting = nil // what comes now is not to put it off
			due.Reset(settleTime)
		case <-due.C:
			waiting = changed
			if !follow() {
				due.Reset(settleAgain)
			}
		}
	}
}

// followZones tells the OS whenever the zones are others than it was told. It is
// the only one who tells, so that the last word is the newest.
func (c *Connect) followZones(ctx context.Context, told resolver.Settings) error {
	c.tellZones() // what changed while it was first told
	return settled(ctx, c.zonesChanged, func() bool {
		wanted := c.wantedSettings()
		if reflect.DeepEqual(wanted, told) {
			return true
		}
		if _, err := c.child.SetDNS(ctx, wanted); err != nil {
			c.cfg.Log.Warn("the resolver was not told of new zones", "error", err)
			return false
		}
		told = wanted
		return true
	})
}

func (c *Connect) wantedSettings() resolver.Settings {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.naming
	n.namespaces, n.prefixes = c.seen.namespaces, c.around.ranges(c.routes)
	return n.settings()
}

// tellUses wakes follow where only addresses in use are led to.
func (t *tunnel) tellUses() {
	if t.around.exactly() {
		t.tellMoved()
	}
}

// tellMoved wakes follow, or leaves word for when it begins.
func (t *tunnel) tellMoved() { wake(t.moved) }

// tellZones wakes followZones, or leaves word for when it begins.
func (c *Connect) tellZones() { wake(c.zonesChanged) }

func wake(who chan<- struct{}) {
	select {
	case who <- struct{}{}:
	default:
	}
}

// sinkState is what a tee has seen pass.
type sinkState struct {
	namespaces []string
	scope      catalog.Scope
}

// whole is the scope in one list.
func (s sinkState) whole() []string {
	if s.scope.All {
		return []string{"*"}
	}
	return append([]string{}, s.scope.Namespaces...)
}

// A tee passes a catalog on and tells of its namespaces and scope.
type tee struct {
	catalog.Sink
	changed func(sinkState)
	used    func() // there may be other addresses
	read    func()
	state   sinkState
}

func (t *tee) PutService(s catalog.Service) {
	t.Sink.PutService(s)
	t.used()
}

func (t *tee) DropService(namespace, name string) {
	t.Sink.DropService(namespace, name)
	t.used()
}

func (t *tee) SetNamespaces(names []string) {
	t.Sink.SetNamespaces(names)
	t.state.namespaces = slices.Clone(names)
	t.changed(t.state)
}

func (t *tee) SetScope(s catalog.Scope) {
	t.Sink.SetScope(s)
	t.state.scope = s
	t.changed(t.state)
	t.read()
}
