package session

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// ExchangeConfig is what "culvert exchange" and "culvert expose" are asked for.
type ExchangeConfig struct {
	TunnelConfig

	Target kube.Target // whose traffic is to come here
	Expose string      // or the name of a new Service for it
	To     []Forward   // where it goes; of a new Service each names its port

	Method Method       // "" is BySelector
	Match  router.Match // which requests; the zero value is everything
	Mirror bool         // copies only
	Take   bool         // from whoever holds the same Match

	Local Local

	Hurry <-chan struct{} // closed when the person has no patience: the command and the router are not waited for; or nil
}

// An Exchange brings the traffic of a Service to this machine, until it is told
// to stop. It needs no root: nothing on this machine changes.
type Exchange struct {
	course
	cfg ExchangeConfig

	rights   *kube.Rights
	service  *kube.Service
	forwards []forwarded
	workload *kube.Workload // that is scaled down, or nil
	keep     *channel.Keep
	past     *direct
	open     atomic.Int64  // connections that are being served here
	reopened chan struct{} // there is a new wire
	finding  chan struct{} // has room for one: who finds or makes a router
	changed  string        // what hold has said of ports that are others
	letGo    func()        // ends hold and waits for it; nil before it began
	pod      string        // whose environment the local process gets; "": none is read
	environ  []string

	mounts     string // the folder with mounted files; "": none was written
	madeMounts bool   // it was not there before

	stopLocal func() // ends the command and waits for it; nil before it began

	mu       sync.Mutex // guards what follows
	router   *attached
	letScale func() // ends emptyAgain and waits for it; nil before it began
	leaving  bool   // no other router is looked for
	runs     int    // pods of workload, as somebody else has scaled it
	seen     shadow.ClaimInfo
	seenAt   time.Time

	// of ByEphemeral; these are of whoever attaches, one at a time
	added     additions
	comesBack bool // should the pod be deleted, there will be another
}

// attached is the router that this machine is attached to, and what of it is
// this machine's to undo.
type attached struct {
	place   outpost
	shadow  *kube.Shadow // that place is; nil in a pod
	pod     string       // that it is in; "" for a Service's router
	keys    wires.Keys
	stop    context.CancelFunc // ends its lease's renewal
	by      string             // who made it, where not this machine
	session string             // that it was made for then
	made    bool               // here

	mu     sync.Mutex
	wire   channel.Channel // the last one; nil before the first
	turned time.Time       // when the Service was led to it; zero: it is not
	led    bool            // it has been seen that it is
	ours   bool            // to remove: made here, or nobody else is left
	ended  bool            // one in a pod was told to end
}

func (r *attached) set(change func(*attached)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(r)
}

func (r *attached) isTurned() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.turned.IsZero()
}

// NewExchange starts nothing.
func NewExchange(cfg ExchangeConfig) *Exchange {
	x := &Exchange{
		course: newCourse(cfg.Reporter, cfg.Log), cfg: cfg,
		reopened: make(chan struct{}, 1), finding: make(chan struct{}, 1),
	}
	x.past = &direct{wire: cfg.Wire, say: cfg.Reporter.Say, log: cfg.Log, keep: func() channel.Network { return x.keep }}
	return x
}

// steps are the way up.
func (x *Exchange) steps() []step {
	return []step{
		{"asking the cluster", x.askCluster},
		{"checking rights", x.checkRights},
		{"finding " + x.subject(), x.findService},
		{"reading the original's environment", x.readLocal},
		// Above this line all fails for free, below it things change.
		{"making the router", x.findRouter},
		{"waiting for the router pod", x.awaitRouter},
		{"opening the wire", x.openWire},
		{"claiming", x.claim},
		{"copying the mounted files", x.copyMounts},
		{"scaling the original down", x.scaleDown},
		{"listening for status", x.tellStatus}, // says what has been reached
		{"starting the process", x.startLocal},
	}
}

// Run exchanges and blocks until ctx ends or it cannot go on, and then puts
// everything back, without losing a request that is under way.
func (x *Exchange) Run(ctx context.Context) error { return x.course.run(ctx, x.steps()) }

// subject is the Service, as far as it is known yet.
func (x *Exchange) subject() string {
	if pod := x.podName(); pod != "" {
		return "pod/" + pod
	}
	if x.service != nil {
		return "svc/" + x.service.Name
	}
	return x.target()
}

// target is what was asked for.
func (x *Exchange) target() string {
	if x.cfg.Expose != "" {
		return "svc/" + x.cfg.Expose
	}
	return x.cfg.Target.String()
}

func (x *Exchange) askCluster(ctx context.Context) (string, error) {
	return askCluster(ctx, x.cfg.Cluster)
}

func (x *Exchange) checkRights(ctx context.Context) (result string, err error) {
	needs := []kube.Need{kube.Exchange}
	switch x.cfg.Method {
	case ByScale:
		needs = append(needs, kube.Scale)
	case ByEphemeral:
		needs = []kube.Need{kube.EphemeralExchange}
	}
	x.rights, err = x.preflight(ctx, x.cfg.Cluster, needs...)
	return "rights checked", err
}

func (x *Exchange) findService(ctx context.Context) (result string, err error) {
	if x.cfg.Expose != "" {
		x.service, x.forwards, err = exposed(x.cfg.Expose, x.cfg.To)
	} else if x.cfg.Method == ByEphemeral {
		err = x.findPod(ctx)
	} else if x.service, err = x.cfg.Cluster.FindService(ctx, x.cfg.Target); err == nil {
		x.forwards, err = assign("svc/"+x.service.Name, x.service.Ports, x.cfg.To)
	}
	if err == nil {
		err = x.findWorkload(ctx)
	}
	if err != nil {
		return "", err
	}
	if len(x.cfg.Local.Command) == 0 {
		x.lookForListeners(ctx)
	}
	x.lookForRequests()
	x.lookForNames()
	if x.cfg.Expose != "" {
		return fmt.Sprintf("svc/%s will have %s", x.service.Name, portList(x.service.Ports)), nil
	}
	return fmt.Sprintf("%s has %s", x.subject(), portList(x.service.Ports)), nil
}

// lookForListeners warns of what does not listen yet: it is waited for, and no
// reason to fail.
func (x *Exchange) lookForListeners(ctx context.Context) {
	for _, f := range x.forwards {
		if f.port.Network != "tcp" {
			continue
		}
		dial, cancel := context.WithTimeout(ctx, time.Second)
		c, err := (&channel.Host{}).DialContext(dial, "tcp", f.Address)
		cancel()
		if err == nil {
			c.Close()
			continue
		}
		until := "the original answers"
		if x.cfg.Expose != "" || x.workload != nil {
			until = "connections are refused"
		}
		x.warn(fmt.Sprintf("nothing listens on %s yet: until something does, %s", f.Address, until))
	}
}

// lookForRequests warns of ports without requests that could match.
func (x *Exchange) lookForRequests() {
	for _, f := range x.forwards {
		if matchText(x.cfg.Match) != "" && (f.port.Network == "udp" || f.Protocol == "tcp") {
			x.warn(fmt.Sprintf("port %s is not looked into for requests: all of it stays with the original", portWord(f.port)))
		}
	}
}

// lookForNames warns of what names cannot lead to while a router has them: they lead
// to pods, whatever ports the Service has.
func (x *Exchange) lookForNames() {
	if !x.service.Headless {
		return
	}
	name := "svc/" + x.service.Name
	if x.service.Pod != "" {
		name = fmt.Sprintf("pod/%s and the other pods of svc/%s", x.service.Pod, x.service.Name)
	}
	var ports []string
	for _, p := range x.service.Ports {
		ports = append(ports, fmt.Sprintf("%d/%s", p.Target, p.Network))
	}
	x.warn(fmt.Sprintf("by the name of %s only these ports are reached meanwhile: %s", name, strings.Join(ports, ", ")))
}

// findRouter joins the Service's router, or makes one.
func (x *Exchange) findRouter(ctx context.Context) (string, error) {
	x.undo.add("remove the router", x.removeRouter)
	r, err := x.attach(ctx)
	if err != nil {
		return "", err
	}
	if !r.made {
		return fmt.Sprintf("joined the router of %s", r.by), nil
	}
	return fmt.Sprintf("router made, as %s", article(r.place.Mode())), nil
}

func (x *Exchange) awaitRouter(ctx context.Context) (string, error) {
	return "router pod ready", x.attachment().place.WaitReady(ctx, x.cfg.Reporter.Progress)
}

func (x *Exchange) openWire(ctx context.Context) (string, error) {
	how := channel.KeepConfig{Open: x.dialWire, Beside: x.dialBeside, OnState: x.wireChanged}
	if x.cfg.Endpoint != "" {
		how.Better = x.dialDirect
	}
	x.keep = x.newKeep(how)
	x.keepOpen(x.keep)
	if err := ready(ctx, x.keep); err != nil {
		return "", fmt.Errorf("open the wire to the router: %w", err)
	}
	return fmt.Sprintf("wire open: %s through %s", x.cfg.stream(), x.attachment().place.Way()), nil
}

// claim listens at the router and makes the traffic come.
func (x *Exchange) claim(ctx context.Context) (string, error) {
	x.undo.add("end the command", x.endLocal) // it serves until all else is undone
	x.undo.addFor(undoLimit+lingerLimit, "put "+x.subject()+" back", x.release)
	if err := x.forward(ctx); err != nil {
		return "", err
	}
	if err := x.settle(ctx, x.cfg.Take); err != nil {
		return "", err
	}
	if err := x.beat(ctx); over(err) {
		return "", x.why(err)
	}
	x.awaitProxies(ctx)
	x.letGo = x.alongside(func(ctx context.Context) {
		if err := x.hold(ctx); err != nil {
			x.fail(err)
		}
	})
	return "traffic comes here", nil
}

// awaitProxies waits, a little, until a new Service leads to the router at least
// from the router's own node: kube-proxy writes its rules once a second.
func (x *Exchange) awaitProxies(ctx context.Context) {
	if x.cfg.Expose == "" {
		return // the original pods answer until then
	}
	ctx, cancel := context.WithTimeout(ctx, proxiesLimit)
	defer cancel()
	for _, p := range x.service.Ports {
		address := fmt.Sprintf("%s:%d", x.service.Name, p.Port)
		for p.Network == "tcp" && ctx.Err() == nil {
			c, err := x.keep.DialContext(ctx, "tcp", address)
			if err == nil {
				c.Close()
				break
			}
			_ = pause(ctx, 100*time.Millisecond)
		}
	}
}

const proxiesLimit = 5 * time.Second

// told says what has been reached.
func (x *Exchange) told() string {
	verb := "exchanged"
	if x.cfg.Expose != "" {
		verb = "exposed"
	}
	what := "all its traffic comes"
	if m := matchText(x.cfg.Match); m != "" {
		what = "requests with " + m + " come"
	}
	if x.cfg.Mirror {
		what += ", as copies,"
	}
	to := ""
	for i, f := range x.forwards {
		if i > 0 {
			to += ", "
		}
		to += f.Address
	}
	switch n := x.running(); {
	case x.workload == nil:
	case n > 0:
		to += fmt.Sprintf(", beside %s, which somebody else has scaled to %d", x.workload, n)
	default:
		to += fmt.Sprintf(", and %s does not run", x.workload)
	}
	name := x.subject()
	if x.service.Pod != "" {
		name = fmt.Sprintf("pod/%s of %s", x.service.Pod, name)
	}
	return fmt.Sprintf("%s is %s: %s to %s; Ctrl-C puts it back", name, verb, what, to)
}

func (x *Exchange) attachment() *attached {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.router
}

// wireChanged tells the person when the wire goes, and when it is back.
func (x *Exchange) wireChanged(s channel.KeepState) {
	switch {
	case x.gctx.Err() != nil:
	case !s.Up:
		who := "the original answers"
		if x.workload != nil && x.running() == 0 {
			who = "nobody answers"
		}
		x.cfg.Reporter.Say(fmt.Sprintf("the wire is down, %s; opening it again: %v", who, s.Err))
	case s.Better:
		x.cfg.Reporter.Say(fmt.Sprintf("the wire goes past the API server now: %v", x.past.went()))
		fallthrough
	case s.Reopened > 0 || s.Renewed:
		select {
		case x.reopened <- struct{}{}:
		default:
		}
	}
}

// errOver ends an exchange for a reason that lies in the cluster.
var errOver = errors.New("the exchange is over")
