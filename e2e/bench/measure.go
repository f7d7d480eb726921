package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
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
	{"cpu-up1", "CPU of both ends, 1 stream up", "s/GB", false},
	{"cpu-down1", "CPU of both ends, 1 stream down", "s/GB", false},
	{"p50", "request/response, p50", "us", false},
	{"p99", "request/response, p99", "us", false},
	{"opened", "new connections", "/s", true},
	{"rss-near", "RSS of the laptop's end", "MB", false},
	{"rss-near-held", "same, 1,000 open flows", "MB", false},
	{"rss-far", "RSS of the far end", "MB", false},
	{"rss-far-held", "same, 1,000 open flows", "MB", false},
}

// A bench is what a probe works with.
type bench struct {
	self    string
	seconds float64 // of one load
}

// A probe puts one load on a tunnel.
type probe struct {
	name string
	run  func(b *bench, ctx context.Context, t *tunnel) (sample, error)
}

// visits are the loads that a tunnel gets before it is opened anew: loads grow
// memory, and OpenSSH gets slower by every flow that it has had open at once.
var visits = [][]probe{{
	{"memory", (*bench).memory},
}, {
	{"1 stream up", stream("up1", 1, false)},
	{"1 stream down", stream("down1", 1, true)},
	{"8 streams up", stream("up8", 8, false)},
	{"8 streams down", stream("down8", 8, true)},
	{"request/response", (*bench).requests},
	{"new connections", (*bench).connections},
}}

// grace is what a load may take longer than it was told to.
const grace = 20 * time.Second

func (b *bench) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, grace+time.Duration(b.seconds*float64(time.Second)))
}

func stream(key string, n int, down bool) func(*bench, context.Context, *tunnel) (sample, error) {
	return func(b *bench, ctx context.Context, t *tunnel) (sample, error) {
		ctx, cancel := b.bounded(ctx)
		defer cancel()
		ip, port := t.reach(iperfPort)
		args := []string{"iperf3", "-J", "-c", ip, "-p", fmt.Sprint(port), "-t", fmt.Sprintf("%.0f", b.seconds), "-P", fmt.Sprint(n)}
		if down {
			args = append(args, "-R")
		}
		before, from := cpu(t.ends()), crossed()
		out, err := output(ctx, laptop, args...)
		used, bytes := cpu(t.ends())-before, crossed()-from
		rate, parseErr := parseIperf(out)
		if parseErr != nil {
			return nil, errors.Join(parseErr, err)
		}
		s := sample{key: rate / 1e9}
		if len(t.ends()) > 0 && n == 1 {
			s["cpu-"+key] = used.Seconds() / (bytes / 1e9)
		}
		return s, nil
	}
}

// crossed is how many bytes have come to the service and left it. iperf3's own
// count leaves out what was on its way when time was up, and has cost CPU, too.
func crossed() float64 {
	out, err := output(context.Background(), service, "cat", "/proc/net/dev")
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

// parseIperf finds the bits per second in what "iperf3 -J" said: those that were
// received, for what was sent may still be on its way.
func parseIperf(out []byte) (float64, error) {
	var r struct {
		Error string
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return 0, fmt.Errorf("read iperf3's JSON: %w", err)
	}
	if r.Error != "" {
		return 0, fmt.Errorf("iperf3: %s", r.Error)
	}
	if r.End.Received.BitsPerSecond <= 0 {
		return 0, errors.New("iperf3: nothing was received")
	}
	return r.End.Received.BitsPerSecond, nil
}

func (b *bench) load(ctx context.Context, t *tunnel, which string, port int) (s sample, err error) {
	ctx, cancel := b.bounded(ctx)
	defer cancel()
	ip, p := t.reach(port)
	out, err := output(ctx, laptop, b.self, "load", which, address(ip, p), fmt.Sprint(b.seconds))
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

// memory is that of both ends, before and while many flows are open.
func (b *bench) memory(ctx context.Context, t *tunnel) (sample, error) {
	if len(t.ends()) == 0 {
		return nil, nil
	}
	ctx, cancel := b.bounded(ctx)
	defer cancel()
	s := sample{"rss-near": rss(t.near), "rss-far": rss(t.far)}
	ip, port := t.reach(echoPort)
	c := onHost(ctx, laptop, b.self, "load", "hold", address(ip, port))
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
		s["rss-near-held"], s["rss-far-held"] = rss(t.near), rss(t.far)
	}
	_ = stdin.Close()
	if e := c.Wait(); e != nil && err == nil {
		err = e
	}
	return s, err
}
