package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"strconv"
	"strings"
	"time"
)

// A sample is what one probe found, by the keys of measures.
type sample map[string]float64

// A measure is a line of the table.
type measure struct {
	Key, Name, Unit string
	more            bool // more is better
}

var measures = []measure{
	{"up1", "1 stream up", "Gbit/s", true},
	{"down1", "1 stream down", "Gbit/s", true},
	{"up8", "8 streams up", "Gbit/s", true},
	{"down8", "8 streams down", "Gbit/s", true},
	{"up4", "4 streams up", "Gbit/s", true},
	{"down4", "4 streams down", "Gbit/s", true},
	{"cpu-up1", "CPU of both ends, 1 stream up", "s/GB", false},
	{"cpu-down1", "CPU of both ends, 1 stream down", "s/GB", false},
	{"cpu-hub-up1", "CPU of the hub, 1 stream up", "s/GB", false},
	{"cpu-hub-down1", "CPU of the hub, 1 stream down", "s/GB", false},
	{"p50", "request/response, p50", "us", false},
	{"p99", "request/response, p99", "us", false},
	{"asked", "requests, 16 at a time", "/s", true},
	{"opened", "new connections", "/s", true},
	{"byte-p50", "first byte of a new connection, p50", "ms", false},
	{"first", "start to first byte", "s", false},
	{"names-1", "answers, 1 asker", "/s", true},
	{"names-16", "answers, 16 askers", "/s", true},
	{"names-64", "answers, 64 askers", "/s", true},
	{"names-tcp", "answers over TCP, 16 askers", "/s", true},
	{"names-p50-1", "1 asker, p50", "us", false},
	{"names-p99-1", "1 asker, p99", "us", false},
	{"names-p50-16", "16 askers, p50", "us", false},
	{"names-p99-16", "16 askers, p99", "us", false},
	{"names-p50-64", "64 askers, p50", "us", false},
	{"names-p99-64", "64 askers, p99", "us", false},
	{"rss-near", "RSS of the laptop's end", "MB", false},
	{"rss-near-held", "same, 1,000 open flows", "MB", false},
	{"rss-near-after", "same, after all loads", "MB", false},
	{"rss-near-later", "same, 100,000 flows later", "MB", false},
	{"host-rss", "RSS of the hub for each host, idle", "kB", false},
	{"host-rss-held", "same, 10 open connections each", "kB", false},
	{"host-heap", "of it heap in use, idle", "kB", false},
	{"host-heap-held", "same, 10 open connections each", "kB", false},
	{"host-stacks", "of it stacks, idle", "kB", false},
	{"host-stacks-held", "same, 10 open connections each", "kB", false},
	{"host-goroutines", "goroutines for each host, idle", "", false},
	{"host-goroutines-held", "same, 10 open connections each", "", false},
	{"host-files", "descriptors for each host, idle", "", false},
	{"host-files-held", "same, 10 open connections each", "", false},
	{"hub-idle", "CPU of the hub, idle", "s/min", false},
	{"hub-idle-held", "same, 10 open connections each", "s/min", false},
	{"hub-wakes", "threads of the hub woken, idle", "/s", false},
	{"hub-wakes-held", "same, 10 open connections each", "/s", false},
	{"host-cpu-come", "CPU of the hub for a host to come", "ms", false},
	{"rush-seconds", "after kill -9: first connection to all hosts there", "s", false},
	{"rush-peak", "same, most connections in 100 ms by the mean", "", false},
	{"rush-rate", "same, most connections in 100 ms", "/s", false},
	{"rush-accepted", "same, connections", "", false},
	{"rush-cpu", "same, CPU of the hub", "s", false},
	{"ship-login", "ssh HOST true, alone", "s", false},
	{"ship-all", "all files", "s", false},
	{"ship-some", "then 3 of them changed", "s", false},
	{"known", "start to all names known", "s", false},
	{"idle", "CPU of the laptop's end, idle", "s/min", false},
	{"idle-held", "same, 1,000 open flows", "s/min", false},
	{"rss-far", "RSS of the far end", "MB", false},
	{"rss-far-held", "same, 1,000 open flows", "MB", false},
}

// A bench is what a probe works with.
type bench struct {
	self    string
	seconds float64 // of one load
	service place   // who is asked
	report  *report
}

// A probe puts one load on a tunnel.
type probe struct {
	name string
	run  func(b *bench, ctx context.Context, t *tunnel) (sample, error)
}

// Of several visits to a path, each opens it anew: loads grow memory, and OpenSSH
// gets slower by every flow that it has had open at once.
var (
	memory = []probe{{"memory", (*bench).memory}}
	bulk   = streams(false)
	// settled leaves out the second in which windows and rates are found.
	settled = streams(true)
	small   = []probe{{"request/response", (*bench).requests}, {"new connections", (*bench).connections}}
	after   = []probe{{"memory after all", (*bench).memoryAfter}, {"memory later", (*bench).memoryLater}}
)

func streams(settled bool) []probe {
	return []probe{
		{"1 stream up", stream("up", 1, settled)},
		{"1 stream down", stream("down", 1, settled)},
		{"several streams up", stream("up", 0, settled)},
		{"several streams down", stream("down", 0, settled)},
	}
}

// grace is what a load may take longer than it was told to. A stream has moved
// what counts long before.
const (
	grace       = 20 * time.Second
	streamGrace = 10 * time.Second
)

func (b *bench) bounded(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, grace+time.Duration(b.seconds*float64(time.Second)))
}

// stream puts n streams on a tunnel, or as many as its place has as several.
func stream(way string, n int, settled bool) func(*bench, context.Context, *tunnel) (sample, error) {
	return func(b *bench, ctx context.Context, t *tunnel) (sample, error) {
		ctx, cancel := b.bounded(ctx, streamGrace)
		defer cancel()
		// One for each load: one that was broken off keeps its server busy.
		server, err := start(b.service, "iperf3", "iperf3", "-f", "k", "--forceflush", "-s", "-1", "-p", strconv.Itoa(iperfPort))
		if err != nil {
			return nil, err
		}
		defer server.stop()
		if err := listening(ctx, server, iperfPort); err != nil {
			return nil, err
		}
		n := cmp.Or(n, t.several)
		key := way + strconv.Itoa(n)
		before, hub, from := cpu(t.ends()), cpu(t.hub), b.crossed()
		out, err := output(ctx, t.at, b.iperf(t, n, way, settled)...)
		used, ofHub, bytes := cpu(t.ends())-before, cpu(t.hub)-hub, b.crossed()-from
		if way == "up" {
			out, _ = os.ReadFile(server.log)
		}
		rate, parseErr := parseIperf(string(out), n, b.seconds)
		if parseErr != nil {
			return nil, errors.Join(parseErr, err)
		}
		s := sample{key: rate / 1e9}
		if len(t.far) > 0 && n == 1 {
			s["cpu-"+key] = used.Seconds() / (bytes / 1e9)
		}
		if len(t.hub) > 0 && n == 1 {
			s["cpu-hub-"+key] = ofHub.Seconds() / (bytes / 1e9)
		}
		return s, nil
	}
}

func (b *bench) iperf(t *tunnel, n int, way string, settled bool) []string {
	ip, port := t.reach(iperfPort)
	args := []string{"iperf3", "-f", "k", "--forceflush", "-c", ip, "-p", strconv.Itoa(port), "-t", fmt.Sprintf("%.0f", b.seconds), "-P", strconv.Itoa(n)}
	if way == "down" {
		args = append(args, "-R")
	}
	if settled {
		args = append(args, "-O", "1")
	}
	return append(args, "-C", cmp.Or(t.congestion, "cubic"))
}

// crossed is how many bytes have come to the service and left it. iperf3's own
// count leaves out what was on its way when time was up, and has cost CPU, too.
func (b *bench) crossed() float64 {
	out, err := output(context.Background(), b.service, "cat", "/proc/net/dev")
	if err != nil {
		return math.NaN()
	}
	return parseDev(string(out), "eth0")
}

// parseDev reads the bytes of a device, both ways, from /proc/net/dev.
func parseDev(table, dev string) float64 {
	for line := range strings.Lines(table) {
		name, rest, _ := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if strings.TrimSpace(name) != dev || len(fields) < 9 {
			continue
		}
		in, _ := strconv.ParseFloat(fields[0], 64)
		out, _ := strconv.ParseFloat(fields[8], 64)
		return in + out
	}
	return math.NaN()
}

// parseIperf finds the bits per second in what iperf3 said where it received: the
// mean of so many seconds, a line each. Its sum at the end would need an end: it
// is long behind what a slow path still holds, and kubectl port-forward dies of
// the reset before it.
func parseIperf(out string, n int, seconds float64) (float64, error) {
	var sum, count float64
	for line := range strings.Lines(out) {
		if n > 1 != strings.HasPrefix(line, "[SUM]") || strings.Contains(line, "(omitted)") {
			continue
		}
		_, rest, _ := strings.Cut(line, "]")
		fields := strings.Fields(rest) // 0.00-1.00 sec 1000 KBytes 8192 Kbits/sec
		if len(fields) < 6 || fields[5] != "Kbits/sec" || count == seconds {
			continue
		}
		rate, err := strconv.ParseFloat(fields[4], 64)
		if err != nil {
			return 0, fmt.Errorf("read what iperf3 said: %w", err)
		}
		sum += rate * 1000
		count++
	}
	if count < seconds || sum == 0 {
		return 0, fmt.Errorf("iperf3: received nothing, or not for %g s: %s", seconds, lastLines(out))
	}
	return sum / count, nil
}

func (b *bench) load(ctx context.Context, t *tunnel, which string, port int) (s sample, err error) {
	ctx, cancel := b.bounded(ctx, grace)
	defer cancel()
	ip, p := t.reach(port)
	out, err := output(ctx, t.at, b.self, "load", which, address(ip, p), fmt.Sprint(b.seconds))
	if err != nil {
		return nil, err
	}
	return s, json.Unmarshal(out, &s)
}

func (b *bench) requests(ctx context.Context, t *tunnel) (sample, error) {
	return b.load(ctx, t, "ask", echoPort)
}

func (b *bench) connections(ctx context.Context, t *tunnel) (sample, error) {
	return b.load(ctx, t, "open", helloPort)
}

// memoryAfter is what the laptop's end has kept.
func (b *bench) memoryAfter(_ context.Context, t *tunnel) (sample, error) {
	if len(t.near) == 0 {
		return nil, nil
	}
	return sample{"rss-near-after": rss(t.near)}, nil
}

// laterLimit is for so many flows one after the other.
const laterLimit = 3 * time.Minute

// memoryLater is what the laptop's end has kept when many more flows have come and gone.
func (b *bench) memoryLater(ctx context.Context, t *tunnel) (sample, error) {
	if !t.many {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, laterLimit)
	defer cancel()
	ip, port := t.reach(helloPort)
	if _, err := output(ctx, t.at, b.self, "load", "pass", address(ip, port)); err != nil {
		return nil, err
	}
	return sample{"rss-near-later": rss(t.near)}, nil
}

// memory is that of both ends, before and while many flows are open.
func (b *bench) memory(ctx context.Context, t *tunnel) (sample, error) {
	if len(t.ends()) == 0 {
		return nil, nil
	}
	s := t.memory("")
	err := b.holding(ctx, t, func() { maps.Copy(s, t.memory("-held")) })
	return s, err
}

// idle is what the laptop's end needs while nothing is asked of it, before and while many
// flows are open.
func (b *bench) idle(ctx context.Context, t *tunnel) (sample, error) {
	s := t.idle(ctx, "")
	err := b.holding(ctx, t, func() { maps.Copy(s, t.idle(ctx, "-held")) })
	return s, err
}

// holding has many flows open meanwhile.
func (b *bench) holding(ctx context.Context, t *tunnel, meanwhile func()) error {
	ip, port := t.reach(echoPort)
	return whileHeld(ctx, t.at, grace, meanwhile, b.self, "load", "hold", address(ip, port))
}

// whileHeld runs a load that says by a line that it holds connections, which may take so
// long, and does so until its stdin ends.
func whileHeld(ctx context.Context, at place, limit time.Duration, meanwhile func(), args ...string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	late := time.AfterFunc(limit, cancel)
	c := onHost(ctx, at, args...)
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	_, err = bufio.NewReader(stdout).ReadString('\n')
	if late.Stop(); err != nil {
		err = fmt.Errorf("hold flows: %w", err)
	} else {
		meanwhile()
	}
	_ = stdin.Close()
	if e := c.Wait(); e != nil && err == nil {
		err = e
	}
	return err
}

const (
	calmTime = 3 * time.Second // for what was asked before
	idleTime = 30 * time.Second
)

func (t *tunnel) idle(ctx context.Context, when string) sample {
	sleep(ctx, time.Now().Add(calmTime))
	before := cpu(t.near)
	sleep(ctx, time.Now().Add(idleTime))
	used := cpu(t.near) - before
	s := t.memory(when)
	s["idle"+when] = used.Seconds() / idleTime.Minutes()
	return s
}

func (t *tunnel) memory(when string) sample {
	s := sample{"rss-near" + when: rss(t.near)}
	if len(t.far) > 0 {
		s["rss-far"+when] = rss(t.far)
	}
	return s
}
