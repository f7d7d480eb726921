package session

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

func (c *Connect) listenForStatus(context.Context) (string, error) { return "", c.listen(c.status) }

func (c *Connect) connected(context.Context) (string, error) {
	return fmt.Sprintf("connected to %s; %s puts everything back", c.cfg.Cluster.Context, c.cfg.HowToEnd), nil
}

func (f *PortForward) tellStatus(context.Context) (string, error) {
	return "forwarding; Ctrl-C ends it", f.listen(f.status)
}

func (p *Proxy) tellStatus(context.Context) (string, error) {
	return fmt.Sprintf("%s is reached through the proxy; Ctrl-C ends it", p.cfg.Cluster.Context), p.listen(p.status)
}
func (r *Run) tellStatus(context.Context) (string, error) { return "", r.listen(r.status) }

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
func (c *course) basics(kind string) Status {
	return Status{Kind: kind, Session: c.id, Owner: kube.Self().Owner(), PID: os.Getpid(), Since: c.since, Missing: c.warnings()}
}

// inCluster are of every kind that is in one.
func (c *course) inCluster(kind string, k *kube.Cluster) Status {
	s := c.basics(kind)
	s.Context, s.Namespace, s.Server = k.Context, k.Namespace, k.Server
	return s
}

// statusAs is of every verb that has a tunnel.
func (t *tunnel) statusAs(kind string) Status {
	s, to := t.inCluster(kind, t.cfg.Cluster), t.shadow()
	s.Shadow = ShadowStatus{Kind: string(to.Mode()), Pod: podNow(t.gctx, t.keep), Of: to.of}
	s.Wire = t.past.status(t.keep.State(), to.Way(), t.cfg.Endpoint)
	return s
}

func (c *Connect) status() Status {
	s := c.statusAs(KindConnect)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fill(&s)
	s.Routes = slices.Clone(c.routes)
	s.DNS.Domain, s.DNS.Search, s.DNS.As, s.DNS.Probe, s.DNS.Whole = c.naming.domain, c.naming.search(), c.naming.suffix, c.naming.probe, c.seen.whole()
	return s
}

// status has a device only while the command runs.
func (r *Run) status() Status {
	s := r.statusAs("run")
	s.Command = r.cfg.Args
	command, stack := r.running()
	if command == nil {
		return s
	}
	s.Flows = flowStatus(stack.Stats())
	s.Device = &DeviceStatus{Name: command.Device.Name(), Addresses: r.addrs, MTU: deviceMTU, Offload: command.Device.Offload()}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Routes = slices.Clone(r.routes)
	s.DNS = &DNSStatus{Mode: "resolv.conf of its own", Server: r.server, Domain: r.naming.domain, Search: r.naming.search(), Whole: r.seen.whole()}
	return s
}

func (x *Exchange) status() Status {
	pod := podNow(x.gctx, x.keep)
	kind := "exchange"
	if x.cfg.Expose != "" {
		kind = "expose"
	}
	s := x.inCluster(kind, x.cfg.Cluster)
	r := x.attachment()
	if pod != "" && x.service.Pod != "" {
		pod = r.shadow.Pod() // its own word is the name it has taken
	}
	s.Shadow = ShadowStatus{Kind: string(r.place.Mode()), Pod: pod}
	s.Wire = x.past.status(x.keep.State(), r.place.Way(), x.cfg.Endpoint)
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
	if s := keep.State(); !s.Up || s.Silent > 0 {
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

func wireStatus[K, W ~string](k channel.KeepState, kind K, way W) WireStatus {
	w := WireStatus{Up: k.Up && k.Silent == 0, Kind: string(kind), Way: string(way), Since: k.Since, Reopened: k.Reopened}
	if k.Silent > 0 { // it may be heard again, and is not to be relied on
		w.Since = time.Now().Add(-k.Silent)
	}
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

func flowStatus(n netstack.Stats) *FlowStatus {
	return &FlowStatus{
		TCP: int(n.TCP.Open), UDP: int(n.UDP.Open), Ping: int(n.Ping.Open),
		Sent:     n.TCP.Sent + n.UDP.Sent + n.Ping.Sent,
		Received: n.TCP.Received + n.UDP.Received + n.Ping.Received,
		Failed:   n.TCP.DialFailures + n.UDP.DialFailures + n.Ping.DialFailures,
	}
}
