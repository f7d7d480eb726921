package session

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
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

	Image       string
	PullSecrets []string
	Way         kube.Way // "" is the best that works

	// Grace is how long the shadow outlives the laptop's silence.
	Grace time.Duration

	// Include and Exclude are added to, and cut out of, what is found.
	Include, Exclude []netip.Prefix

	Reporter Reporter
	Stderr   io.Writer // for what the privileged child says
	Log      *slog.Logger
}

// A Connect joins this machine to the cluster's network, until it is told to
// stop.
type Connect struct {
	cfg    ConnectConfig
	id     string
	since  time.Time
	undo   undo
	group  *errgroup.Group // everything that runs beside the steps
	gctx   context.Context // ends when one of these fails, or on the way down
	cancel context.CancelFunc

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
	warned []string

	zonesChanged chan struct{}
}

// NewConnect starts nothing.
func NewConnect(cfg ConnectConfig) *Connect {
	id := make([]byte, 4)
	rand.Read(id) // never fails
	return &Connect{
		cfg: cfg, id: hex.EncodeToString(id), since: time.Now(),
		zonesChanged: make(chan struct{}, 1),
	}
}

type step struct {
	name string
	do   func(ctx context.Context) (result string, err error)
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
func (c *Connect) Run(ctx context.Context) error {
	gctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c.cancel = cancel
	c.group, c.gctx = errgroup.WithContext(gctx)
	err := c.up(ctx)
	if err == nil {
		err = c.stay(ctx)
	}
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, c.down(ctx))
}

// up takes the steps. What runs beside them and fails ends them.
func (c *Connect) up(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(c.gctx, func() { stop(context.Cause(c.gctx)) })()
	for _, s := range c.steps() {
		c.cfg.Reporter.Begin(s.name)
		result, err := s.do(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		c.cfg.Reporter.Done(result)
	}
	return nil
}

// stay waits until somebody wants to stop or something cannot go on.
func (c *Connect) stay(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-c.gctx.Done():
		return context.Cause(c.gctx)
	}
}

// down undoes what was done and ends what runs.
func (c *Connect) down(ctx context.Context) error {
	changed := len(c.undo.steps) > 0
	if changed {
		c.cfg.Reporter.Begin("putting everything back")
	}
	left := c.undo.run(ctx)
	c.cancel()
	_ = c.group.Wait() // the first error has been told, the others follow from the undo
	if changed && left == nil {
		c.cfg.Reporter.Done("this machine and the cluster are as before")
	}
	return left
}

// background runs what lives as long as the session. That it ends with ctx is
// no error; that it ends otherwise ends the session.
func (c *Connect) background(what string, run func(ctx context.Context) error) {
	c.group.Go(func() error {
		err := run(c.gctx)
		if c.gctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = net.ErrClosed
		}
		return fmt.Errorf("%s: %w", what, err)
	})
}

// warn says a line once.
func (c *Connect) warn(line string) {
	c.mu.Lock()
	for _, w := range c.warned {
		if w == line {
			c.mu.Unlock()
			return
		}
	}
	c.warned = append(c.warned, line)
	c.mu.Unlock()
	c.cfg.Reporter.Warn(line)
}

func (c *Connect) askCluster(ctx context.Context) (string, error) {
	version, err := c.cfg.Cluster.Check(ctx)
	if err != nil {
		return "", err
	}
	k := c.cfg.Cluster
	return fmt.Sprintf("cluster %s, namespace %s, Kubernetes %s", k.Context, k.Namespace, version), nil
}

func (c *Connect) checkRights(ctx context.Context) (string, error) {
	rights, err := c.cfg.Cluster.Preflight(ctx)
	if err != nil {
		return "", err
	}
	if err := rights.Err(); err != nil {
		return "", err
	}
	c.rights = rights
	for _, n := range rights.Notices {
		c.warn(n)
	}
	return "rights checked", nil
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
