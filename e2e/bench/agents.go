package main

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/hub"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Many hosts at one hub: what they cost it while nothing is asked of them, with
// connections open, and when it has died and all come at once. The hub is at the far end,
// the hosts are beside the service, in one process, and the clients on the laptop, with a
// connection each.

const (
	agentPort  = 7 // that each offers, which echoes
	eachHolds  = 10
	agentsTime = 5 * time.Minute // for all to come
)

func agentPaths(hosts int) []path {
	return []path{
		{name: "hosts-ssh", what: "many hosts at one hub, over SSH as stock clients", open: openAgents("ssh", hosts)},
		{name: "hosts-agent", what: "many hosts at one hub, with culvert agent", open: openAgents("tls", hosts)},
	}
}

var onAgents = [][]probe{{{"hosts at rest", (*bench).resting}, {"the hub is killed", (*bench).killed}}}

func nthHost(n int) string { return fmt.Sprintf("host-%d", n) }

// nthKey is anybody's who knows the number.
func nthKey(n int) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(nthHost(n)))
	return ed25519.NewKeyFromSeed(seed[:])
}

// openAgents starts a hub, and then hosts.
func openAgents(wire string, hosts int) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, self string) (*tunnel, error) {
		if err := writeRights(hosts); err != nil {
			return nil, err
		}
		bySOCKS := []string{"env", "ALL_PROXY=socks5h://" + address(farIP, hubPort)}
		t := &tunnel{at: host(laptop), hosts: hosts, reach: func(int) (string, int) { return nthHost(0), agentPort }}
		t.at.enter = append(t.at.enter, bySOCKS...)
		if err := t.startHub(ctx, self); err != nil {
			return t, err
		}
		var err error
		if t.before, err = t.ofHub(ctx, self); err != nil {
			return t, err
		}
		t.begun = time.Now()
		p, err := start(host(service), "agents", self, "agents", "-keys", scratch, "-wire", wire, "-hub", address("10.211.2.1", hubPort), strconv.Itoa(hosts))
		if err == nil {
			t.near = []*process{p}
		}
		return t, err
	}
}

func (t *tunnel) startHub(ctx context.Context, self string) error {
	p, err := startHub(host(far), self)
	if err != nil {
		return err
	}
	t.far, t.hub = []*process{p}, []*process{p}
	return listening(ctx, p, hubPort)
}

// ofHub is what a hub says of itself, and the kernel of it.
func (t *tunnel) ofHub(ctx context.Context, self string) (s sample, err error) {
	out, err := output(ctx, t.hub[0].at, self, "load", "stats", address("127.0.0.1", statsPort))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return nil, err
	}
	s["rss"], s["cpu"] = rss(t.hub), cpu(t.hub).Seconds()
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", t.hub[0].cmd.Process.Pid))
	s["files"], s["wakes"] = float64(len(files)), wakes(t.hub[0].cmd.Process.Pid)
	return s, nil
}

// wakes is how often threads of a process have been woken.
func wakes(pid int) (sum float64) {
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, path := range all {
		b, _ := os.ReadFile(path)
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
				n, _ := strconv.ParseFloat(strings.TrimSpace(rest), 64)
				sum += n
			}
		}
	}
	return sum
}

// allThere waits until every host is attached.
func (t *tunnel) allThere(ctx context.Context, self string) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, agentsTime)
	defer cancel()
	for {
		s, err := t.ofHub(ctx, self)
		if err != nil || s["attached"] >= float64(t.hosts) {
			return s, err
		}
		if !sleep(ctx, time.Now().Add(100*time.Millisecond)) {
			return s, fmt.Errorf("%.0f of %d hosts are there: %w", s["attached"], t.hosts, ctx.Err())
		}
	}
}

// resting is what hosts cost while nothing is asked of them, without connections and with.
func (b *bench) resting(ctx context.Context, t *tunnel) (sample, error) {
	came, err := t.allThere(ctx, b.self)
	if err != nil {
		return nil, err
	}
	s := sample{"host-cpu-come": (came["cpu"] - t.before["cpu"]) * 1000 / float64(t.hosts)}
	if err := b.rest(ctx, t, s, ""); err != nil {
		return s, err
	}
	var failed error
	err = b.holdingHosts(ctx, t, func() { failed = b.rest(ctx, t, s, "-held") })
	return s, errors.Join(err, failed)
}

// rest is what each of the hosts costs now.
func (b *bench) rest(ctx context.Context, t *tunnel, to sample, when string) error {
	sleep(ctx, time.Now().Add(calmTime))
	began, err := t.ofHub(ctx, b.self)
	if err != nil {
		return err
	}
	sleep(ctx, time.Now().Add(idleTime))
	s, err := t.ofHub(ctx, b.self)
	if err != nil {
		return err
	}
	n := float64(t.hosts)
	maps.Copy(to, sample{
		"host-rss" + when: (s["rss"] - t.before["rss"]) * 1000 / n, "host-heap" + when: (s["heap"] - t.before["heap"]) * 1000 / n,
		"host-stacks" + when:     (s["stacks"] - t.before["stacks"]) * 1000 / n,
		"host-goroutines" + when: (s["goroutines"] - t.before["goroutines"]) / n, "host-files" + when: (s["files"] - t.before["files"]) / n,
		"hub-idle" + when: (s["cpu"] - began["cpu"]) / idleTime.Minutes(), "hub-wakes" + when: (s["wakes"] - began["wakes"]) / idleTime.Seconds(),
	})
	return nil
}

// deadFor is how long a hub that was killed is away.
const deadFor = 2 * time.Second

// killed kills the hub, and starts another in its place.
func (b *bench) killed(ctx context.Context, t *tunnel) (sample, error) {
	_ = t.hub[0].cmd.Process.Kill()
	<-t.hub[0].done
	sleep(ctx, time.Now().Add(deadFor))
	if err := t.startHub(ctx, b.self); err != nil {
		return nil, err
	}
	s, err := t.allThere(ctx, b.self)
	if err != nil {
		return nil, err
	}
	return sample{"rush-peak": s["rush-peak"] / s["rush-mean"], "rush-rate": s["rush-peak"] / rush.Seconds(), "rush-accepted": s["rush-accepted"], "rush-seconds": s["rush-seconds"], "rush-cpu": s["cpu"]}, nil
}

// holdingHosts has connections to every host open meanwhile.
func (b *bench) holdingHosts(ctx context.Context, t *tunnel, meanwhile func()) error {
	return whileHeld(ctx, t.at, agentsTime, meanwhile, b.self, "load", "hosts", strconv.Itoa(t.hosts))
}

// holdHosts opens them, says so by a line, and holds them until stdin ends.
func holdHosts(ctx context.Context, hosts int) error {
	return holdAll(ctx, hosts*eachHolds, func(ctx context.Context, i int) (net.Conn, error) {
		return dialEcho(ctx, address(nthHost(i/eachHolds), agentPort), dialTime)
	})
}

// hubStats asks a hub for what it says of itself.
func hubStats(ctx context.Context, at string) (s sample, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at+"/", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return s, json.NewDecoder(resp.Body).Decode(&s)
}

// agentsMain is the role "agents": so many hosts.
func agentsMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("agents", flag.ContinueOnError)
	keys := f.String("keys", "", "folder of the keys")
	at := f.String("hub", "", "address")
	wire := f.String("wire", "", "tls or ssh")
	if err := f.Parse(args); err != nil {
		return err
	}
	hosts, err := strconv.Atoi(f.Arg(0))
	if err != nil {
		return err
	}
	cfg, err := agentOf(*keys, *at)
	if err != nil {
		return err
	}
	known, err := ssh.NewPublicKey(cfg.HostKey)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for n := range hosts {
		if *wire == "ssh" {
			g.Go(func() error { return overSSHWire(ctx, cfg.Dial, known, n) })
			continue
		}
		mine := cfg
		mine.Key, mine.Name = nthKey(n), nthHost(n)
		mine.Offers = []hub.Offer{{Network: "tcp", Port: strconv.Itoa(agentPort), To: address("127.0.0.1", quietPort)}}
		mine.Log = slog.New(slog.DiscardHandler)
		g.Go(func() error { return hub.NewAgent(mine).Run(ctx) })
	}
	return g.Wait()
}

// overSSHWire is a host as autossh makes one, which dials again.
func overSSHWire(ctx context.Context, dial func(context.Context) (net.Conn, error), known ssh.PublicKey, n int) error {
	signer, err := ssh.NewSignerFromKey(nthKey(n))
	if err != nil {
		return err
	}
	for failures := time.Duration(0); ctx.Err() == nil; failures++ {
		if err := attachOnce(ctx, dial, sshchan.Config{Identity: sshchan.Identity{Key: signer, Peer: known}, User: nthHost(n), Keepalive: 6 * time.Second}); err == nil {
			failures = 0
		}
		sleep(ctx, time.Now().Add(min(failures, 10)*time.Second))
	}
	return nil
}

func attachOnce(ctx context.Context, dial func(context.Context) (net.Conn, error), cfg sshchan.Config) error {
	conn, err := dial(ctx)
	if err != nil {
		return err
	}
	ch, err := sshchan.Dial(ctx, conn, cfg)
	if err != nil {
		return err
	}
	defer ch.Close()
	l, err := ch.Listen(ctx, "tcp", address(cfg.User, agentPort))
	if err != nil {
		return err
	}
	_ = relay.Forward(ctx, l, &channel.Host{}, "tcp", address("127.0.0.1", quietPort))
	return nil
}
