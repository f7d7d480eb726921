package session

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

func (c *Connect) tellStatus(context.Context) (string, error) {
	l, err := listenStatus(c.id)
	if err != nil {
		return "", fmt.Errorf("listen for status: %w", err)
	}
	c.background("status", func(ctx context.Context) error { return serveStatus(ctx, l, c.cfg.Log, c.status) })
	return fmt.Sprintf("connected to %s; Ctrl-C puts everything back", c.cfg.Cluster.Context), nil
}

func (c *Connect) status() Status {
	pod := c.podNow()
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.cfg.Cluster
	return Status{
		Session: c.id, Owner: kube.Self().Owner(), PID: os.Getpid(), Since: c.since,
		Context: k.Context, Namespace: k.Namespace, Server: k.Server,
		Shadow: ShadowStatus{Kind: string(c.shadow.Mode()), Pod: pod},
		Wire:   wireStatus(c.keep.State(), c.shadow.Way()),
		Flows:  flowStatus(c.stack.Stats()),
		Device: DeviceStatus{Name: c.device.Name(), Addresses: c.device.Addrs, MTU: deviceMTU, Offload: c.device.Offload()},
		Routes: slices.Clone(c.routes),
		DNS: DNSStatus{
			Mode: string(c.mode), Server: c.naming.server, Domain: c.naming.domain,
			Search: c.naming.search(), Whole: c.seen.whole(),
		},
		Missing: append([]string{}, c.warned...),
	}
}

// podNow asks the shadow for its name: it may have been replaced.
func (c *Connect) podNow() string {
	if !c.keep.State().Up {
		return ""
	}
	ctx, cancel := context.WithTimeout(c.gctx, time.Second)
	defer cancel()
	info, err := shadow.Ask(ctx, c.keep)
	if err != nil {
		return ""
	}
	return info.Hostname
}

func wireStatus(k channel.KeepState, way kube.Way) WireStatus {
	w := WireStatus{Up: k.Up, Way: string(way), Since: k.Since, Reopened: k.Reopened}
	if k.RTT > 0 {
		w.RTT = k.RTT.Round(10 * time.Microsecond).String()
	}
	if k.Err != nil {
		w.LastError = k.Err.Error()
	}
	return w
}

func flowStatus(n netstack.Stats) FlowStatus {
	return FlowStatus{
		TCP: int(n.TCP.Open), UDP: int(n.UDP.Open), Ping: int(n.Ping.Open),
		Sent:     n.TCP.Sent + n.UDP.Sent + n.Ping.Sent,
		Received: n.TCP.Received + n.UDP.Received + n.Ping.Received,
		Failed:   n.TCP.DialFailures + n.UDP.DialFailures + n.Ping.DialFailures,
	}
}
