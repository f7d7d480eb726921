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
	{"p50", "request/response, p50", "us", false},
	{"p99", "request/response, p99", "us", false},
	{"opened", "new connections", "/s", true},
	{"first", "start to first byte", "s", false},
	{"rss-near", "RSS of the laptop's end", "MB", false},
	{"rss-near-held", "same, 1,000 open flows", "MB", false},
	{"rss-near-after", "same, after all loads", "MB", false},
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
	after   = probe{"memory after all", (*bench).memoryAfter}
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
		before, from := cpu(t.ends()), b.crossed()
		out, err := output(ctx, t.at, b.iperf(t, n, way, settled)...)
		used, bytes := cpu(t.ends())-before, b.crossed()-from
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

// memory is that of both ends, before and while many flows are open.
func (b *bench) memory(ctx context.Context, t *tunnel) (sample, error) {
	if len(t.ends()) == 0 {
		return nil, nil
	}
	ctx, cancel := b.bounded(ctx, grace)
	defer cancel()
	s := t.memory("")
	ip, port := t.reach(echoPort)
	c := onHost(ctx, t.at, b.self, "load", "hold", address(ip, port))
	stdin, err := c.StdinPipe()
	if err != nil {
		return s, err
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		return s, err
	}
	if err := c.Start(); err != nil {
		return s, err
	}
	_, err = bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		err = fmt.Errorf("hold %d flows: %w", held, err)
	} else {
		maps.Copy(s, t.memory("-held"))
	}
	_ = stdin.Close()
	if e := c.Wait(); e != nil && err == nil {
		err = e
	}
	return s, err
}

func (t *tunnel) memory(when string) sample {
	s := sample{"rss-near" + when: rss(t.near)}
	if len(t.far) > 0 {
		s["rss-far"+when] = rss(t.far)
	}
	return s
}
