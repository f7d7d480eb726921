// Bench is "make bench": ways from a laptop to a service, side by side in one
// run; see bench -h.
//
// Figures of one machine, at one time, compare with nothing; so all paths are
// measured in turn, round by round, and what is read from the tables are ratios.
//
// Laptop, far end and service are network namespaces of the bench's own, and
// need no cluster. culvert's data path is put together there of the product's
// rooms (ends.go): what a wire, a netstack and a TUN cost, without Kubernetes. So are
// a hub and a host behind it (hub.go), and many hosts (agents.go). The product itself brings
// a release to a host, beside scp, rsync and tar (ship.go).
// With a cluster that is up, culvert itself is then measured on its laptop
// beside kubectl port-forward (cluster.go), and at rest among the Services of a large one
// (crowd.go). In both, names are asked of culvert's server, dnsmasq and, through the
// tunnel, CoreDNS (names.go). Nothing is remembered of what was made:
// whatever has the bench's name is cleaned away, at the end and before the start,
// by a process that outlives this one (guard.go).
//
// The files are in the order of a run: world.go, link.go and relay.go make hosts
// and link, path.go, ends.go and socks.go open a way, measure.go and load.go put loads on
// it, report.go and svg.go show what came out.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// roles are what the bench runs itself as, on its hosts.
var roles = map[string]func(context.Context, []string) error{
	"guard": guardMain, "relay": relayMain, "serve": serveMain, "load": loadMain, "bare": bareMain, "crowd": crowdMain, "names": namesMain, "socks": socksMain,
	"hub": hubMain, "agent": agentMain, "agents": agentsMain,
	"far":  endMain(func(w wire) func(context.Context, end) error { return w.far }),
	"near": endMain(func(w wire) func(context.Context, end) error { return w.near }),
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench: error:", err)
		os.Exit(1)
	}
}

// command is a run, or one of the roles in it.
func command(ctx context.Context, args []string) error {
	if len(args) > 0 && roles[args[0]] != nil {
		return roles[args[0]](ctx, args[1:])
	}
	return benchMain(ctx, args)
}

// options are what is asked of a run.
type options struct {
	paths      []string
	conditions []condition
	seconds    float64
	rounds     int
	base, out  string
	cluster    bool
	crowd      bool
	hosts      int
	ships      []condition
}

func parseOptions(args []string) (o options, err error) {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	names := f.String("paths", "", "`names` of paths to measure, by comma; empty is what shows most")
	links := f.String("links", "0,20ms,80ms,80ms/0.1%", "`links` from laptop to far end, by comma, each a round trip\nand what more is wanted: /1% lost, /2~ overtaking the others, /100M bit/s,\n/64B MiB that hosts buffer of a TCP connection.\nEmpty is none")
	f.BoolVar(&o.cluster, "cluster", true, "measure on a cluster that is up, too")
	f.BoolVar(&o.crowd, "crowd", true, "measure among 10,000 Services of it, too, which takes minutes")
	f.IntVar(&o.hosts, "hosts", 1000, "`number` of hosts at one hub, which takes minutes; 0 is none")
	ships := f.String("deploys", "0,100ms", "`links` over which a release goes to a host, by comma; empty is none")
	f.Float64Var(&o.seconds, "seconds", 2, "`length` of one load, in whole seconds")
	f.IntVar(&o.rounds, "rounds", 1, "`number` of rounds that medians are taken of")
	f.StringVar(&o.base, "base", "ssh", "`path` that ratios are to")
	f.StringVar(&o.out, "out", "", "`folder` for tables, JSON and plots")
	f.Usage = func() { usage(f) }
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.seconds < 1 || o.seconds != float64(int(o.seconds)) || o.rounds < 1 || f.NArg() > 0 {
		return o, errors.New("want whole -seconds and -rounds of at least one, and nothing but flags")
	}
	if o.paths, err = known(*names); err != nil {
		return o, err
	}
	if o.conditions, err = parseConditions(*links); err != nil {
		return o, err
	}
	o.ships, err = parseConditions(*ships)
	return o, err
}

func parseConditions(texts string) (all []condition, err error) {
	for text := range strings.FieldsFuncSeq(texts, func(r rune) bool { return r == ',' }) {
		c, err := parseCondition(text)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func usage(f *flag.FlagSet) {
	out := f.Output()
	fmt.Fprint(out, "usage: bench [flags], as root\n\nMeasures ways from a laptop to a service side by side, and prints a table for each link.\nCtrl-C ends it with what was measured so far.\n\n")
	f.PrintDefaults()
	fmt.Fprint(out, "\npaths:\n")
	for _, p := range allPaths() {
		fmt.Fprintf(out, "  %-18s %s\n", p.name, p.what)
	}
}

func allPaths() []path {
	return slices.Concat(paths, hubPaths, agentPaths(0), namePaths, carrierPaths(), clusterPaths)
}

// known are names of paths, of which there is each.
func known(names string) (all []string, err error) {
	for name := range strings.FieldsFuncSeq(names, func(r rune) bool { return r == ',' }) {
		if !slices.ContainsFunc(allPaths(), func(p path) bool { return p.name == name }) {
			return nil, fmt.Errorf("no path %q", name)
		}
		all = append(all, name)
	}
	return all, nil
}

// choose are those to be measured: by name, or what is always.
func choose(of []path, names []string, c condition) []path {
	return slices.DeleteFunc(slices.Clone(of), func(p path) bool {
		if len(names) > 0 {
			return !slices.Contains(names, p.name)
		}
		return p.when != nil && !p.when(c)
	})
}

// able leaves out, and says so, what lacks something that is not to be installed.
func (b *bench) able(of []path) []path {
	return slices.DeleteFunc(of, func(p path) bool {
		if p.lacks == nil || p.lacks(b.self) == "" {
			return false
		}
		b.report.note(p.name + " is left out: " + p.lacks(b.self))
		return true
	})
}

func benchMain(ctx context.Context, args []string) (err error) {
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root, to make network namespaces")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	clean, err := guarded(self)
	if err != nil {
		return err
	}
	r := &report{Time: time.Now().UTC().Truncate(time.Second), Machine: machine(), Command: strings.Join(append([]string{"bin/bench"}, args...), " "),
		Seconds: o.seconds, Rounds: o.rounds}
	err = measureAll(ctx, &bench{self: self, seconds: o.seconds, report: r}, o)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		r.note("ended before its time")
		err = nil
	}
	if len(r.Series) > 0 { // before what takes its time
		err = errors.Join(err, r.write(os.Stdout), r.save(o.out))
	}
	return errors.Join(err, clean())
}

// measureAll fills a report, as far as it comes.
func measureAll(ctx context.Context, b *bench, o options) error {
	if err := errors.Join(allowFiles(), os.MkdirAll(scratch, 0o700)); err != nil {
		return err
	}
	var wanted []path
	if o.cluster || o.crowd {
		wanted = choose(slices.Concat(clusterPaths, namesOfCluster), o.paths, condition{})
	}
	for _, c := range o.conditions {
		wanted = append(wanted, choose(slices.Concat(paths, hubPaths, namePaths), o.paths, c)...)
	}
	if len(wanted) > 0 {
		wanted = append(wanted, path{needs: []string{"iperf3"}})
	}
	if len(o.ships) > 0 {
		wanted = append(wanted, choose(carrierPaths(), o.paths, condition{})...)
	}
	if err := missing(wanted); err != nil {
		return err
	}
	if len(o.conditions)+len(o.ships)+o.hosts > 0 {
		if err := b.inNamespaces(ctx, o); err != nil {
			return err
		}
	}
	if !o.cluster && !o.crowd || len(choose(slices.Concat(clusterPaths, namesOfCluster), o.paths, condition{})) == 0 {
		return nil
	}
	return b.onCluster(ctx, o)
}

// inNamespaces measures on each link.
func (b *bench) inNamespaces(ctx context.Context, o options) error {
	if err := errors.Join(build(), writeKeys()); err != nil {
		return err
	}
	b.service = host(service)
	if _, err := start(b.service, "serve", b.self, "serve"); err != nil {
		return err
	}
	for _, c := range o.conditions {
		if err := b.onLink(ctx, c, o); err != nil {
			return fmt.Errorf("link %v: %w", c, err)
		}
	}
	if err := b.onShips(ctx, o); err != nil {
		return err
	}
	if o.hosts == 0 {
		return nil
	}
	fine := func() error { return nil }
	return b.series(ctx, fmt.Sprintf("%d hosts at one hub", o.hosts), "hub-hosts", "hosts-ssh", choose(agentPaths(o.hosts), o.paths, condition{}), onAgents, o.rounds, fine)
}

// onLink leaves out of imperfect links what does not depend on them.
func (b *bench) onLink(ctx context.Context, c condition, o options) error {
	of, hubs, names := b.able(choose(paths, o.paths, c)), b.able(choose(hubPaths, o.paths, c)), b.able(choose(namePaths, o.paths, c))
	if len(of)+len(hubs)+len(names) == 0 {
		return nil
	}
	l, err := openLink(ctx, b.self, c)
	if err != nil {
		return err
	}
	visits := [][]probe{memory, slices.Concat(bulk, small, after)}
	if !c.perfect() {
		visits = [][]probe{slices.Concat(settled, small)}
	}
	err = b.series(ctx, c.words(), "link-"+c.file(), o.base, of, visits, o.rounds, l.alive)
	if err == nil {
		err = b.series(ctx, "a host behind a hub, "+c.words(), "hub-"+c.file(), "hub-sshd", hubs, onHub(c), o.rounds, l.alive)
	}
	if err == nil {
		err = b.series(ctx, "10,000 names, "+c.words(), "names-"+c.file(), "dnsmasq", names, [][]probe{onNames}, o.rounds, l.alive)
	}
	return errors.Join(err, l.close())
}

// series measures paths in turns, so that what else the machine does meets all of
// them. What fails is noted, and the others go on.
func (b *bench) series(ctx context.Context, title, file, base string, of []path, visits [][]probe, rounds int, alive func() error) error {
	if len(of) == 0 {
		return nil
	}
	s := b.report.begin(title, file, base)
	for round := range rounds {
		for _, p := range of {
			fmt.Fprintf(os.Stderr, "%s, round %d of %d: %s\n", s.Title, round+1, rounds, p.what)
			for _, loads := range visits {
				err := errors.Join(b.visit(ctx, p, loads, s.outcome(p.name)), alive())
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					s.Failures = append(s.Failures, fmt.Sprintf("%s: %v", p.name, err))
				}
			}
		}
	}
	return nil
}

// visit opens a path and puts loads on it, whichever of them fail.
func (b *bench) visit(ctx context.Context, p path, loads []probe, to *outcome) (err error) {
	t, err := p.open(ctx, b.self)
	if t != nil {
		defer func() { err = errors.Join(err, t.close()) }()
	}
	if err != nil {
		return err
	}
	t.many = p.many
	first, err := t.ready(ctx, b.self)
	if err != nil {
		return err
	}
	to.add(first)
	var failures []error
	for _, load := range loads {
		s, err := load.run(b, ctx, t)
		to.add(s)
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", load.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	if t.check != nil { // still
		failures = append(failures, t.check(ctx))
	}
	return errors.Join(failures...)
}
