// Bench is "make bench": ways from a laptop to a service, side by side in one
// run, on a link that is made slow.
//
//	bench [-paths ssh,culvert-ssh] [-rtt 0,20ms,80ms] [-loss 0] [-seconds 2] [-rounds 3] [-base ssh] [-out DIR]
//
// Figures of one machine, at one time, compare with nothing; so all paths are
// measured in turn, round by round, and what is read from the table are ratios.
//
// Laptop, far end and service are network namespaces of the bench's own, and
// need no cluster. culvert's data path is put together there of the product's
// rooms (ends.go): what a wire, a netstack and a TUN cost, without Kubernetes.
// Nothing is remembered of what was made: whatever has the bench's name is
// cleaned away, at the end and before the start, however the last one ended.
//
// The files are in the order of a run: world.go and link.go make hosts and link,
// path.go opens a way, measure.go and load.go put loads on it, report.go and
// svg.go show what came out.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// roles are what the bench runs itself as, on its hosts.
var roles = map[string]func(context.Context, []string) error{
	"relay": relayMain, "far": farMain, "near": nearMain, "serve": serveMain, "load": loadMain,
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	run := benchMain
	args := os.Args[1:]
	if len(args) > 0 && roles[args[0]] != nil {
		run, args = roles[args[0]], args[1:]
	}
	if err := run(ctx, args); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench: error:", err)
		os.Exit(1)
	}
}

// options are what is asked of a run.
type options struct {
	paths      []path
	conditions []condition
	seconds    float64
	rounds     int
	base, out  string
}

func parseOptions(args []string) (o options, err error) {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	names := f.String("paths", "", "paths to measure, by comma (all of them)")
	rtts := f.String("rtt", "0,20ms,80ms", "round trips of the link")
	losses := f.String("loss", "0", "losses of the link, in percent; needs the kernel's netem")
	f.Float64Var(&o.seconds, "seconds", 2, "of one load; whole ones")
	f.IntVar(&o.rounds, "rounds", 3, "rounds that medians are taken of")
	f.StringVar(&o.base, "base", "ssh", "path that ratios are to")
	f.StringVar(&o.out, "out", "", "folder for JSON and plots (none)")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.seconds < 1 || o.seconds != float64(int(o.seconds)) || o.rounds < 1 || f.NArg() > 0 {
		return o, errors.New("want whole -seconds and -rounds of at least one, and nothing but flags")
	}
	if o.paths, err = choose(*names); err != nil {
		return o, err
	}
	o.conditions, err = conditions(*rtts, *losses)
	return o, err
}

// choose is paths by name, in the order of the table.
func choose(names string) ([]path, error) {
	if names == "" {
		return paths, nil
	}
	var chosen []path
	wanted := strings.Split(names, ",")
	for _, p := range paths {
		if slices.Contains(wanted, p.name) {
			chosen = append(chosen, p)
		}
	}
	for _, name := range wanted {
		if !slices.ContainsFunc(paths, func(p path) bool { return p.name == name }) {
			return nil, fmt.Errorf("no path %q", name)
		}
	}
	return chosen, nil
}

// conditions are those of each loss with each round trip.
func conditions(rtts, losses string) (all []condition, err error) {
	for l := range strings.SplitSeq(losses, ",") {
		loss, err := strconv.ParseFloat(l, 64)
		if err != nil || loss < 0 || loss > 100 {
			return nil, fmt.Errorf("no percentage: %q", l)
		}
		for r := range strings.SplitSeq(rtts, ",") {
			rtt, err := time.ParseDuration(r)
			if err != nil || rtt < 0 {
				return nil, fmt.Errorf("no round trip: %q", r)
			}
			all = append(all, condition{rtt, loss})
		}
	}
	return all, nil
}

func benchMain(ctx context.Context, args []string) (err error) {
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root, to make network namespaces")
	}
	if err := missing(o.paths); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	release, err := one()
	if err != nil {
		return err
	}
	defer release()
	defer func() { err = errors.Join(err, clean()) }()
	r := &report{Time: time.Now().UTC().Truncate(time.Second), Machine: machine(), Command: strings.Join(append([]string{"bin/bench"}, args...), " "),
		Seconds: o.seconds, Rounds: o.rounds, Base: o.base}
	if err := measureAll(ctx, &bench{self: self, seconds: o.seconds}, o, r); err != nil {
		return err
	}
	r.write(os.Stdout)
	if o.out != "" {
		return r.save(o.out)
	}
	return nil
}

// measureAll fills a report. Paths take turns, so that what else the machine does
// meets all of them.
func measureAll(ctx context.Context, b *bench, o options, r *report) error {
	if err := errors.Join(build(), writeKeys()); err != nil {
		return err
	}
	for name, args := range map[string][]string{
		"serve": {b.self, "serve"}, "iperf3": {"iperf3", "-s", "-p", strconv.Itoa(iperfPort)},
	} {
		if _, err := start(service, name, args...); err != nil {
			return err
		}
	}
	netem := hasNetem()
	for _, c := range o.conditions {
		s, err := b.series(ctx, o, c, netem, r)
		if err != nil {
			return fmt.Errorf("%v: %w", c, err)
		}
		r.Series = append(r.Series, s)
	}
	return nil
}

func (b *bench) series(ctx context.Context, o options, c condition, netem bool, r *report) (series, error) {
	l, err := openLink(b.self, c, netem)
	if err != nil {
		return series{}, err
	}
	defer l.close()
	s := series{RTTms: float64(c.RTT) / float64(time.Millisecond), Loss: c.Loss, By: l.By}
	for round := range o.rounds {
		for _, p := range o.paths {
			fmt.Fprintf(os.Stderr, "%s, round %d of %d: %s\n", s, round+1, o.rounds, p.what)
			for _, loads := range visits {
				err := b.visit(ctx, p, l, loads, s.outcome(p.name))
				if ctx.Err() != nil {
					return s, ctx.Err()
				}
				if err != nil {
					r.Failures = append(r.Failures, fmt.Sprintf("%s, %s: %v", p.name, s, err))
				}
			}
		}
	}
	return s, nil
}

// visit opens a path and puts loads on it, whichever of them fail.
func (b *bench) visit(ctx context.Context, p path, l *link, loads []probe, to *outcome) (err error) {
	t, err := p.open(b.self, l)
	if t != nil {
		defer func() { err = errors.Join(err, t.close()) }()
	}
	if err != nil {
		return err
	}
	if err := t.ready(ctx, b.self); err != nil {
		return err
	}
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
	return errors.Join(failures...)
}
