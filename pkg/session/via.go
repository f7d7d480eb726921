package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// ViaConfig is what "culvert connect --via" is asked for.
type ViaConfig struct {
	Destination string         // of ssh
	Ranges      []netip.Prefix // that are reached from there
	Exclude     []netip.Prefix // what of them is not to be

	DNS   netip.AddrPort // of that network, if names are to be asked there
	Zones []string       // whose names are, beside those of addresses in Ranges

	// Up and HowToEnd are those of a Connect.
	Up       func() error
	HowToEnd string

	Reporter Reporter
	Stderr   io.Writer // for what the privileged child says
	Log      *slog.Logger
}

// A Via joins this machine to the network behind an SSH server. Nothing is there but
// that server: it dials what TCP is sent to the ranges, and all else is told that it is
// not reached.
type Via struct {
	course
	machine
	cfg     ViaConfig
	bastion *Bastion
	names   *dns.Server
	plan    routePlan
	routed  chan struct{} // closed when routes are set
	moved   chan struct{} // for what the routes depend on

	leading sync.Mutex // held while routes are set
	mu      sync.Mutex // guards what changes while it runs
	routes  []RouteStatus
}

// NewVia starts nothing.
func NewVia(cfg ViaConfig) *Via {
	v := &Via{course: newCourse(cfg.Reporter, cfg.Log), cfg: cfg, routed: make(chan struct{}), moved: make(chan struct{}, 1)}
	v.restored, v.isUp = "this machine is", cfg.Up
	v.machine = machine{of: &v.course, stderr: cfg.Stderr, unnamed: !cfg.DNS.IsValid()}
	v.bastion = NewBastion(BastionConfig{Destination: cfg.Destination, Reporter: cfg.Reporter, Log: cfg.Log})
	v.bastion.before = v.pinAgain
	return v
}

// Run connects and blocks until ctx ends or the session cannot go on, as that of a
// Connect.
func (v *Via) Run(ctx context.Context) error {
	return v.course.run(ctx, []step{
		{"finding the way", v.findRoutes},
		{"opening the connection of ssh", v.openWire},
		{"asking for root", v.startChild},
		// Above this line all fails for free, below it things change.
		{"making the device", v.openDevice},
		{"answering names", v.serveNames},
		{"setting routes", v.setRoutes},
		{"telling the resolver", v.setResolver},
		{"listening for status", v.tellStatus},
	})
}

func (v *Via) findRoutes(ctx context.Context) (string, error) {
	if err := v.bastion.look(ctx); err != nil {
		return "", err
	}
	v.plan = routePlan{exclude: v.cfg.Exclude, noIPv6: !tun.HasIPv6()}
	if err := v.pin(ctx); err != nil {
		return "", err
	}
	if v.bastion.way.Command {
		v.warn("a ProxyCommand leads to " + v.cfg.Destination + ": if it uses addresses of these ranges, leave them out with --exclude")
	}
	if v.plan.noIPv6 && has6(v.cfg.Ranges) {
		v.warn("this machine has no IPv6: IPv6 addresses are not reached")
	}
	existing, err := tun.Existing()
	if err != nil {
		return "", err
	}
	v.routes = v.wanted()
	if err := conflicts(v.routes, existing); err != nil {
		return "", err
	}
	if len(v.routes) == 0 {
		return "", errors.New("nothing is left of the ranges that could be routed")
	}
	return fmt.Sprintf("%d routes, none in the way of this machine's own", len(v.routes)), privileged.CheckRoutes(prefixes(v.routes))
}

func (v *Via) wanted() []RouteStatus {
	var found []kube.Route
	for _, p := range v.cfg.Ranges {
		found = append(found, kube.Route{Prefix: p, Source: "asked for"})
	}
	return v.plan.routes(found)
}

// pin keeps out of the tunnel what the tunnel itself needs, and what it needed before:
// the way to the server, and the nameservers that its name is asked of.
func (v *Via) pin(ctx context.Context) error {
	_, err := v.pinNameservers()
	_, errHost := v.pinServer(ctx)
	return errors.Join(err, errHost)
}

func (v *Via) pinNameservers() (more bool, err error) {
	all, err := v.nameservers()
	return v.keepOut(all), err
}

func (v *Via) pinServer(ctx context.Context) (more bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, pinLimit)
	defer cancel()
	all, err := v.bastion.Addrs(ctx)
	return v.keepOut(all), err
}

func (v *Via) keepOut(all []netip.Addr) (more bool) {
	for _, a := range all {
		if !slices.Contains(v.plan.pinned, a) {
			v.plan.pinned, more = append(v.plan.pinned, a), true
		}
	}
	return more
}

// pinAgain is before the connection is opened again: the machine may be elsewhere now.
func (v *Via) pinAgain(ctx context.Context) {
	select {
	case <-v.routed:
	default:
		return
	}
	if err := v.lead(ctx); err != nil { // what was pinned stays so
		v.log.Warn("the way to the SSH server was not read again", "error", err)
	}
}

// lead sets the routes as they are right where the machine is now. The server's name may
// have to be asked there, and not through the tunnel.
func (v *Via) lead(ctx context.Context) error {
	v.leading.Lock()
	defer v.leading.Unlock()
	_, unpinned := v.pinNameservers()
	if err := v.route(ctx); err != nil {
		return err
	}
	more, err := v.pinServer(ctx)
	if more {
		err = errors.Join(err, v.route(ctx))
	}
	return errors.Join(unpinned, err)
}

func (v *Via) route(ctx context.Context) error {
	routes := v.wanted()
	if err := v.leadHere(ctx, prefixes(routes)); err != nil {
		return err
	}
	v.mu.Lock()
	v.routes = routes
	v.mu.Unlock()
	return nil
}

func (v *Via) leads(a netip.Addr) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return leads(v.routes, a)
}

func (v *Via) tellMoved() { wake(v.moved) }

func (v *Via) openWire(ctx context.Context) (string, error) {
	if err := v.bastion.Open(ctx); err != nil {
		v.bastion.Close()
		return "", err
	}
	v.undo.add("close the connection of ssh", func(context.Context) error { v.bastion.Close(); return nil })
	v.background("wire", func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-v.bastion.over.Done():
			return context.Cause(v.bastion.over)
		}
	})
	return "wire open: ssh to " + v.cfg.Destination, nil
}

func (v *Via) openDevice(ctx context.Context) (string, error) {
	var network channel.Network = v.bastion
	if v.cfg.DNS.IsValid() {
		network = dns.OverTCP(network, v.cfg.DNS)
	}
	if err := v.openTUN(ctx, prefixes(v.routes), network, v.leads); err != nil {
		return "", err
	}
	return fmt.Sprintf("device %s up", v.device.Name()), nil
}

func (v *Via) serveNames(ctx context.Context) (string, error) {
	if v.unnamed {
		return "", nil
	}
	never := []string{v.bastion.way.Host}
	for _, zone := range v.cfg.Zones { // as the search list makes it
		never = append(never, v.bastion.way.Host+"."+zone)
	}
	v.names = dns.New(dns.Config{
		Plain: true, ExtraZones: v.cfg.Zones, Never: never,
		Cluster: v.bastion, ClusterDNS: v.cfg.DNS, Reached: func() error { return reachedBy(v.bastion.keep) }, Upstream: v.upstreams(v.server, v.tellMoved), Log: v.log,
	})
	v.names.Zone().SetPrefixes(v.cfg.Ranges)
	return v.answerNames(v.names), nil
}

// sshAlive is how long the server may take to answer when the routes are set.
const sshAlive = 10 * time.Second

// setRoutes looks at once whether the way that ssh takes is still there: some
// answer has to come to a dial, be it that nobody listens.
func (v *Via) setRoutes(ctx context.Context) (string, error) {
	if err := v.leadHere(ctx, prefixes(v.routes)); err != nil {
		return "", err
	}
	alive, cancel := context.WithTimeout(ctx, sshAlive)
	defer cancel()
	conn, err := v.bastion.DialContext(alive, "tcp", "127.0.0.1:1")
	if err == nil {
		conn.Close()
	} else if alive.Err() != nil || v.bastion.over.Err() != nil {
		return "", fmt.Errorf("with the routes set, %s was not reached any more: %w", v.cfg.Destination, err)
	}
	close(v.routed)
	v.background("routes", func(ctx context.Context) error { return follow(ctx, v.moved, v.log, v.lead) })
	v.background("watch of routes", func(ctx context.Context) error { return tun.Watch(ctx, v.tellMoved) })
	return fmt.Sprintf("%d routes lead to %s", len(v.routes), v.device.Name()), nil
}

func (v *Via) setResolver(ctx context.Context) (string, error) {
	if v.unnamed {
		return "", nil
	}
	zones := slices.Clone(v.cfg.Zones)
	for _, p := range v.cfg.Ranges {
		zones = append(zones, reverseZones(p)...)
	}
	return v.tellResolver(ctx, resolver.Settings{
		Link: v.device.Name(), LinkIndex: v.device.Index, Server: v.server,
		Search: v.cfg.Zones, Zones: zones[:min(len(zones), maxZones)],
	})
}

func (v *Via) tellStatus(context.Context) (string, error) {
	return fmt.Sprintf("connected by way of %s; %s puts everything back", v.cfg.Destination, v.cfg.HowToEnd), v.listen(v.status)
}

func (v *Via) status() Status {
	s := v.basics(KindVia)
	s.Server = v.cfg.Destination
	s.Wire = wireStatus(v.bastion.keep.State(), "ssh", v.cfg.Destination)
	v.fill(&s)
	if v.unnamed {
		s.DNS = nil
	} else {
		s.DNS.Search, s.DNS.Whole = append([]string{}, v.cfg.Zones...), []string{}
		s.DNS.Remote, s.DNS.Zones = v.cfg.DNS.String(), v.cfg.Zones
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.Routes = slices.Clone(v.routes)
	return s
}
