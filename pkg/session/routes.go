package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// apiAlive is how long the API server may take to answer when the routes are set.
const apiAlive = 3 * time.Second

// findRoutes refuses before anything is changed. What only the shadow can tell
// comes to it in openDevice.
func (c *Connect) findRoutes(ctx context.Context) (string, error) {
	c.plan = routePlan{include: c.cfg.Include, exclude: c.cfg.Exclude, noIPv6: !tun.HasIPv6()}
	if err := c.pin(ctx); err != nil {
		return "", err
	}
	if err := c.twice(ctx); err != nil {
		return "", err
	}
	if err := c.readRoutes(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d routes found", len(c.routes)), nil
}

// pins are what the tunnel itself needs, and so must stay out of it.
type pins struct {
	nameservers []netip.Addr // of this machine, which the API server's name may be asked of
	servers     []netip.Addr // the API server, and an endpoint that the person has named
}

// pin reads all of them. Nothing but the first is in the way of the second.
func (c *Connect) pin(ctx context.Context) error {
	if err := c.pinNameservers(); err != nil {
		return err
	}
	_, err := c.pinServers(ctx)
	return err
}

func (c *Connect) pinNameservers() error {
	all, err := c.nameservers()
	if err == nil {
		c.setPins(func(p *pins) { p.nameservers = all })
	}
	return err
}

// pinServers leaves them as they were where they cannot be read.
func (c *Connect) pinServers(ctx context.Context) (others bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, pinLimit)
	defer cancel()
	server, err := c.cfg.Cluster.ServerAddrs(ctx)
	if err != nil {
		return false, err
	}
	endpoint, err := c.endpointAddrs(ctx)
	if err != nil {
		return false, err
	}
	return c.setPins(func(p *pins) { p.servers = slices.Concat(server, endpoint) }), nil
}

// pinLimit bounds a look-up of what must not enter the tunnel: routes wait for it.
const pinLimit = 5 * time.Second

// setPins tells whether there are others than before.
func (c *Connect) setPins(change func(*pins)) (others bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.pins)
	all := slices.Concat(c.pins.nameservers, c.pins.servers)
	others = !slices.Equal(all, c.plan.pinned)
	c.plan.pinned = all
	c.around.pin(all)
	return others
}

// endpointAddrs are those of a host that the person has named.
func (c *Connect) endpointAddrs(ctx context.Context) ([]netip.Addr, error) {
	host := c.cfg.Endpoint
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if slices.Contains([]string{"", kube.Auto, kube.LoadBalancer, kube.HostPort}, host) {
		return nil, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("look up the endpoint: %w", err)
	}
	for i, a := range addrs {
		addrs[i] = a.Unmap()
	}
	return addrs, nil
}

// routed tells of addresses that are the cluster's; the wire itself may not use them
// where they lead through it.
func (t *tunnel) routed(a netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return leads(t.routes, a)
}

func leads(routes []RouteStatus, a netip.Addr) bool {
	return slices.ContainsFunc(routes, func(r RouteStatus) bool { return r.Prefix.Contains(a) })
}

// readRanges reads the cluster's ranges.
func (t *tunnel) readRanges(ctx context.Context) ([]kube.Route, error) {
	found, missing, err := t.cfg.Cluster.CIDRs(ctx, t.hint)
	if err != nil {
		return nil, err
	}
	routes := t.plan.routes(found)
	t.log.Debug("routes found", "routes", len(routes), "missing", missing)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.found, t.routes = found, routes
	return found, nil
}

// setRanges has others taken for the cluster's from now on.
func (t *tunnel) setRanges(routes []RouteStatus) {
	t.names.Zone().SetPrefixes(prefixes(routes))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.routes = routes
}

// watchRanges follows the cluster as nodes come and go.
func (t *tunnel) watchRanges(changed func(ctx context.Context, found []kube.Route)) {
	t.background("watch of ranges", func(ctx context.Context) error {
		return t.cfg.Cluster.WatchCIDRs(ctx, t.hint, func(found []kube.Route) { changed(ctx, found) })
	})
}

// readRoutes reads the cluster's ranges, and fails where this machine uses them.
func (c *Connect) readRoutes(ctx context.Context) error {
	found, err := c.readRanges(ctx)
	if err != nil {
		return err
	}
	existing, err := tun.Existing(slices.Concat(c.beside(ctx), c.aside)...)
	if err != nil {
		return err
	}
	if c.plan.noIPv6 && slices.ContainsFunc(found, func(r kube.Route) bool { return r.Prefix.Addr().Is6() }) {
		c.warn("this machine has no IPv6: the cluster's IPv6 addresses are not reached")
	}
	c.around.partial = c.rights == nil || !c.rights.Everywhere()
	routes, err := c.around.routes(c.routes, existing, false, c.inUse, c.warn)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.routes = routes
	c.mu.Unlock()
	return privileged.CheckRoutes(prefixes(routes))
}

// inUse are the addresses that are, as far as they are known.
func (t *tunnel) inUse(in []netip.Prefix) []netip.Addr {
	if t.names == nil {
		return nil
	}
	return t.names.Zone().Addresses(in)
}

// ErrConnected says that a session for the same namespace runs on this machine.
var ErrConnected = errors.New("connected already")

// twice fails where one does, unless it is to be looked past.
func (c *Connect) twice(ctx context.Context) error {
	all, err := Statuses(ctx)
	if err != nil {
		return err
	}
	for _, s := range all {
		if s.Kind == KindConnect && s.Server == c.cfg.Cluster.Server && s.Namespace == c.cfg.Cluster.Namespace && !slices.Contains(c.aside, s.Device.Name) {
			return fmt.Errorf("%w to %s, namespace %s, by process %d", ErrConnected, s.Context, s.Namespace, s.PID)
		}
	}
	return nil
}

// beside are the devices of other sessions to the same cluster, for other
// namespaces: their routes lead where ours are to. One that is too busy to answer is
// taken for what it was.
func (c *Connect) beside(ctx context.Context) (devices []string) {
	all, silent, err := askAll(ctx)
	if err != nil {
		c.log.Debug("other sessions are not known", "error", err)
	}
	now := map[string]string{}
	for _, name := range silent {
		if device, known := c.others[name]; known {
			now[name] = device
		}
	}
	for _, s := range all {
		if s.Kind == KindConnect && s.Device != nil && s.Server == c.cfg.Cluster.Server && s.Namespace != c.cfg.Cluster.Namespace {
			now[s.answered] = s.Device.Name
		}
	}
	c.others = now
	return slices.Collect(maps.Values(now))
}

var errNoRanges = errors.New("no address range of the cluster could be found: name them with --include")

func (c *Connect) openDevice(ctx context.Context) (string, error) {
	if err := c.readRoutes(ctx); err != nil {
		return "", err
	}
	wanted := c.plan.routes(c.found) // of some only what is in use will be routed
	if len(wanted) == 0 {
		return "", errNoRanges
	}
	if err := c.openTUN(ctx, prefixes(slices.Concat(wanted, c.routes)), reached{c.keep, &c.around, c.vacant}, c.routed); err != nil {
		return "", err
	}
	close(c.deviceUp)
	return fmt.Sprintf("device %s up", c.device.Name()), nil
}

// setRoutes leads to the cluster what is the cluster's, and looks at once
// whether the way that the tunnel itself takes is still there.
func (c *Connect) setRoutes(ctx context.Context) (string, error) {
	if err := c.lead(ctx); err != nil {
		return "", err
	}
	alive, cancel := context.WithTimeout(ctx, apiAlive)
	defer cancel()
	if _, err := c.cfg.Cluster.Check(alive); err != nil {
		return "", fmt.Errorf("with the routes set, the API server was not reached any more: %w", err)
	}
	result := fmt.Sprintf("%d routes lead to %s", len(c.routes), c.device.Name())
	c.watchRanges(c.rangesChanged)
	c.background("routes", func(ctx context.Context) error { return follow(ctx, c.moved, c.log, c.leadAnew) })
	c.background("watch of routes", func(ctx context.Context) error { return tun.Watch(ctx, c.tellMoved) })
	return result, nil
}

// lead sets the routes to what was found.
func (c *Connect) lead(ctx context.Context) error {
	c.leading.Lock()
	defer c.leading.Unlock()
	existing, err := tun.Existing(append(c.beside(ctx), c.device.Name())...)
	if err != nil {
		return err
	}
	c.mu.Lock()
	wanted := c.plan.routes(c.found)
	c.mu.Unlock()
	routes, err := c.around.routes(wanted, existing, true, c.inUse, c.warn)
	if err == nil {
		err = c.leadHere(ctx, prefixes(routes))
	}
	if err != nil {
		return err
	}
	c.setRanges(routes)
	c.tellZones()
	return nil
}

// follow leads anew where this machine has moved to another network, or something else
// says so: a VPN has come up, the kernel has dropped routes, addresses begin to be used.
func follow(ctx context.Context, moved <-chan struct{}, log *slog.Logger, lead func(context.Context) error) error {
	return settled(ctx, moved, func() bool {
		err := lead(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
			log.Info("routes do not follow yet", "error", err)
		}
		return err == nil
	})
}

// leadAnew is lead where the machine is now. Names may have to be asked there for the API
// server, and not through the tunnel.
func (c *Connect) leadAnew(ctx context.Context) error {
	c.cfg.Cluster.Moved()
	if err := errors.Join(c.pinNameservers(), c.lead(ctx)); err != nil {
		return err
	}
	others, err := c.pinServers(ctx)
	if err == nil && others {
		err = c.lead(ctx)
	}
	return err
}

// rangesChanged leads there what is the cluster's now.
func (c *Connect) rangesChanged(ctx context.Context, found []kube.Route) {
	c.mu.Lock()
	c.found = found
	c.mu.Unlock()
	c.tellMoved()
	c.stock.look()
}
