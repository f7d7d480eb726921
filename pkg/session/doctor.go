package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
)

// DoctorConfig is what "culvert doctor" is asked for.
type DoctorConfig struct {
	ConnectConfig // of the connect that is looked at; Cluster comes from Load

	Load    func() (*kube.Cluster, error)
	Offline bool // nothing is made in the cluster
	Tell    func(Finding)
}

// A State is how a step of a doctor ended.
type State string

const (
	Good    State = "ok"
	Poor    State = "warning" // it works, but less well than it could
	Failed  State = "failed"
	Skipped State = "skipped" // and why is in Found
)

// A Finding is what one step of a doctor found. The step's name is a promise.
type Finding struct {
	Step    string
	State   State
	Found   string
	Details []string // one line each
	Err     error
	Took    time.Duration
}

// poor notes what is less good than it could be.
func (f *Finding) poor(line string) { f.State, f.Details = Poor, append(f.Details, line) }

// The steps of a doctor, by their names. Each way is one, too, by its own. Those that
// are exported fail with errors which alone do not tell what may help.
const (
	stepKubeconfig = "kubeconfig"
	stepServer     = "API server"
	StepClock      = "clock"
	StepRights     = "rights"
	stepRoot       = "root"
	StepTUN        = "TUN"
	stepRoutes     = "routes"
	StepResolver   = "resolver"
	stepNames      = "names"
	StepShadow     = "shadow"
	StepWire       = "wire"
	StepEndpoint   = "endpoint"
	stepMTU        = "MTU"
	StepDNS        = "cluster DNS"
	StepService    = "ClusterIP"
	stepLeftovers  = "leftovers"
)

// A Doctor walks the steps that a connect takes, with the same functions, and tells of
// each how it goes. One that fails keeps only those from being tried that need it. What
// it makes, a device and a shadow, it removes again.
type Doctor struct {
	cfg   DoctorConfig
	c     *Connect // when there is a cluster
	child *privileged.Child
	past  *wires.UDPChannel // by the endpoint, where that is WireGuard's

	ended   map[string]State
	present *Finding // of the step under way
	kubeIP  string   // of the Service kubernetes
}

// NewDoctor starts nothing.
func NewDoctor(cfg DoctorConfig) *Doctor { return &Doctor{cfg: cfg, ended: map[string]State{}} }

// A check is one step.
type check struct {
	name  string
	needs []string
	do    func(ctx context.Context, f *Finding) error
}

// notTried is the error of a check that has nothing to look at.
type notTried string

func (n notTried) Error() string { return string(n) }

// Run walks through and returns what could not be put back, or that it was interrupted.
// What is wrong is told and is no error.
func (d *Doctor) Run(ctx context.Context) error {
	defer d.close()
	d.walk(ctx, []check{
		{stepKubeconfig, nil, d.load},
		{stepServer, []string{stepKubeconfig}, d.askServer},
		{StepClock, []string{stepServer}, d.readClock},
		{StepRights, []string{stepServer}, d.readRights},
		{stepRoot, nil, d.becomeRoot},
		{StepTUN, nil, d.openTUN},
		{stepRoutes, []string{stepServer}, d.findRoutes},
		{StepResolver, nil, d.seeResolver},
		{stepNames, nil, d.askSelf},
	})
	err := d.walkFar(ctx)
	d.walk(ctx, []check{{stepLeftovers, nil, d.findLeftovers}})
	return errors.Join(err, ctx.Err())
}

func (d *Doctor) close() {
	if d.child != nil {
		d.child.Close()
	}
	if d.c != nil {
		d.c.cfg.Cluster.Close()
	}
}

// far are the checks that need a shadow.
func (d *Doctor) far() []check {
	all := []check{
		{StepShadow, []string{StepRights}, d.makeShadow},
		{StepWire, []string{StepShadow}, d.openWire},
	}
	for _, way := range []kube.Way{kube.PodsProxy, kube.WebSocket, kube.SPDY} {
		all = append(all, check{string(way), []string{StepShadow}, func(ctx context.Context, f *Finding) error { return d.tryWay(ctx, way, f) }})
	}
	if d.cfg.Endpoint != "" {
		all = append(all, check{StepEndpoint, []string{StepWire}, d.tryEndpoint})
	}
	if d.cfg.Wire == wires.WireGuard {
		all = append(all, check{stepMTU, []string{StepEndpoint}, d.findMTU})
	}
	return append(all,
		check{StepDNS, []string{StepWire}, d.askClusterDNS},
		check{StepService, []string{StepDNS}, d.dialService})
}

// walkFar has a shadow for as long as it takes: it is a course, as that of connect is.
func (d *Doctor) walkFar(ctx context.Context) error {
	far := d.far()
	switch {
	case d.cfg.Offline:
		for _, c := range far {
			d.skip(c, "--offline")
		}
		return nil
	case d.lacks(far[0]) != "" || ctx.Err() != nil:
		d.walk(ctx, far)
		return nil
	}
	var steps []step
	for _, c := range far {
		steps = append(steps, step{c.name, func(ctx context.Context) (string, error) { d.take(ctx, c); return "", nil }})
	}
	leave := step{"leaving", func(context.Context) (string, error) { d.c.leave(); return "", nil }}
	err := d.c.course.run(ctx, append(steps, leave))
	for _, c := range far { // it may have ended in the middle
		if d.ended[c.name] == "" && ctx.Err() == nil {
			d.skip(c, "the session ended before")
		}
	}
	return err
}

func (d *Doctor) walk(ctx context.Context, all []check) {
	for _, c := range all {
		if ctx.Err() != nil {
			return
		}
		d.cfg.Reporter.Begin(c.name)
		d.take(ctx, c)
	}
}

// take makes one check and tells of it, unless it was interrupted.
func (d *Doctor) take(ctx context.Context, c check) {
	if why := d.lacks(c); why != "" {
		d.skip(c, why)
		return
	}
	f, start := &Finding{Step: c.name, State: Good}, time.Now()
	d.present = f
	err := c.do(ctx, f)
	if ctx.Err() != nil {
		return
	}
	f.Took = time.Since(start)
	var nothing notTried
	switch {
	case errors.As(err, &nothing):
		f.State, f.Found = Skipped, string(nothing)
	case errors.Is(err, errors.ErrUnsupported):
		f.State, f.Found = Skipped, err.Error()
	case err != nil:
		f.State, f.Err = Failed, err
	}
	d.tell(*f)
}

// lacks tells what c would need and is not there.
func (d *Doctor) lacks(c check) string {
	for _, need := range c.needs {
		switch d.ended[need] {
		case Failed:
			return need + " failed"
		case Skipped, "":
			return need + " was not tried"
		}
	}
	return ""
}

func (d *Doctor) skip(c check, why string) {
	d.tell(Finding{Step: c.name, State: Skipped, Found: why})
}

func (d *Doctor) tell(f Finding) {
	d.ended[f.Step] = f.State
	d.cfg.Tell(f)
}

// warned takes what a step warns of into its finding.
type warned struct {
	Reporter
	d *Doctor
}

func (w warned) Warn(line string) { w.d.present.poor(line) }

func (d *Doctor) load(_ context.Context, f *Finding) error {
	cluster, err := d.cfg.Load()
	if err != nil {
		return err
	}
	cfg := d.cfg.ConnectConfig
	cfg.Cluster, cfg.Reporter = cluster, warned{d.cfg.Reporter, d}
	d.c = NewConnect(cfg)
	d.c.past.device = nil // nothing is led into the tunnel
	f.Found = fmt.Sprintf("%s: context %s, namespace %s", cluster.File, cluster.Context, cluster.Namespace)
	if cluster.Plugin != "" {
		f.Found += ", credentials from " + cluster.Plugin
	}
	return nil
}

func (d *Doctor) askServer(ctx context.Context, f *Finding) (err error) {
	version, err := d.c.cfg.Cluster.Check(ctx)
	if err != nil {
		return err
	}
	pong, err := d.c.cfg.Cluster.Ping(ctx)
	f.Found = fmt.Sprintf("%s, Kubernetes %s, round trip %v", d.c.cfg.Cluster.Server, version, pong.RTT.Round(100*time.Microsecond))
	return err
}

// Clocks that differ by more may make tokens and certificates invalid.
const (
	clockPoor = 5 * time.Second
	clockBad  = time.Minute
)

func (d *Doctor) readClock(ctx context.Context, f *Finding) error {
	pong, err := d.c.cfg.Cluster.Ping(ctx)
	if err != nil {
		return err
	}
	if !pong.Dated {
		return notTried("the API server does not say what time it is")
	}
	return judgeClock(pong.Ahead, f)
}

func judgeClock(ahead time.Duration, f *Finding) error {
	differs := fmt.Sprintf("this machine's clock is %v behind the API server's", ahead.Round(time.Second))
	if ahead < 0 {
		differs = fmt.Sprintf("this machine's clock is %v ahead of the API server's", -ahead.Round(time.Second))
	}
	switch {
	case ahead.Abs() > clockBad:
		return errors.New(differs)
	case ahead.Abs() > clockPoor:
		f.State, f.Found = Poor, differs
	default:
		f.Found = "as the API server's, within " + max(time.Second, ahead.Abs().Round(time.Second)).String()
	}
	return nil
}

// readRights asks for those of connect, without which there is no shadow, and looks what
// other verbs would lack.
func (d *Doctor) readRights(ctx context.Context, f *Finding) error {
	cluster := d.c.cfg.Cluster
	rights, err := cluster.Preflight(ctx, kube.Connect)
	if err != nil {
		return err
	}
	d.c.rights = rights
	for _, line := range rights.Notices {
		f.poor("connect: " + line)
	}
	may := []string{"connect"}
	for _, other := range []struct {
		verb  string
		needs []kube.Need
	}{
		{"forward", []kube.Need{kube.Forward}},
		{"exchange", []kube.Need{kube.Exchange}},
		{"exchange --method scale", []kube.Need{kube.Exchange, kube.Scale}},
		{"exchange --method ephemeral", []kube.Need{kube.EphemeralExchange}},
	} {
		theirs, err := cluster.Preflight(ctx, other.needs...)
		if err != nil {
			return err
		}
		if err := theirs.Err(); err != nil {
			f.poor(other.verb + ": " + err.Error())
			continue
		}
		may = append(may, other.verb)
	}
	f.Found = "enough for " + strings.Join(may, ", ")
	return rights.Err()
}

func (d *Doctor) makeShadow(ctx context.Context, f *Finding) error {
	result, err := d.c.createShadow(ctx)
	if err != nil {
		return err
	}
	_, err = d.c.awaitShadow(ctx)
	f.Found = fmt.Sprintf("%s, pod %s ready, image %s", result, d.c.shadow().Pod(), d.cfg.Image)
	return err
}

// findLeftovers asks what clean would remove, which looks on for a while if it must.
func (d *Doctor) findLeftovers(ctx context.Context, f *Finding) error {
	left, err := resolver.New(resolver.Config{Log: d.cfg.Log}).Leftovers()
	if err != nil {
		return err
	}
	f.Found = "nothing was left behind on this machine"
	if d.ended[stepServer] == Good {
		f.Found += " or in namespace " + d.c.cfg.Cluster.Namespace
		there, err := d.leftThere(ctx)
		if errors.Is(err, kube.ErrForbidden) {
			f.Found = "nothing was left behind on this machine"
			f.poor("in the cluster: " + err.Error())
		} else if err != nil {
			return err
		}
		left = append(left, there...)
	}
	f.Details = append(f.Details, left...)
	if len(left) > 0 {
		return fmt.Errorf("%d that died: %w", len(left), ErrLeft)
	}
	return nil
}

// leftThere has a line for each session that died in the cluster.
func (d *Doctor) leftThere(ctx context.Context) (lines []string, err error) {
	all, err := d.c.cfg.Cluster.Clean(ctx, kube.CleanConfig{DryRun: true, Progress: d.cfg.Reporter.Progress})
	for _, s := range all {
		if !s.Living {
			lines = append(lines, fmt.Sprintf("%s/%s of %s, %s: %s", s.Namespace, s.Name, cmp.Or(s.Owner, "somebody"), s.Why, strings.Join(s.Objects, " ")))
		}
	}
	return lines, err
}
