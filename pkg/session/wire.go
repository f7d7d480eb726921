package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// firstWire bounds the first opening of the wire. Later ones are tried for as
// long as the session lives.
const firstWire = 45 * time.Second

// keys are made for one session and kept in memory; the shadow's half is in a
// Secret of the session.
type keys struct {
	laptop                  wires.Keys
	laptopKey, laptopPublic []byte
	shadowKey, shadowPublic []byte
}

func newKeys(session string) (k keys, err error) {
	laptopKey, laptopPublic, err := sshchan.GenerateKey("culvert " + session + " laptop")
	if err != nil {
		return k, err
	}
	shadowKey, shadowPublic, err := sshchan.GenerateKey("culvert " + session + " shadow")
	if err != nil {
		return k, err
	}
	laptop, err := wires.ParseKeys(laptopKey, shadowPublic)
	return keys{laptop, laptopKey, laptopPublic, shadowKey, shadowPublic}, err
}

// pathTo is how a shadow is dialled that is to serve a wire.
func pathTo(way kube.Way, wire wires.Wire) kube.Path {
	return kube.Path{Way: way, Upgrade: wire.Upgrade()}
}

func (c *Connect) createShadow(ctx context.Context) (string, error) {
	var err error
	if c.keys, err = newKeys(c.id); err != nil {
		return "", err
	}
	to := c.cfg.path()
	to.Endpoint = c.cfg.Endpoint
	c.shadow = c.cfg.Cluster.NewShadow(kube.ShadowConfig{
		Session: c.id, Image: c.cfg.Image, PullSecrets: c.cfg.PullSecrets, Grace: c.cfg.Grace, Path: to,
		HostKey: c.keys.shadowKey, AuthorizedKey: c.keys.laptopPublic,
	}, c.rights)
	c.undo.add("remove the shadow", c.shadow.Delete)
	if err := c.shadow.Create(ctx, c.warn); err != nil {
		return "", err
	}
	c.background("lease", c.shadow.Renew)
	return fmt.Sprintf("shadow made, as a %s", c.shadow.Mode()), nil
}

func (c *Connect) awaitShadow(ctx context.Context) (string, error) {
	return "shadow pod ready", c.shadow.WaitReady(ctx, c.cfg.Reporter.Progress)
}

func (c *Connect) openWire(ctx context.Context) (string, error) {
	how := channel.KeepConfig{Open: c.dialWire, Beside: c.dialBeside, OnState: c.wireChanged}
	if c.cfg.Endpoint != "" {
		how.Better = c.dialDirect
	}
	c.keep = c.keepOpen(how)
	if err := ready(ctx, c.keep); err != nil {
		return "", fmt.Errorf("open the wire to the shadow: %w", err)
	}
	info, err := shadow.Ask(ctx, c.keep)
	if err != nil {
		return "", err
	}
	c.learn(info)
	return fmt.Sprintf("wire open: %s through %s", c.cfg.Wire, c.shadow.Way()), nil
}

// keepOpen keeps a wire open until that is undone.
func (c *course) keepOpen(how channel.KeepConfig) *channel.Keep {
	how.OpenTimeout, how.Age, how.Log = reopenLimit, wireAge, c.log
	keep := channel.NewKeep(how)
	c.background("wire", keep.Run)
	c.undo.add("close the wire", func(context.Context) error {
		err := keep.Close()
		keep.Wait() // nobody makes a shadow any more
		return err
	})
	return keep
}

// ready waits for the first wire.
func ready(ctx context.Context, keep *channel.Keep) error {
	ctx, cancel := context.WithTimeout(ctx, firstWire)
	defer cancel()
	err := keep.Ready(ctx)
	if why := keep.State().Err; why != nil && errors.Is(err, context.DeadlineExceeded) {
		return why
	}
	return err
}

// learn takes what the shadow's pod knows without any right.
func (c *Connect) learn(info shadow.Info) {
	c.far = info
	c.hint = kube.Hint{Pods: info.Addresses}
	if ns := info.ResolvConf.Nameservers; len(ns) > 0 {
		c.hint.Services = ns[:1]
	}
	if !info.Ping.V4 {
		c.warn("the shadow may not send echo requests here, so ping does not reach the cluster")
	}
}

// wireAge is less than the hour after which some managed clusters end a connection.
const wireAge = 45 * time.Minute

// reopenLimit bounds one opening of the wire, with a new shadow at worst.
const reopenLimit = 2 * time.Minute

func (c *Connect) dialWire(ctx context.Context) (channel.Channel, error) {
	wire, err := c.dialBeside(ctx)
	if !errors.Is(err, kube.ErrGone) {
		return wire, err
	}
	c.cfg.Reporter.Say("the shadow is gone, making another")
	conn, err := c.dialNewShadow(ctx)
	if err != nil {
		return nil, err
	}
	return c.wireOver(ctx, conn)
}

func (c *Connect) wireOver(ctx context.Context, conn net.Conn) (channel.Channel, error) {
	return c.cfg.Wire.Dial(ctx, conn, wires.Config{Keys: c.keys.laptop, Log: c.cfg.Log})
}

// dialBeside dials the same shadow while the wire to it is silent. Should that
// be gone, it is for dialWire to make another.
func (c *Connect) dialBeside(ctx context.Context) (channel.Channel, error) {
	conn, _, err := c.shadow.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return c.wireOver(ctx, conn)
}

// dialDirect dials the shadow past the API server.
func (c *Connect) dialDirect(ctx context.Context) (channel.Channel, error) {
	conn, err := c.shadow.DialDirect(ctx, c.routed)
	if err != nil {
		return nil, err
	}
	return c.wireOver(ctx, conn)
}

// routed tells of addresses that the wire itself may not use.
func (c *Connect) routed(a netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.routes, func(r RouteStatus) bool { return r.Prefix.Contains(a) })
}

// dialNewShadow makes the shadow again: it ends itself when this machine was
// silent for the grace time, as after a sleep.
func (c *Connect) dialNewShadow(ctx context.Context) (net.Conn, error) {
	if err := c.shadow.Delete(ctx); err != nil {
		return nil, err
	}
	if err := c.shadow.Create(ctx, c.warn); err != nil {
		return nil, err
	}
	if err := c.shadow.WaitReady(ctx, nil); err != nil {
		return nil, err
	}
	conn, _, err := c.shadow.Dial(ctx)
	return conn, err
}

// wireChanged tells the person when the wire goes, and when it is back.
func (c *Connect) wireChanged(s channel.KeepState) {
	switch {
	case c.gctx.Err() != nil:
	case !s.Up:
		c.cfg.Reporter.Say(fmt.Sprintf("the wire is down, opening it again: %v", s.Err))
	case s.Better:
		c.cfg.Reporter.Say(fmt.Sprintf("the wire goes past the API server now, through %s", c.shadow.Way()))
	case s.Reopened > 0 && !s.Renewed:
		c.cfg.Reporter.Say(fmt.Sprintf("the wire is open again: %s through %s", c.cfg.Wire, c.shadow.Way()))
	}
}

// clusterDNS is where pods ask for names, and the domain these end in.
func clusterDNS(namespace string, r shadow.ResolvConf) (server netip.AddrPort, domain string) {
	if len(r.Nameservers) > 0 {
		server = netip.AddrPortFrom(r.Nameservers[0], 53)
	}
	for _, s := range r.Search {
		if d, ok := strings.CutPrefix(s, namespace+".svc."); ok {
			return server, strings.TrimSuffix(d, ".")
		}
	}
	return server, "cluster.local"
}
