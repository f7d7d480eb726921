package session

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

func (c *Connect) tellStatus(context.Context) (string, error) {
	return fmt.Sprintf("connected to %s; Ctrl-C puts everything back", c.cfg.Cluster.Context), c.listen(c.status)
}

func (x *Exchange) tellStatus(context.Context) (string, error) { return x.told(), x.listen(x.status) }

// listen lets other processes of the user's ask for the status.
func (c *course) listen(now func() Status) error {
	l, err := listenStatus(c.id)
	if err != nil {
		return fmt.Errorf("listen for status: %w", err)
	}
	c.background("status", func(ctx context.Context) error { return c.serveStatus(ctx, l, now) })
	return nil
}

// basics are of every kind.
func (c *course) basics(kind string, k *kube.Cluster) Status {
	return Status{
		Kind: kind, Session: c.id, Owner: kube.Self().Owner(), PID: os.Getpid(), Since: c.since,
		Context: k.Context, Namespace: k.Namespace, Server: k.Server, Missing: c.warnings(),
	}
}

func (c *Connect) status() Status {
	pod := podNow(c.gctx, c.keep)
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.basics("connect", c.cfg.Cluster)
	flows := flowStatus(c.stack.Stats())
	s.Shadow = ShadowStatus{Kind: string(c.shadow.Mode()), Pod: pod}
	s.Wire = wireStatus(c.keep.State(), c.cfg.Wire, c.shadow.Way())
	s.Flows = &flows
	s.Device = &DeviceStatus{Name: c.device.Name(), Addresses: c.device.Addrs, MTU: deviceMTU, Offload: c.device.Offload()}
	s.Routes = slices.Clone(c.routes)
	s.DNS = &DNSStatus{
		Mode: string(c.mode), Server: c.naming.server, Domain: c.naming.domain,
		Search: c.naming.search(), Whole: c.seen.whole(),
	}
	return s
}

func (x *Exchange) status() Status {
	pod := podNow(x.gctx, x.keep)
	kind := "exchange"
	if x.cfg.Expose != "" {
		kind = "expose"
	}
	s := x.basics(kind, x.cfg.Cluster)
	r := x.attachment()
	if pod != "" && x.service.Pod != "" {
		pod = r.shadow.Pod() // its own word is the name it has taken
	}
	s.Shadow = ShadowStatus{Kind: string(r.place.Mode()), Pod: pod}
	s.Wire = wireStatus(x.keep.State(), x.cfg.Wire, r.place.Way())
	service := x.service.Name
	if r.pod != "" {
		service = ""
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	s.Exchange = &ExchangeStatus{
		Service: service, Pod: r.pod, Target: x.target(), Method: cmp.Or(x.cfg.Method, BySelector), Match: matchText(x.cfg.Match), Mirror: x.cfg.Mirror,
		Requests: x.seen.Requests, Connections: x.seen.Connections, Open: x.seen.Open,
	}
	if x.workload != nil {
		s.Exchange.Workload = &WorkloadStatus{x.workload.String(), x.runs}
	}
	for _, f := range x.forwards {
		s.Exchange.Forwards = append(s.Exchange.Forwards, ForwardStatus{f.route(), f.Address})
	}
	return s
}

// matchText is "" for everything.
func matchText(m router.Match) string {
	if len(m.Headers) == 0 && m.Path == "" {
		return ""
	}
	return m.String()
}

// podNow asks the shadow for its name: it may have been replaced.
func podNow(ctx context.Context, keep *channel.Keep) string {
	if !keep.State().Up {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	info, err := shadow.Ask(ctx, keep)
	if err != nil {
		return ""
	}
	return info.Hostname
}

func wireStatus(k channel.KeepState, kind wires.Wire, way kube.Way) WireStatus {
	w := WireStatus{Up: k.Up, Kind: string(kind), Way: string(way), Since: k.Since, Reopened: k.Reopened}
	if k.RTT > 0 {
		w.RTT = k.RTT.Round(10 * time.Microsecond).String()
	}
	if k.NoBetter != nil {
		w.NotDirect = k.NoBetter.Error()
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
