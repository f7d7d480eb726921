package session

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/resolver"
)

// namesRead is how long a connect waits for the names to be read. They answer
// before that too: the cluster's DNS is asked meanwhile.
const namesRead = 5 * time.Second

func (c *Connect) serveNames(ctx context.Context) (string, error) {
	server := c.device.Addrs[0]
	packets, streams, err := c.child.ListenDNS(ctx, server)
	if err != nil {
		return "", err
	}
	clusterServer, domain := clusterDNS(c.cfg.Cluster.Namespace, c.far.ResolvConf)
	c.names = dns.New(dns.Config{
		ClusterDomain: domain, Namespace: c.cfg.Cluster.Namespace,
		Upstream: c.upstreams(server), Cluster: c.keep, ClusterDNS: clusterServer, Log: c.cfg.Log,
	})
	c.naming = naming{
		device: c.device.Name(), index: c.device.Index, server: server,
		namespace: c.cfg.Cluster.Namespace, domain: domain,
	}
	c.names.Zone().SetPrefixes(prefixes(c.routes))
	c.background("DNS server", func(ctx context.Context) error { return c.names.Run(ctx, packets, streams) })
	return fmt.Sprintf("names answered at %s", server), c.watchNames(ctx)
}

// upstreams are this machine's own nameservers, read anew as it moves between
// networks, but not for every question.
func (c *Connect) upstreams(ours netip.Addr) func() []netip.AddrPort {
	system := resolver.New(resolver.Config{Log: c.cfg.Log})
	var mu sync.Mutex
	var last []netip.AddrPort
	var at time.Time
	return func() []netip.AddrPort {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(at) < time.Second {
			return last
		}
		now, err := system.Upstreams(ours)
		if err != nil {
			c.cfg.Log.Warn("upstream nameservers not read", "error", err)
			return last
		}
		last, at = now, time.Now()
		return last
	}
}

// watchNames fills the zone, and waits a little for it to be whole.
func (c *Connect) watchNames(ctx context.Context) error {
	read := make(chan struct{})
	sink := &tee{Sink: c.names.Zone(), changed: c.namesChanged, read: sync.OnceFunc(func() { close(read) })}
	c.background("watch of names", func(ctx context.Context) error {
		return c.cfg.Cluster.Watch(ctx, sink, func(missing string) { c.cfg.Log.Info("not allowed", "missing", missing) })
	})
	select {
	case <-read:
	case <-time.After(namesRead):
		c.cfg.Log.Info("names are not all read yet")
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (c *Connect) setResolver(ctx context.Context) (string, error) {
	c.mu.Lock()
	c.naming.namespaces, c.naming.prefixes = c.seen.namespaces, prefixes(c.routes)
	settings := c.naming.settings()
	c.mu.Unlock()
	plan, err := c.child.SetDNS(ctx, settings)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	c.naming.mode = plan.Mode
	c.mu.Unlock()
	return fmt.Sprintf("names asked through %s", plan.Mode), nil
}

func (c *Connect) namesChanged(s sinkState) {
	c.mu.Lock()
	c.seen = s
	c.mu.Unlock()
	c.tellResolver()
}

// tellResolver tells the OS of zones that are new, once it has been told at all.
func (c *Connect) tellResolver() {
	c.mu.Lock()
	before := c.naming.settings()
	c.naming.namespaces, c.naming.prefixes = c.seen.namespaces, prefixes(c.routes)
	settings, told := c.naming.settings(), c.naming.mode != resolver.ModeNone
	c.mu.Unlock()
	if !told || reflect.DeepEqual(before, settings) {
		return
	}
	if _, err := c.child.SetDNS(c.gctx, settings); err != nil && c.gctx.Err() == nil {
		c.cfg.Log.Warn("the resolver was not told of new zones", "error", err)
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
	read    func()
	state   sinkState
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
