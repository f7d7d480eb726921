package session

import (
	"cmp"
	"context"
	"io"
	"net/netip"
	"sync"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// ConnectConfig is what "culvert connect" is asked for.
type ConnectConfig struct {
	TunnelConfig

	// StockClient, if set, gets the configuration of a WireGuard client, as wg-quick
	// reads it, that reaches the cluster while the session lasts. It needs an Endpoint.
	StockClient io.Writer

	// Include and Exclude are added to, and cut out of, what is found.
	Include, Exclude []netip.Prefix

	// Conflict is what to do where this machine's network has addresses of the cluster's;
	// "" is tun.Either.
	Conflict tun.Avoid

	// Up is called once the machine is connected; an error ends the session. It may be nil.
	Up func() error

	// HowToEnd is said when it is connected: "Ctrl-C".
	HowToEnd string

	Stderr io.Writer // for what the privileged child says
}

// A Connect joins this machine to the cluster's network, until it is told to
// stop.
type Connect struct {
	*tunnel
	machine
	cfg ConnectConfig

	stock  stock
	aside  []string          // devices of other sessions, which are not in the way
	others map[string]string // devices of those to the same cluster, by where they answer
	pins   pins              // guarded by mu

	leading      sync.Mutex    // held while routes are set
	deviceUp     chan struct{} // closed when it is, and all routes are known
	zonesChanged chan struct{}
}

// NewConnect starts nothing.
func NewConnect(cfg ConnectConfig) *Connect {
	c := &Connect{tunnel: newTunnel(cfg.TunnelConfig, kube.Connect), cfg: cfg, stock: newStock(cfg.StockClient), deviceUp: make(chan struct{}), zonesChanged: make(chan struct{}, 1)}
	c.machine = machine{of: &c.course, stderr: cfg.Stderr}
	c.isUp, c.lend = cfg.Up, c.lends
	c.around.how = cmp.Or(cfg.Conflict, tun.Either)
	c.past.avoid, c.past.device = c.routed, func() []netip.Addr { return c.device.Addrs }
	if cfg.StockClient != nil && c.path.Only == "tcp" {
		c.path.Only = ""
	}
	return c
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
		{"listening for status", c.listenForStatus}, // before others see our routes
		{"setting routes", c.setRoutes},
		{"telling the resolver", c.setResolver},
		{"letting a WireGuard client in", c.admitStock},
		{"connecting", c.connected},
	}
}

// Run connects and blocks until ctx ends or the session cannot go on, and then
// puts everything back. It returns nil when it was told to stop and nothing is
// left; what could not be put back is marked ErrLeft.
func (c *Connect) Run(ctx context.Context) error { return c.course.run(ctx, c.steps()) }

func (c *Connect) openWire(ctx context.Context) (string, error) {
	result, err := c.open(ctx, c.dialDirect, c.wireChanged)
	if err == nil {
		c.warnOfPing()
	}
	return result, err
}

// dialDirect dials the shadow past the API server, when it is known what leads through
// the tunnel.
func (c *Connect) dialDirect(ctx context.Context) (channel.Channel, error) {
	select {
	case <-c.deviceUp:
		return c.tunnel.dialDirect(ctx)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *Connect) wireChanged(s channel.KeepState) {
	if s.Up {
		c.stock.look() // the shadow may be another one, or what leads to it
	}
	c.tunnel.wireChanged(s)
}
