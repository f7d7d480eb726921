package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	_ "net/http/pprof" // for who wants to know where it goes
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/hub"
)

// A host behind a hub is reached over the same link: the client is beside the hub, on the
// laptop, and the whole delay is between the hub and the host, which has dialled out from
// the far end. So what is measured is the wire that a host keeps, as which of several
// clients' wires a way ends with depends on what they have. Clients come by SOCKS5, where
// that is said; who they are is not asked.

const (
	hubPort   = 2024
	statsPort = 2025 // of the hub, for the bench
	hostName  = "host"
)

var hubPaths = []path{
	{name: "hub-none", what: "no hub: routed packets", when: whole, open: openDirect("")},
	{name: "hub-tls-each", what: "no hub: a TLS connection for each flow", when: whole, open: openEach("")},
	{name: "hub-sshd", what: "ssh -R to a stock sshd as jump host, a port of it for each of the host's", needs: openSSHTools, when: whole, open: openJumpHost},
	{name: "hub-ssh", what: "ssh -R to culvert hub, clients by SOCKS5", needs: openSSHTools, when: whole, open: openHub(stockHost(), nil)},
	{name: "hub-ssh-gcm", what: "the same with aes128-gcm", needs: openSSHTools, when: whole, open: openHub(stockHost("-c", "aes128-gcm@openssh.com"), nil)},
	{name: "hub-agent", what: "culvert agent at culvert hub, clients by SOCKS5", when: whole, open: openHub(agentHost, nil)},
	{name: "hub-agent-ssh", what: "the same, the client by ssh -L through the hub", needs: openSSHTools, when: whole, open: openHub(agentHost, stockClient)},
}

// onHub are the visits to a way by a hub. Over a delay what windows need to grow is left out.
func onHub(c condition) [][]probe {
	first := bulk
	if !c.perfect() {
		first = settled
	}
	return [][]probe{first, {{"request/response", (*bench).requests}, {"requests of several", (*bench).several}, {"new connections", (*bench).connections}, {"first byte", (*bench).firstByte}}}
}

func (b *bench) several(ctx context.Context, t *tunnel) (sample, error) {
	return b.load(ctx, t, "asks", echoPort)
}

func (b *bench) firstByte(ctx context.Context, t *tunnel) (sample, error) {
	return b.load(ctx, t, "byte", helloPort)
}

// openJumpHost is what people do without a hub.
func openJumpHost(ctx context.Context, _ string) (*tunnel, error) {
	t, err := behind(ctx, sshdPort, func() (*process, error) { return startSSHD(host(laptop), laptopIP) }, func() (*process, error) {
		return login{laptopIP, sshdPort, "far"}.forward(host(far), "ssh", "-R", "127.0.0.1", serviceIP)
	})
	t.reach = onLoopback
	return t, err
}

// behind starts a hub, and when that listens who is a host at it.
func behind(ctx context.Context, port int, hub, host func() (*process, error)) (*tunnel, error) {
	t, err := between(ctx, port, hub, host)
	t.near, t.far = t.far, t.near
	t.hub = t.near
	return t, err
}

// atHub is the hub as stock clients see it.
var atHub = login{laptopIP, hubPort, "hub"}

func agentHost(self string) (*process, error) {
	args := []string{self, "agent", "-keys", scratch, "-hub", address(laptopIP, hubPort)}
	for _, port := range forwarded {
		args = append(args, fmt.Sprintf("%d=%s", port, address(serviceIP, port)))
	}
	return start(host(far), "agent", args...)
}

func stockHost(flags ...string) func(string) (*process, error) {
	return func(string) (*process, error) {
		return atHub.forward(host(far), "ssh", "-R", hostName, serviceIP, flags...)
	}
}

func stockClient() (*process, error) {
	return atHub.forward(host(laptop), "ssh-client", "-L", "127.0.0.1", hostName)
}

// openHub has one host at a hub. Its clients come by SOCKS5, or by what is started for them.
func openHub(behindIt func(self string) (*process, error), client func() (*process, error)) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, self string) (*tunnel, error) {
		if err := writeRights(0); err != nil {
			return nil, err
		}
		t, err := behind(ctx, hubPort, func() (*process, error) { return startHub(host(laptop), self) }, func() (*process, error) { return behindIt(self) })
		if err != nil {
			return t, err
		}
		if client == nil {
			t.reach = toHost
			return t, bySOCKS(self, t, address("127.0.0.1", hubPort))
		}
		p, err := client()
		if err != nil {
			return t, err
		}
		t.near, t.reach = append(t.near[:1:1], p), onLoopback
		return t, nil
	}
}

func toHost(port int) (string, int) { return hostName, port }

func startHub(at place, self string) (*process, error) {
	return start(at, "hub", self, "hub", "-keys", scratch, "-listen", address("", hubPort), "-stats", address("127.0.0.1", statsPort))
}

// writeRights lets the bench's own key do all, everybody reach every host, and so many
// hosts be who they are.
func writeRights(hosts int) error {
	near, err := os.ReadFile(inScratch("near.pub"))
	if err != nil {
		return err
	}
	var text strings.Builder
	text.WriteString(`from="0.0.0.0/0",permitopen="*:*" anonymous` + "\n" + `permitopen="*:*",permitlisten="*:*" ` + string(near))
	for n := range hosts {
		key, err := ssh.NewPublicKey(nthKey(n).Public())
		if err != nil {
			return err
		}
		fmt.Fprintf(&text, "permitlisten=%q %s", nthHost(n)+":*", ssh.MarshalAuthorizedKey(key))
	}
	return os.WriteFile(inScratch("rights"), []byte(text.String()), 0o600)
}

// hubMain is the role "hub": what culvert hub runs, without a bound for one who is all
// clients at once. It tells about itself on a port of its own.
func hubMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("hub", flag.ContinueOnError)
	keys := f.String("keys", "", "folder of the keys")
	listen := f.String("listen", "", "address")
	stats := f.String("stats", "", "address of what it tells")
	if err := f.Parse(args); err != nil {
		return err
	}
	key, err := hub.ReadKey(filepath.Join(*keys, "hub"))
	if err != nil {
		return err
	}
	rights, err := hub.OpenFile(filepath.Join(*keys, "rights"), hub.ParseRights)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	w := &watched{Listener: l}
	h, err := hub.New(hub.Config{
		HostKey: key, Rights: rights.Now, Limits: hub.Limits{Streams: 1 << 20, Dials: 1 << 20},
		Audit: slog.New(w), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	go rights.Watch(ctx, func(error) { h.Recheck() })
	http.Handle("/", w)
	s := &http.Server{Addr: *stats}
	go func() { fmt.Fprintln(os.Stderr, "stats:", s.ListenAndServe()) }()
	defer s.Close()
	if err := h.Serve(ctx, w); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// watched is a hub's listener, and its audit log: when who has come.
type watched struct {
	net.Listener
	mu       sync.Mutex
	accepted []time.Time
	attached int
	full     time.Time // when the last host was attached
}

func (w *watched) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.accepted = append(w.accepted, time.Now())
	}
	return c, err
}

func (w *watched) Enabled(context.Context, slog.Level) bool { return true }
func (w *watched) WithAttrs([]slog.Attr) slog.Handler       { return w }
func (w *watched) WithGroup(string) slog.Handler            { return w }

// Handle counts hosts.
func (w *watched) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "verdict" {
			return true
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		switch a.Value.String() {
		case "attached":
			w.attached++
			w.full = time.Now()
		case "detached":
			w.attached--
		}
		return false
	})
	return nil
}

// ServeHTTP tells a sample.
func (w *watched) ServeHTTP(out http.ResponseWriter, req *http.Request) {
	if req.URL.Query().Has("gc") {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	_ = json.NewEncoder(out).Encode(w.sample(sample{
		"goroutines": float64(runtime.NumGoroutine()), "heap": float64(m.HeapAlloc) / 1e6, "stacks": float64(m.StackInuse) / 1e6,
	}))
}

// rush is what rates of a rush are counted in.
const rush = 100 * time.Millisecond

// sample adds the hosts that are there, and how they have come: from the first connection
// until the last host was attached.
func (w *watched) sample(s sample) sample {
	w.mu.Lock()
	defer w.mu.Unlock()
	s["attached"] = float64(w.attached)
	if len(w.accepted) == 0 || w.full.IsZero() {
		return s
	}
	first, n := w.accepted[0], 0
	bins := make([]float64, w.full.Sub(first)/rush+1)
	peak := 0.0
	for _, at := range w.accepted {
		if bin := int(at.Sub(first) / rush); bin < len(bins) {
			bins[bin]++
			peak = max(peak, bins[bin])
			n++
		}
	}
	s["rush-accepted"], s["rush-peak"], s["rush-mean"], s["rush-seconds"] = float64(n), peak, float64(n)/float64(len(bins)), w.full.Sub(first).Seconds()
	return s
}

// agentMain is the role "agent": what culvert agent runs.
func agentMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("agent", flag.ContinueOnError)
	keys := f.String("keys", "", "folder of the keys")
	at := f.String("hub", "", "address")
	if err := f.Parse(args); err != nil {
		return err
	}
	key, err := hub.ReadKey(filepath.Join(*keys, "near"))
	if err != nil {
		return err
	}
	cfg, err := agentOf(*keys, *at)
	if err != nil {
		return err
	}
	cfg.Key, cfg.Name = key, hostName
	for _, text := range f.Args() {
		o, err := hub.ParseOffer(text)
		if err != nil {
			return err
		}
		cfg.Offers = append(cfg.Offers, o)
	}
	cfg.Say = func(line string) { fmt.Fprintln(os.Stderr, line) }
	return hub.NewAgent(cfg).Run(ctx)
}

// agentOf is for every agent at a hub.
func agentOf(keys, at string) (cfg hub.AgentConfig, err error) {
	public, err := os.ReadFile(filepath.Join(keys, "hub.pub"))
	if err != nil {
		return cfg, err
	}
	cfg.HostKey, err = hub.ParsePublicKey(string(public))
	cfg.Hub = at
	cfg.Dial = func(ctx context.Context) (net.Conn, error) { return (&channel.Host{}).DialContext(ctx, "tcp", at) }
	return cfg, err
}
