package shadow

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/strangers"
)

const (
	patience = 10 * time.Second
	long     = time.Hour // a grace time that never ends in a test
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pod is a shadow that runs, and a laptop's key for it.
type pod struct {
	t      *testing.T
	shadow *Shadow
	addr   string
	public []byte // of its key
	laptop wires.Keys
	stop   context.CancelFunc
	ended  chan error
}

func keys(t *testing.T) (private, public []byte) {
	t.Helper()
	private, public, err := sshchan.GenerateKey("test")
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

func parsed(t *testing.T, private, peer []byte) wires.Keys {
	t.Helper()
	keys, err := wires.ParseKeys(private, peer)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// start runs a shadow on loopback. Its inner network may be reached at
// loopback too, by 10.0.0.1.
func start(t *testing.T, cfg Config) *pod {
	t.Helper()
	hostKey, hostPub := keys(t)
	key, pub := keys(t)
	cfg.Listen, cfg.KeysDir = "127.0.0.1:0", t.TempDir()
	for name, text := range map[string][]byte{"host_key": hostKey, "authorized_key": pub} {
		if err := os.WriteFile(filepath.Join(cfg.KeysDir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if cfg.Network == nil {
		cfg.Network = cluster{&channel.Host{}}
	}
	ctx, stop := context.WithCancel(t.Context())
	p := &pod{t: t, shadow: New(cfg), public: hostPub, laptop: parsed(t, key, hostPub), stop: stop, ended: make(chan error, 1)}
	p.shadow.retry = time.Millisecond
	go func() { p.ended <- p.shadow.Run(ctx) }()
	p.addr = (<-p.shadow.bound).String()
	t.Cleanup(stop)
	return p
}

// end waits for Run.
func (p *pod) end() {
	p.t.Helper()
	select {
	case err := <-p.ended:
		if err != nil {
			p.t.Errorf("Run: %v", err)
		}
	case <-time.After(patience):
		p.t.Fatal("Run does not return")
	}
}

func (p *pod) dial() net.Conn {
	p.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * strangerLimit))
	return c
}

func upgrade(w wires.Wire) string {
	return "GET / HTTP/1.1\r\nHost: pod\r\nConnection: keep-alive, Upgrade\r\nUpgrade: " + w.Upgrade() + "\r\n\r\n"
}

// switched asks for a wire.
func (p *pod) switched(w wires.Wire) net.Conn {
	p.t.Helper()
	c := p.dial()
	io.WriteString(c, upgrade(w))
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != w.Upgrade() {
		p.t.Fatalf("upgrade: %v, %v", resp, err)
	}
	return &strangers.Early{Conn: c, First: r}
}

// open opens a wire with so many signs of life.
func (p *pod) open(beat time.Duration) channel.Channel { return p.openOne(wires.TLS, beat) }

func (p *pod) openOne(w wires.Wire, beat time.Duration) channel.Channel {
	p.t.Helper()
	c := p.switched(w)
	ch, err := w.Dial(p.t.Context(), c, wires.Config{Keys: p.laptop, Beat: beat})
	if err != nil {
		p.t.Fatal(err)
	}
	c.SetDeadline(time.Time{})
	p.t.Cleanup(func() { ch.Close(); ch.Wait() })
	return ch
}

// cluster is this machine, whose loopback is reached by an address that a pod
// could have.
type cluster struct{ channel.Network }

const clusterIP = "10.0.0.1"

func (c cluster) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return c.Network.DialContext(ctx, network, strings.Replace(address, clusterIP, "127.0.0.1", 1))
}

// echo is a server in the cluster that answers when the question has ended.
func echo(t *testing.T) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			text, _ := io.ReadAll(c)
			c.Write(text)
			c.Close()
		}
	}()
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

func TestWireReachesTheCluster(t *testing.T) {
	p := start(t, Config{Grace: long})
	port := echo(t)
	old, fresh := p.open(time.Second), p.open(time.Second)
	for _, wire := range []channel.Channel{old, fresh} {
		c, err := wire.DialContext(t.Context(), "tcp", net.JoinHostPort(clusterIP, port))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "hello")
		c.(channel.CloseWriter).CloseWrite()
		if text, err := io.ReadAll(c); string(text) != "hello" || err != nil {
			t.Errorf("echo %q, %v", text, err)
		}
		c.Close()
	}
	old.Close()
	if _, err := Ask(t.Context(), fresh); err != nil {
		t.Errorf("the other wire: %v", err)
	}
	p.stop()
	p.end()
	if err := fresh.Wait(); err == nil {
		t.Error("the wire outlived the shadow")
	}
}

// What the laptop sends at once with its request must not be lost.
func TestUpgradeWithEarlyBytes(t *testing.T) {
	p := start(t, Config{Grace: long})
	c := p.dial()
	io.WriteString(c, upgrade(wires.SSH)+"SSH-2.0-culvert\r\n")
	r := bufio.NewReader(c)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v, %v", resp, err)
	}
	if line, err := r.ReadString('\n'); !strings.HasPrefix(line, "SSH-2.0-culvert") || err != nil {
		t.Errorf("version %q, %v", line, err)
	}
	// Its key exchange comes only in answer to a version.
	if b, err := r.Peek(6); err != nil || b[5] != 20 {
		t.Errorf("no key exchange: %v, %v", b, err)
	}
	c.Close()
	p.stop()
	p.end()
}

func TestRequests(t *testing.T) {
	p := start(t, Config{Grace: long})
	for request, want := range map[string]int{
		"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":                            200,
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                                   404,
		"GET /info HTTP/1.1\r\nHost: " + controlHost + "\r\n\r\n":             404,
		"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n":      404,
		"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n": 501,
		"GET / HTTP/1.1\r\nUpgrade: culvert-ssh\r\nHost: x\r\n\r\n":           404,
		"SSH-2.0-culvert\r\n\r\n":                                             0,
		"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", maxHeader) + "\r\n\r\n": 0,
	} {
		c := p.dial()
		io.WriteString(c, request)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if want == 0 && err == nil || want > 0 && (err != nil || resp.StatusCode != want) {
			t.Errorf("%.40q: %v, %v, want %d", request, resp, err, want)
		}
		c.Close()
	}
	p.stop()
	p.end()
}

func TestInfo(t *testing.T) {
	p := start(t, Config{Grace: long, Version: "v9"})
	p.shadow.network.resolv = parseResolvConf([]byte("nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local\n"))
	port := echo(t)
	wire, other := p.open(time.Second), p.openOne(wires.SSH, time.Second)
	c, err := wire.DialContext(t.Context(), "tcp", net.JoinHostPort(clusterIP, port))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := Ask(t.Context(), other); err != nil || info.Wires != 2 {
		t.Errorf("over the other wire: %+v, %v", info, err)
	}
	info, err := Ask(t.Context(), wire)
	if err != nil {
		t.Fatal(err)
	}
	hostname, _ := os.Hostname()
	if info.Version != "v9" || info.Hostname != hostname || info.Flows != 1 || info.Wires != 2 || info.Uptime <= 0 {
		t.Errorf("info %+v", info)
	}
	if !reflect.DeepEqual(info.ResolvConf, p.shadow.network.resolv) {
		t.Errorf("resolver %+v", info.ResolvConf)
	}
	c.Close()
	c, err = wire.DialContext(t.Context(), "tcp", ControlAddress)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "GET /else HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 404 {
		t.Errorf("%v, %v", resp, err)
	}
	c.Close()
	p.stop()
	p.end()
	if n := p.shadow.network.flows.Load(); n != 0 {
		t.Errorf("%d flows left", n)
	}
}

func TestWrongKeyIsRefused(t *testing.T) {
	var healed atomic.Int32
	p := start(t, Config{Grace: 500 * time.Millisecond, Heal: func(context.Context) error { healed.Add(1); return nil }})
	stranger, _ := keys(t)
	id := parsed(t, stranger, p.public)
	for i := 0; healed.Load() == 0; i++ { // strangers are no sign of life
		w := []wires.Wire{wires.TLS, wires.SSH}[i%2]
		c, err := net.Dial("tcp", p.addr)
		if err != nil {
			break
		}
		io.WriteString(c, upgrade(w))
		r := bufio.NewReader(c)
		if _, err := http.ReadResponse(r, nil); err != nil {
			c.Close()
			break
		}
		if _, err := w.Dial(t.Context(), &strangers.Early{Conn: c, First: r}, wires.Config{Keys: id}); err == nil {
			t.Fatal("a stranger was let in")
		}
		c.Close()
	}
	p.end()
}

func TestSilenceHealsOnce(t *testing.T) {
	var healed atomic.Int32
	p := start(t, Config{Grace: 50 * time.Millisecond, Heal: func(context.Context) error { healed.Add(1); return nil }})
	p.end()
	if n := healed.Load(); n != 1 {
		t.Errorf("healed %d times", n)
	}
}

func TestSilenceWithoutHeal(t *testing.T) {
	start(t, Config{Grace: 50 * time.Millisecond}).end()
}

func TestHealIsTriedAgain(t *testing.T) {
	var tries atomic.Int32
	p := start(t, Config{Grace: 20 * time.Millisecond, Heal: func(context.Context) error {
		if tries.Add(1) < 4 {
			return errors.New("the API server is away")
		}
		return nil
	}})
	p.end()
	if n := tries.Load(); n != 4 {
		t.Errorf("%d tries", n)
	}
}

func TestKilledWhileHealing(t *testing.T) {
	tried := make(chan struct{}, 1)
	p := start(t, Config{Grace: 20 * time.Millisecond, Heal: func(ctx context.Context) error {
		tried <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}})
	<-tried
	p.stop()
	p.end()
}

func TestWireKeepsTheSession(t *testing.T) {
	const grace = 400 * time.Millisecond
	var healed atomic.Int32
	p := start(t, Config{Grace: grace, Heal: func(context.Context) error { healed.Add(1); return nil }})
	began := time.Now()
	// A wire that says nothing but keepalives holds it, and so does the next
	// one that is opened in time.
	for range 3 {
		wire := p.open(grace / 8)
		time.Sleep(grace * 2 / 3)
		wire.Close()
		wire.Wait()
	}
	if n := healed.Load(); n != 0 {
		t.Fatalf("healed after %v with a wire", time.Since(began))
	}
	p.end()
	if n := healed.Load(); n != 1 {
		t.Errorf("healed %d times", n)
	}
}

// While the cluster cannot be told of the end, it has not come.
func TestLaptopComesBackWhileHealingFails(t *testing.T) {
	failing := make(chan struct{})
	var done atomic.Bool
	p := start(t, Config{Grace: 300 * time.Millisecond, Heal: func(context.Context) error {
		select {
		case failing <- struct{}{}:
		default:
		}
		if done.Load() {
			return nil
		}
		return errors.New("the API server is away")
	}})
	<-failing
	wire := p.open(50 * time.Millisecond)
	drain := time.After(100 * time.Millisecond)
	for quiet := false; !quiet; {
		select {
		case <-failing:
		case <-drain:
			quiet = true
		}
	}
	done.Store(true) // from here on Heal would succeed, but is not asked
	time.Sleep(600 * time.Millisecond)
	if _, err := Ask(t.Context(), wire); err != nil {
		t.Fatalf("the session ended under a living laptop: %v", err)
	}
	wire.Close()
	p.end()
}

func TestSlowStrangersDoNotKeepTheLaptopOut(t *testing.T) {
	p := start(t, Config{Grace: long})
	var slow []net.Conn
	for i := range 2 * maxStrangers {
		c := p.dial()
		io.WriteString(c, upgrade(wires.TLS)[:10+i%30])
		slow = append(slow, c)
	}
	if _, err := Ask(t.Context(), p.open(time.Second)); err != nil {
		t.Errorf("the laptop was kept out: %v", err)
	}
	n := p.shadow.door.porch.Count()
	if n > maxStrangers {
		t.Errorf("%d strangers inside", n)
	}
	// The first had to leave for the later ones, the rest do at the limit.
	for _, c := range []net.Conn{slow[0], slow[len(slow)-1]} {
		began := time.Now()
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a slow stranger was still there after %v", time.Since(began))
		}
	}
	p.stop()
	p.end()
}

func TestStopEndsEverything(t *testing.T) {
	p := start(t, Config{Grace: long})
	port := echo(t)
	wire := p.open(time.Second)
	c, err := wire.DialContext(t.Context(), "tcp", net.JoinHostPort(clusterIP, port))
	if err != nil {
		t.Fatal(err)
	}
	p.dial() // says nothing
	p.switched(wires.TLS)
	p.stop()
	p.end()
	if _, err := io.ReadAll(c); err == nil {
		t.Error("a flow ended as if it were whole")
	}
}

func TestRunWithoutKeys(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"none":    {},
		"one":     {"host_key": "x"},
		"garbage": {"host_key": "x", "authorized_key": "y"},
	} {
		dir := t.TempDir()
		for f, text := range files {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := New(Config{Listen: "127.0.0.1:0", KeysDir: dir}).Run(t.Context()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// asked is a Network that notes what it is asked to dial.
type asked struct {
	channel.Network
	dials []string
}

func (a *asked) DialContext(_ context.Context, network, address string) (net.Conn, error) {
	a.dials = append(a.dials, network+" "+address)
	return nil, syscall.ECONNREFUSED
}

func TestWhatMayBeDialled(t *testing.T) {
	resolv := ResolvConf{Nameservers: []netip.Addr{netip.MustParseAddr("169.254.20.10")}}
	for _, tc := range []struct {
		network, address string
		want             error
	}{
		{"tcp", "10.96.0.1:443", syscall.ECONNREFUSED},
		{"tcp", "[fd00:96::1]:443", syscall.ECONNREFUSED},
		{"udp", "169.254.20.10:53", syscall.ECONNREFUSED},
		{"ping", "10.244.0.7", syscall.ECONNREFUSED},
		{"udp", "169.254.20.10:80", syscall.EACCES},
		{"tcp", "169.254.169.254:80", syscall.EACCES},
		{"tcp", "169.254.169.254:53", syscall.EACCES},
		{"tcp", "[fd00:ec2::254]:80", syscall.EACCES},
		{"tcp", "127.0.0.1:7465", syscall.EACCES},
		{"tcp", "127.8.8.8:80", syscall.EACCES},
		{"tcp", "[::1]:80", syscall.EACCES},
		{"tcp", "[::ffff:127.0.0.1]:80", syscall.EACCES},
		{"tcp", "[::ffff:169.254.169.254]:80", syscall.EACCES},
		{"tcp", "0.0.0.0:80", syscall.EACCES},
		{"tcp", "[::]:80", syscall.EACCES},
		{"tcp", "[fe80::1%eth0]:80", syscall.EACCES},
		{"tcp", ":80", syscall.EACCES},
		{"tcp", "localhost:80", syscall.EACCES},
		{"tcp", controlHost + ":81", syscall.EACCES},
		{"udp", ControlAddress, syscall.EACCES},
		{"tcp", ClaimAddress("x", 80), syscall.EACCES},
		{"ping", "127.0.0.1", syscall.EACCES},
		{"ping", "", syscall.EACCES},
	} {
		inner := &asked{}
		_, err := newNetwork(inner, resolv, false).DialContext(t.Context(), tc.network, tc.address)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s %s: %v, want %v", tc.network, tc.address, err, tc.want)
		}
		if dialled := len(inner.dials) > 0; dialled != (tc.want == syscall.ECONNREFUSED) {
			t.Errorf("%s %s: dialled %v", tc.network, tc.address, inner.dials)
		}
	}
}

func TestRefusalCrossesTheWire(t *testing.T) {
	p := start(t, Config{Grace: long})
	wire := p.open(time.Second)
	if _, err := wire.DialContext(t.Context(), "tcp", "127.0.0.1:80"); !errors.Is(err, syscall.EACCES) {
		t.Errorf("loopback: %v", err)
	}
	if _, err := wire.DialContext(t.Context(), "tcp", clusterIP+":1"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody: %v", err)
	}
	p.stop()
	p.end()
}

func TestListenInThePod(t *testing.T) {
	p := start(t, Config{Grace: long})
	wire := p.open(time.Second)
	l, err := wire.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	info, err := Ask(t.Context(), wire)
	if err != nil || info.Flows != 1 {
		t.Errorf("flows %d, %v", info.Flows, err)
	}
	in.Close()
	l.Close()
	p.stop()
	p.end()
}

func TestParseResolvConf(t *testing.T) {
	got := parseResolvConf([]byte("# kubelet\nnameserver 10.96.0.10\nnameserver fd00:96::a\nnameserver x\nsearch old\nsearch shop.svc.cluster.local  svc.cluster.local\noptions ndots:5\noptions edns0 trust-ad\nsearch\n"))
	if want := []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::a")}; !slices.Equal(got.Nameservers, want) {
		t.Errorf("nameservers %v", got.Nameservers)
	}
	if !slices.Equal(got.Search, []string{"shop.svc.cluster.local", "svc.cluster.local"}) {
		t.Errorf("search %v", got.Search)
	}
	if !slices.Equal(got.Options, []string{"ndots:5", "edns0", "trust-ad"}) {
		t.Errorf("options %v", got.Options)
	}
	if r := readResolvConf("/nowhere"); r.Nameservers == nil || len(r.Search) != 0 {
		t.Errorf("no file: %+v", r)
	}
}
