package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// PortForwardConfig is what "culvert forward" is asked for.
type PortForwardConfig struct {
	TunnelConfig

	Mappings  []Mapping
	Addresses []string  // of this machine, to listen at
	Out       io.Writer // gets a line for each port, when it leads there
}

// A PortForward has ports of this machine lead into the cluster, until it is told to
// stop. Each connection is dialled when it comes, so that it ends neither with a pod nor
// with the wire.
type PortForward struct {
	*tunnel
	cfg   PortForwardConfig
	gates []*gate
}

// A gate is where one Mapping leads, and the ports that do.
type gate struct {
	Mapping
	port      kube.ServicePort // of the target
	behind    *pods            // nil: a name is dialled
	listeners []net.Listener
	to        channel.Network
	host      string
	failing   atomic.Bool // said
	say       func(string)
}

// pods are those that answer for a target now.
type pods struct {
	backend *kube.Backend
	mu      sync.Mutex
	there   []kube.Place
}

// NewPortForward starts nothing.
func NewPortForward(cfg PortForwardConfig) *PortForward {
	return &PortForward{tunnel: newTunnel(cfg.TunnelConfig, kube.Forward), cfg: cfg}
}

// Run forwards and blocks until ctx ends or it cannot go on, and then puts everything
// back.
func (f *PortForward) Run(ctx context.Context) error {
	return f.course.run(ctx, []step{
		{"asking the cluster", f.askCluster},
		{"checking rights", f.checkRights},
		{"finding what is forwarded to", f.findBackends},
		{"listening", f.openGates},
		// Above this line all fails for free, below it things change.
		{"making the shadow", f.shareShadow},
		{"waiting for the shadow pod", f.awaitShadow},
		{"opening the wire", f.openWire},
		{"forwarding", f.forward},
		{"listening for status", f.tellStatus},
	})
}

// findBackends finds each target once, and the port of it that each Mapping names.
func (f *PortForward) findBackends(ctx context.Context) (string, error) {
	found := map[kube.Target]*pods{}
	for _, m := range f.cfg.Mappings {
		g := &gate{Mapping: m, host: m.Host, say: f.reporter.Say}
		f.gates = append(f.gates, g)
		if m.Host != "" {
			n, _ := portNumber(m.Port) // it was parsed as one
			g.port = kube.PodPort(m.Network, n)
			continue
		}
		p := found[m.Target]
		if p == nil {
			b, err := f.cfg.Cluster.FindBackend(ctx, m.Target)
			if err != nil {
				return "", err
			}
			p = &pods{backend: b}
			found[m.Target] = p
		}
		var err error
		if g.port, err = m.port(p.backend); err != nil {
			return "", err
		}
		if g.host = p.backend.Host; g.host == "" {
			g.behind = p
		}
	}
	return "", nil
}

// openGates listens. Who connects earlier than it leads somewhere waits.
func (f *PortForward) openGates(ctx context.Context) (string, error) {
	f.undo.add("close the ports", f.closeGates)
	for _, g := range f.gates {
		if err := g.listen(ctx, f.cfg.Addresses); err != nil {
			return "", err
		}
	}
	return "", nil
}

// listen takes the same port of every address.
func (g *gate) listen(ctx context.Context, addresses []string) error {
	local := g.Local
	if local == "" {
		local = strconv.Itoa(g.port.Port)
	}
	for _, a := range addresses {
		l, err := (&channel.Host{}).Listen(ctx, g.Network, net.JoinHostPort(a, local))
		switch {
		case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, syscall.EACCES):
			return fmt.Errorf("forward to %s: %w: name another local port, or none, as :%s, for any that is free", g, err, g.Port)
		case err != nil:
			return fmt.Errorf("forward to %s: %w", g, err)
		}
		g.listeners = append(g.listeners, l)
		_, local, _ = net.SplitHostPort(l.Addr().String())
	}
	return nil
}

func (f *PortForward) closeGates(context.Context) error {
	for _, g := range f.gates {
		for _, l := range g.listeners {
			l.Close()
		}
	}
	return nil
}

// forward joins what comes to what is dialled for it.
func (f *PortForward) forward(ctx context.Context) (string, error) {
	if err := f.watchBackends(ctx); err != nil {
		return "", err
	}
	f.undo.add("close the ports", f.closeGates) // before the wire
	_, domain := clusterDNS(f.cfg.Cluster.Namespace, f.far.ResolvConf)
	for _, g := range f.gates {
		g.to = f.keep
		if g.Host == "" && g.host != "" {
			g.host += "." + domain + "." // as it is: no search list
		}
		for _, l := range g.listeners {
			f.background("port "+l.Addr().String(), func(ctx context.Context) error {
				return relay.Forward(ctx, l, g, g.Network, "")
			})
			if _, err := fmt.Fprintf(f.cfg.Out, "forwarding %s -> %s\n", l.Addr(), g); err != nil {
				f.log.Debug("not told", "error", err)
			}
		}
	}
	return "", nil
}

// watchBackends follows the pods that answer, and waits until they are known.
func (f *PortForward) watchBackends(ctx context.Context) error {
	var all []*pods
	for _, g := range f.gates {
		if g.behind == nil || slices.Contains(all, g.behind) {
			continue
		}
		p := g.behind
		all = append(all, p)
		known := make(chan struct{})
		tell := sync.OnceFunc(func() { close(known) })
		f.background("watch of pods", func(ctx context.Context) error {
			return f.cfg.Cluster.WatchBackend(ctx, p.backend, func(there []kube.Place) { p.set(there); tell() })
		})
		select {
		case <-known:
		case <-ctx.Done():
			return ctx.Err()
		}
		if len(p.get()) == 0 {
			f.warn(fmt.Sprintf("no pod of %s is ready: connections are refused until one is", targetWord(g.Target)))
		}
	}
	return nil
}

func (p *pods) set(there []kube.Place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.there = there
}

// get is in an order of its own each time.
func (p *pods) get() []kube.Place {
	p.mu.Lock()
	defer p.mu.Unlock()
	there := slices.Clone(p.there)
	rand.Shuffle(len(there), func(i, j int) { there[i], there[j] = there[j], there[i] })
	return there
}

const (
	gateDial = 30 * time.Second // with a wire that is being opened again
	gatePods = 3                // that are tried, of those that should answer
)

// DialContext dials what the gate leads to now, whatever address is asked for. The first
// failure of several is told.
func (g *gate) DialContext(ctx context.Context, network, _ string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, gateDial)
	defer cancel()
	c, err := g.dial(ctx, network)
	switch {
	case err == nil:
		g.failing.Store(false)
	case !errors.Is(ctx.Err(), context.Canceled) && g.failing.CompareAndSwap(false, true):
		g.say(fmt.Sprintf("a connection to %s failed: %v", g, err))
	}
	return c, err
}

func (g *gate) dial(ctx context.Context, network string) (net.Conn, error) {
	if g.behind == nil {
		return g.to.DialContext(ctx, network, net.JoinHostPort(g.host, strconv.Itoa(g.port.Target)))
	}
	there := g.behind.get()
	if len(there) == 0 {
		return nil, fmt.Errorf("no pod is ready: %w", syscall.ECONNREFUSED)
	}
	var first error
	for _, p := range there[:min(len(there), gatePods)] {
		c, err := g.to.DialContext(ctx, network, net.JoinHostPort(p.Addr.String(), strconv.Itoa(p.PortOf(g.port))))
		if err == nil {
			return c, nil
		}
		if first == nil {
			first = fmt.Errorf("pod %s: %w", p.Pod, err)
		}
	}
	return nil, first
}

// ForwardTo has ports of this machine lead to hosts of another Network than a cluster's
// until ctx ends, and returns net.ErrClosed then. Nothing but its Mappings, Addresses, Out and Reporter is of cfg.
func ForwardTo(ctx context.Context, hosts channel.Network, cfg PortForwardConfig) error {
	f := &PortForward{cfg: cfg}
	defer f.closeGates(ctx)
	for _, m := range cfg.Mappings {
		n, _ := portNumber(m.Port) // it was parsed as one
		g := &gate{Mapping: m, port: kube.PodPort(m.Network, n), host: m.Host, to: hosts, say: cfg.Reporter.Say}
		f.gates = append(f.gates, g)
		if err := g.listen(ctx, cfg.Addresses); err != nil {
			return err
		}
	}
	all, ctx := errgroup.WithContext(ctx)
	for _, g := range f.gates {
		for _, l := range g.listeners {
			all.Go(func() error { return relay.Forward(ctx, l, g, g.Network, "") })
			fmt.Fprintf(cfg.Out, "forwarding %s -> %s\n", l.Addr(), g)
		}
	}
	return all.Wait()
}

func (f *PortForward) status() Status {
	s := f.statusAs("forward")
	for _, g := range f.gates {
		for _, l := range g.listeners {
			s.Listening = append(s.Listening, ListenStatus{Network: g.Network, Address: l.Addr().String(), For: g.String()})
		}
	}
	return s
}
