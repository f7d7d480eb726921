package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// ConnectConfig is what "culvert connect" is asked for.
type ConnectConfig struct {
	Cluster *kube.Cluster

	FarEnd

	Endpoint string // where the wire goes past the API server, as kube.Path has it

	// Include and Exclude are added to, and cut out of, what is found.
	Include, Exclude []netip.Prefix

	Reporter Reporter
	Stderr   io.Writer // for what the privileged child says
	Log      *slog.Logger
}

// A FarEnd is what runs in the cluster for a session, and how it is reached.
type FarEnd struct {
	Image       string
	PullSecrets []string
	Way         kube.Way      // "" is the best that works
	Wire        wires.Wire    // "" is the best
	Grace       time.Duration // how long it outlives this machine's silence
}

// path is how it is dialled.
func (f FarEnd) path() kube.Path { return pathTo(f.Way, f.Wire) }

// A Connect joins this machine to the cluster's network, until it is told to
// stop.
type Connect struct {
	course
	cfg ConnectConfig

	rights *kube.Rights
	keys   keys
	shadow *kube.Shadow
	keep   *channel.Keep
	far    shadow.Info // as it was when the wire was first open
	plan   routePlan
	hint   kube.Hint
	child  *privileged.Child
	device *privileged.Device
	stack  *netstack.Stack
	names  *dns.Server

	mu     sync.Mutex // guards what changes while it runs
	routes []RouteStatus
	naming naming
	mode   resolver.Mode // how the OS was told of names; none before that
	seen   sinkState

	zonesChanged chan struct{}
}

// NewConnect starts nothing.
func NewConnect(cfg ConnectConfig) *Connect {
	cfg.Wire = cmp.Or(cfg.Wire, wires.TLS)
	return &Connect{course: newCourse(cfg.Reporter, cfg.Log), cfg: cfg, zonesChanged: make(chan struct{}, 1)}
}

// steps are the way up.
func (c *Connect) steps() []step {
	return []step{
		{"asking the cluster", c.askCluster},
		{"checking rights", c.checkRights},
		{"finding routes", c.findRoutes},
		{"asking for root", c.startChild},
		// Above this line all fails for free, below it things change.
		{"making the shadow", c.createShadow},
		{"waiting for the shadow pod", c.awaitShadow},
		{"opening the wire", c.openWire},
		{"making the device", c.openDevice},
		{"reading names", c.serveNames},
		{"setting routes", c.setRoutes},
		{"telling the resolver", c.setResolver},
		{"listening for status", c.tellStatus},
	}
}

// Run connects and blocks until ctx ends or the session cannot go on, and then
// puts everything back. It returns nil when it was told to stop and nothing is
// left; what could not be put back is marked ErrLeft.
func (c *Connect) Run(ctx context.Context) error { return c.course.run(ctx, c.steps()) }

func (c *Connect) askCluster(ctx context.Context) (string, error) {
	return askCluster(ctx, c.cfg.Cluster)
}

func askCluster(ctx context.Context, k *kube.Cluster) (string, error) {
	version, err := k.Check(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("cluster %s, namespace %s, Kubernetes %s", k.Context, k.Namespace, version), nil
}

func (c *Connect) checkRights(ctx context.Context) (result string, err error) {
	c.rights, err = c.preflight(ctx, c.cfg.Cluster, kube.Connect)
	return "rights checked", err
}

func (c *Connect) startChild(ctx context.Context) (string, error) {
	child, err := privileged.Start(ctx, privileged.Config{Stderr: c.cfg.Stderr})
	if err != nil {
		return "", err
	}
	c.child = child
	c.undo.add("end the privileged child", func(context.Context) error { return child.Close() })
	c.background("privileged child", func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case <-child.Done():
			return errors.New("it was killed, and with it went routes and resolver settings")
		}
	})
	return "privileged child ready", nil
}
