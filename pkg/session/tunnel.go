package session

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// TunnelConfig is what every verb is asked for that reaches the cluster.
type TunnelConfig struct {
	Cluster *kube.Cluster

	FarEnd

	// As, if set, is a domain of this machine's for the cluster's names: web.shop.staging.
	As string

	Reporter Reporter
	Log      *slog.Logger
}

// A FarEnd is what runs in the cluster for a session, and how it is reached.
type FarEnd struct {
	Image       string
	PullSecrets []string
	Way         kube.Way      // "" is the best that works
	Wire        wires.Wire    // "" is the best
	Endpoint    string        // where the wire goes past the API server, as kube.Path has it
	Grace       time.Duration // how long it outlives this machine's silence
}

// path is how it is dialled.
func (f FarEnd) path() kube.Path {
	p := kube.Path{Way: f.Way, Upgrade: f.stream().Upgrade(), Endpoint: f.Endpoint, Only: "tcp"}
	if f.Wire == wires.WireGuard {
		p.Only = "udp"
	}
	return p
}

// stream is what is spoken over a byte stream.
func (f FarEnd) stream() wires.Wire { return streamOf(f.Wire) }

// A tunnel is the cluster's side of every verb that reaches into it: the shadow, a wire
// there, and what is known of the cluster's names and ranges. It changes nothing on this
// machine; who lets programs into it does that.
type tunnel struct {
	course
	cfg  TunnelConfig
	need kube.Need
	mode kube.Mode // of a shadow that it makes; "" is what the rights allow
	path kube.Path

	rights   *kube.Rights
	foothold atomic.Pointer[foothold]
	leased   sync.Once // the lease is being renewed
	keep     *channel.Keep
	past     *direct
	far      shadow.Info // as it was when the wire was first open
	hint     kube.Hint
	plan     routePlan
	names    *dns.Server
	only     bool // names that are not the cluster's are nobody's
	around   around

	moved chan struct{} // for what the routes depend on

	mu     sync.Mutex // guards what changes while it runs
	found  []kube.Route
	routes []RouteStatus
	naming naming
	seen   sinkState
}

func newTunnel(cfg TunnelConfig, need kube.Need) *tunnel {
	t := &tunnel{course: newCourse(cfg.Reporter, cfg.Log), cfg: cfg, need: need, path: cfg.path(), moved: make(chan struct{}, 1)}
	t.past = &direct{wire: cfg.Wire, say: cfg.Reporter.Say, log: cfg.Log, keep: func() channel.Network { return t.keep }}
	return t
}

func (t *tunnel) askCluster(ctx context.Context) (string, error) {
	return askCluster(ctx, t.cfg.Cluster)
}

func askCluster(ctx context.Context, k *kube.Cluster) (string, error) {
	version, err := k.Check(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("cluster %s, namespace %s, Kubernetes %s", k.Context, k.Namespace, version), nil
}

func (t *tunnel) checkRights(ctx context.Context) (result string, err error) {
	t.rights, err = t.preflight(ctx, t.cfg.Cluster, t.need)
	return "rights checked", err
}

// readNames reads names and ranges where no device is there to lead to them.
func (t *tunnel) readNames(ctx context.Context) (string, error) {
	if _, err := t.readRanges(ctx); err != nil {
		return "", err
	}
	result := fmt.Sprintf("names read, and %d ranges", len(t.routes))
	t.makeNames(netip.Addr{})
	t.watchRanges(func(_ context.Context, found []kube.Route) { t.setRanges(t.plan.routes(found)) })
	return result, t.watchNames(ctx, func() {})
}
