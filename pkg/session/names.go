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
		at = time.Now()
		now, err := system.Upstreams(ours)
		if err != nil {
			c.cfg.Log.Warn("upstream nameservers not read", "error", err)
			return last
		}
		last = now
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

// setResolver tells the OS of our server, and from then on of zones that come
// and go.
func (c *Connect) setResolver(ctx context.Context) (string, error) {
	told := c.wantedSettings()
	plan, err := c.child.SetDNS(ctx, told)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	c.mode = plan.Mode
	c.mu.Unlock()
	if plan.Manager != "" {
		c.warn(fmt.Sprintf("%s writes /etc/resolv.conf here: if it does so now, the cluster's names are lost until you connect again", plan.Manager))
	}
	c.background("zones", func(ctx context.Context) error { return c.followZones(ctx, told) })
	return fmt.Sprintf("names asked through %s", plan.Mode), nil
}

const (
	zonesSettle = 200 * time.Millisecond // several changes are told as one
	zonesAgain  = 5 * time.Second        // after a failure
)

// followZones tells the OS whenever the zones are others than it was told. It is
// the only one who tells, so that the last word is the newest.
func (c *Connect) followZones(ctx context.Context, told resolver.Settings) error {
	again := time.NewTimer(0) // what changed while it was first told
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.zonesChanged:
			again.Reset(zonesSettle)
		case <-again.C:
			wanted := c.wantedSettings()
			if reflect.DeepEqual(wanted, told) {
				continue
			}
			if _, err := c.child.SetDNS(ctx, wanted); err != nil {
				c.cfg.Log.Warn("the resolver was not told of new zones", "error", err)
				again.Reset(zonesAgain)
				continue
			}
			told = wanted
		}
	}
}

func (c *Connect) wantedSettings() resolver.Settings {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.naming
	n.namespaces, n.prefixes = c.seen.namespaces, prefixes(c.routes)
	return n.settings()
}

func (c *Connect) namesChanged(s sinkState) {
	c.mu.Lock()
	c.seen = s
	c.mu.Unlock()
	c.tellZones()
}

// tellZones wakes followZones, or leaves word for when it begins.
func (c *Connect) tellZones() {
	select {
	case c.zonesChanged <- struct{}{}:
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
