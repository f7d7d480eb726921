package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// A Method is how an exchange brings the traffic here.
type Method string

const (
	BySelector  Method = "selector"  // the Service leads to the router; the original runs on
	ByScale     Method = "scale"     // besides, the original does not run meanwhile
	ByEphemeral Method = "ephemeral" // the router is in the pod, and takes what comes for the pod itself
)

// outpost is where a router runs: a kube.Shadow behind a Service, or a
// kube.Ephemeral in a pod.
type outpost interface {
	Create(ctx context.Context, say func(string)) error
	WaitReady(ctx context.Context, progress func(string)) error
	Dial(ctx context.Context) (net.Conn, kube.Way, error)
	Renew(ctx context.Context) error
	Swap(ctx context.Context) error
	Restore(ctx context.Context) error
	Delete(ctx context.Context) error
	Look(ctx context.Context) (state string, err error)
	Mode() kube.Mode
	Way() kube.Way
}

const (
	mostAdded = 5                // containers to one pod: their entries stay in it
	endLimit  = 20 * time.Second // to tell a shadow to end that was not claimed yet
)

// findPod is findService for what is sent to a pod.
func (x *Exchange) findPod(ctx context.Context) error {
	p, err := x.cfg.Cluster.FindPod(ctx, x.cfg.Target)
	if err != nil {
		return err
	}
	name := "pod/" + p.Name
	ports, err := portsFor(name, p.Ports, x.cfg.To)
	if err != nil {
		return err
	}
	x.service = &kube.Service{Name: p.Name, Ports: ports}
	if x.forwards, err = assign(name, ports, x.cfg.To); err != nil {
		return err
	}
	e, _, _, err := x.cfg.Cluster.OpenEphemeral(p, x.claimedPorts(), x.cfg.path(), x.rights)
	if err != nil {
		return err
	}
	if e == nil {
		x.warn(name + " gets an ephemeral container: that needs the right to patch pods/ephemeralcontainers, and NET_ADMIN, which Pod Security baseline and restricted refuse")
		x.warn("its keys are in the pod: while it runs, whoever may read the pod can take the same traffic, and dial from there; its entry stays for as long as there is the pod")
	}
	if matchText(x.cfg.Match) == "" && !x.cfg.Mirror {
		x.warnAll(probesHere(p.Probed, x.forwards))
	}
	return nil
}

// probesHere has a line for each port whose probes by the kubelet come here: the
// original keeps those that a router sees to be probes.
func probesHere(probed []kube.Probe, forwards []forwarded) (lines []string) {
	for _, f := range forwards {
		looked := f.Protocol != "tcp"
		here := slices.DeleteFunc(slices.Clone(probed), func(p kube.Probe) bool {
			return f.port.Network != "tcp" || p.Port != f.port.Target || looked && (p.Named || p.Connects)
		})
		if len(here) == 0 {
			continue
		}
		line := fmt.Sprintf("the kubelet's probes of port %d come here, too: %s", f.port.Target, meaning(here))
		if slices.ContainsFunc(here, func(p kube.Probe) bool { return p.Named }) {
			line += "; without :tcp the original gets them"
		}
		lines = append(lines, line)
	}
	return lines
}

// meaning is the worst that a process here can do to the pod.
func meaning(here []kube.Probe) string {
	asks := func(p kube.Probe) bool { return !p.Connects }
	switch {
	case slices.ContainsFunc(here, func(p kube.Probe) bool { return asks(p) && p.Restarts }):
		return "a wrong answer restarts the original"
	case slices.ContainsFunc(here, asks):
		return "a wrong answer takes the pod out of its Services"
	}
	return "they succeed, however the original is"
}

// portsFor are a pod's ports, and what of it is named by number: a pod need not
// declare what it listens on.
func portsFor(pod string, declared []kube.ServicePort, to []Forward) ([]kube.ServicePort, error) {
	all := slices.Clone(declared)
	for _, f := range to {
		number, err := strconv.ParseUint(f.Port, 10, 16)
		known := slices.ContainsFunc(all, f.names)
		switch {
		case f.Port == "" && len(declared) == 0:
			_, port, _ := net.SplitHostPort(f.Address)
			return nil, fmt.Errorf("%s declares no port: say which, as --to %s=%s", pod, port, port)
		case known || err != nil || number == 0:
		default:
			network := f.Network
			if network == "" {
				network = "tcp"
			}
			all = append(all, kube.PodPort(network, int(number)))
		}
	}
	return all, nil
}

// attachToPod finds the shadow in the pod that has the ports already, or adds one.
func (x *Exchange) attachToPod(ctx context.Context) (*attached, error) {
	for end := time.Now().Add(drainLimit); ; {
		p, err := x.cfg.Cluster.FindPod(ctx, x.cfg.Target)
		if errors.Is(err, kube.ErrNoPod) && x.attachment() != nil && !x.comesBack {
			return nil, fmt.Errorf("%s is gone: %w", x.subject(), errOver)
		}
		if err != nil {
			return nil, err
		}
		x.comesBack = x.cfg.Target.Kind != "pod" || p.Returns
		r, err := x.joinPod(p)
		if r == nil && err == nil {
			r, err = x.addTo(ctx, p)
		}
		if !errors.Is(err, kube.ErrExchanged) || time.Now().After(end) || x.isLeaving() {
			return r, err
		}
		if err := pause(ctx, closingWait); err != nil {
			return nil, err
		}
	}
}

// additions are the containers that were added to one pod.
type additions struct {
	pod string // its UID
	n   int
}

// to counts one more, from 1 for each pod.
func (a *additions) to(pod string) int {
	if a.pod != pod {
		*a = additions{pod: pod}
	}
	a.n++
	return a.n
}

func (x *Exchange) claimedPorts() (ports []kube.ServicePort) {
	for _, f := range x.forwards {
		ports = append(ports, f.port)
	}
	return ports
}

func (x *Exchange) joinPod(p *kube.Pod) (*attached, error) {
	e, k, mark, err := x.cfg.Cluster.OpenEphemeral(p, x.claimedPorts(), x.cfg.path(), x.rights)
	if e == nil || err != nil {
		return nil, err
	}
	known, err := wires.ParseKeys(k.ClientKey, k.HostPublic)
	if err != nil {
		return nil, fmt.Errorf("keys of router %s: %w", mark.Session, err)
	}
	r := &attached{place: e, pod: p.Name, keys: known, turned: time.Now(), by: mark.By}
	x.use(r)
	return r, nil
}

func (x *Exchange) addTo(ctx context.Context, p *kube.Pod) (*attached, error) {
	n := x.added.to(p.UID)
	if n > mostAdded {
		return nil, fmt.Errorf("the router in %s has ended %d times: %w", x.subject(), mostAdded, errOver)
	}
	k, err := newKeys(x.id)
	if err != nil {
		return nil, err
	}
	id := routerID(x.id)
	if n > 1 {
		id += "-" + strconv.Itoa(n) // the entries of those before are there still
	}
	e := x.cfg.Cluster.NewEphemeral(kube.EphemeralConfig{
		Session: id, Image: x.cfg.Image, Pod: p, Ports: x.claimedPorts(), Protocols: x.protocols(), Grace: x.cfg.Grace, Path: x.cfg.path(),
		HostKey: k.shadowKey, AuthorizedKey: k.laptopPublic, ClientKey: k.laptopKey, HostPublic: k.shadowPublic,
	}, x.rights)
	r := &attached{place: e, pod: p.Name, keys: k.laptop, made: true, ours: true}
	x.use(r)
	if err := e.Create(ctx, x.warn); err != nil {
		return r, err
	}
	x.but = ", but for the entry of an ended container in the pod"
	return r, nil
}

// endUnasked tells a shadow to end that was not told so by the wire of the
// exchange, and tells whether nobody else holds it. Where it cannot be told, it ends
// by itself after the grace time.
func (x *Exchange) endUnasked(ctx context.Context, r *attached) (ours bool) {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	if r.place.WaitReady(ctx, x.cfg.Reporter.Progress) != nil {
		return true
	}
	err := overWire(ctx, r.place, x.cfg.stream(), wires.Config{Keys: r.keys, Log: x.cfg.Log}, func(far channel.Network) error {
		_, err := shadow.End(ctx, far, 0)
		return err
	})
	return !heldByOthers(err)
}

// heldByOthers tells that somebody has joined who goes on.
func heldByOthers(err error) bool {
	var held *router.HeldError
	return errors.As(err, &held)
}

// podName is the pod's name without its kind; "" for a Service's exchange.
func (x *Exchange) podName() string {
	if x.cfg.Method != ByEphemeral || x.service == nil {
		return ""
	}
	if r := x.attachment(); r != nil {
		return r.pod
	}
	return x.service.Name
}

// Subject is whose traffic comes here.
func (e ExchangeStatus) Subject() string {
	if e.Pod != "" {
		return "pod/" + e.Pod
	}
	return "svc/" + e.Service
}

// Named tells whether a target is this exchange's.
func (e ExchangeStatus) Named(t kube.Target) bool {
	switch {
	case e.Target == t.String():
		return true
	case e.Pod != "":
		return t.Kind == "pod" && t.Name == e.Pod
	}
	return t.Kind == "service" && e.Service == t.Name
}

// article is for a Mode in a sentence.
func article(m kube.Mode) string {
	if strings.ContainsRune("aeiou", rune(m[0])) {
		return "an " + string(m)
	}
	return "a " + string(m)
}
