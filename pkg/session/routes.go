package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// deviceMTU is that of a device which is only ever between the kernel and this
// process: nothing is fragmented there, and large packets are cheap.
const deviceMTU = 65535

// apiAlive is how long the API server may take to answer when the routes are set.
const apiAlive = 3 * time.Second

// findRoutes refuses before anything is changed. What only the shadow can tell
// comes to it in openDevice.
func (c *Connect) findRoutes(ctx context.Context) (string, error) {
	c.plan = routePlan{include: c.cfg.Include, exclude: c.cfg.Exclude, noIPv6: !tun.HasIPv6()}
	if err := c.pin(ctx); err != nil {
		return "", err
	}
	if err := c.readRoutes(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d routes found, none in the way of this machine's own", len(c.routes)), nil
}

// pin keeps out of the tunnel what the tunnel itself needs: the API server, and
// the nameservers that its name may be asked of.
func (c *Connect) pin(ctx context.Context) error {
	pinned, err := c.cfg.Cluster.ServerAddrs(ctx)
	if err != nil {
		return err
	}
	var ours netip.Addr
	if c.device != nil {
		ours = c.device.Addrs[0]
	}
	upstreams, err := resolver.New(resolver.Config{Log: c.cfg.Log}).Upstreams(ours)
	if err != nil {
		return err
	}
	for _, u := range upstreams {
		pinned = append(pinned, u.Addr())
	}
	endpoint, err := c.endpointAddrs(ctx)
	if err != nil {
		return err
	}
	c.plan.pinned = append(pinned, endpoint...)
	return nil
}

// endpointAddrs are those of a host that the person has named.
func (c *Connect) endpointAddrs(ctx context.Context) ([]netip.Addr, error) {
	host := c.cfg.Endpoint
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if host == "" || host == kube.Auto {
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

// readRoutes reads the cluster's ranges, and fails where this machine uses them.
func (c *Connect) readRoutes(ctx context.Context) error {
	found, missing, err := c.cfg.Cluster.CIDRs(ctx, c.hint)
	if err != nil {
		return err
	}
	existing, err := tun.Existing()
	if err != nil {
		return err
	}
	routes := c.plan.routes(found)
	if c.plan.noIPv6 && slices.ContainsFunc(found, func(r kube.Route) bool { return r.Prefix.Addr().Is6() }) {
		c.warn("this machine has no IPv6: the cluster's IPv6 addresses are not reached")
	}
	c.cfg.Log.Debug("routes found", "routes", len(routes), "missing", missing)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.routes = routes
	if err := conflicts(routes, existing); err != nil {
		return err
	}
	return privileged.CheckRoutes(prefixes(routes))
}

func (c *Connect) openDevice(ctx context.Context) (string, error) {
	if err := c.readRoutes(ctx); err != nil {
		return "", err
	}
	if len(c.routes) == 0 {
		return "", errors.New("no address range of the cluster could be found: name them with --include")
	}
	addrs, err := freeAddrs(prefixes(c.routes))
	if err != nil {
		return "", err
	}
	device, err := c.child.OpenTUN(ctx, privileged.TUN{MTU: deviceMTU, Addrs: addrs})
	if err != nil {
		return "", err
	}
	c.device = device
	c.undo.add("restore this machine", func(context.Context) error {
		return errors.Join(c.child.Close(), device.Close())
	})
	c.stack, err = netstack.New(netstack.Config{Device: device, MTU: deviceMTU, Network: c.keep, Log: c.cfg.Log})
	if err != nil {
		return "", err
	}
	c.background("network stack", c.stack.Run)
	return fmt.Sprintf("device %s up", device.Name()), nil
}

// freeAddrs are addresses for the device: always one of IPv4, for the DNS
// server, and one of IPv6 where that is routed.
func freeAddrs(routes []netip.Prefix) ([]netip.Addr, error) {
	inUse, err := usedPrefixes()
	if err != nil {
		return nil, err
	}
	v4, v6 := tun.FreeAddrs(slices.Concat(routes, inUse))
	if !v4.IsValid() {
		return nil, errors.New("no address is free for the device: every range that could be used is routed elsewhere")
	}
	if v6.IsValid() && has6(routes) && tun.HasIPv6() {
		return []netip.Addr{v4, v6}, nil
	}
	return []netip.Addr{v4}, nil
}

// usedPrefixes are those that this machine has routes to, and its own addresses:
// to that of another session's device there is no route.
func usedPrefixes() ([]netip.Prefix, error) {
	existing, err := tun.Existing()
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, r := range existing {
		all = append(all, r.Dst)
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range own {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			return nil, fmt.Errorf("list addresses: %w", err)
		}
		all = append(all, p)
	}
	return all, nil
}

// setRoutes leads to the cluster what is the cluster's, and looks at once
// whether the way that the tunnel itself takes is still there.
func (c *Connect) setRoutes(ctx context.Context) (string, error) {
	if err := c.child.SetRoutes(ctx, prefixes(c.routes)); err != nil {
		return "", err
	}
	alive, cancel := context.WithTimeout(ctx, apiAlive)
	defer cancel()
	if _, err := c.cfg.Cluster.Check(alive); err != nil {
		return "", fmt.Errorf("with the routes set, the API server was not reached any more: %w", err)
	}
	result := fmt.Sprintf("%d routes lead to %s", len(c.routes), c.device.Name())
	c.background("watch of ranges", func(ctx context.Context) error {
		return c.cfg.Cluster.WatchCIDRs(ctx, c.hint, func(found []kube.Route) { c.rangesChanged(ctx, found) })
	})
	return result, nil
}

// rangesChanged follows the cluster as nodes come and go.
func (c *Connect) rangesChanged(ctx context.Context, found []kube.Route) {
	if err := c.pin(ctx); err != nil { // what was pinned stays so
		c.cfg.Log.Warn("addresses of the API server not read again", "error", err)
	}
	routes, err := c.freeOf(found)
	if err == nil {
		err = c.child.SetRoutes(ctx, prefixes(routes))
	}
	if err != nil {
		c.cfg.Log.Warn("routes do not follow the cluster", "error", err)
		return
	}
	c.names.Zone().SetPrefixes(prefixes(routes))
	c.mu.Lock()
	c.routes = routes
	c.mu.Unlock()
	c.tellZones()
}

// freeOf are the routes to found that are not in the way of this machine's own.
// The others are left out, and told.
func (c *Connect) freeOf(found []kube.Route) ([]RouteStatus, error) {
	existing, err := tun.Existing(c.device.Name())
	if err != nil {
		return nil, err
	}
	var routes []RouteStatus
	for _, r := range c.plan.routes(found) {
		if err := conflicts([]RouteStatus{r}, existing); err != nil {
			c.warn("left out: " + err.Error())
			continue
		}
		routes = append(routes, r)
	}
	return routes, nil
}
