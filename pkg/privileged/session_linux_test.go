package privileged

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	proc "github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// TestMain is also the child, and the user's side where that is to be killed.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	var err error
	switch os.Args[1] {
	case verb:
		err = Main(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case "parent":
		err = parent(context.Background())
	case "background":
		err = proc.Background(context.Background(), "/dev/null", []string{"parent"})
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var (
	addr4  = netip.MustParseAddr("198.18.0.1")
	addr6  = netip.MustParseAddr("fd63:756c:7665:7274::1")
	routes = prefixes("10.96.0.0/12", "10.244.0.0/16", "fd00:10::/48")
	names  = resolver.Settings{Server: addr4, Search: []string{"shop.svc.cluster.local", "svc.cluster.local"}, Zones: []string{"cluster.local", "svc", "shop"}}
)

// session is all that a connect asks for.
type session struct {
	child *Child
	dev   *Device
	udp   *net.UDPConn
	tcp   net.Listener
	plan  resolver.Plan
}

func begin(ctx context.Context) (*session, error) {
	child, err := Start(ctx, Config{Stderr: os.Stderr})
	if err != nil {
		return nil, err
	}
	s := &session{child: child}
	if s.dev, err = child.OpenTUN(ctx, TUN{MTU: 1500, Addrs: []netip.Addr{addr4, addr6}}); err != nil {
		return nil, errors.Join(err, child.Close())
	}
	if s.udp, s.tcp, err = child.ListenDNS(ctx, addr4); err != nil {
		return nil, errors.Join(err, s.end())
	}
	if err := child.SetRoutes(ctx, routes); err != nil {
		return nil, errors.Join(err, s.end())
	}
	if s.plan, err = child.SetDNS(ctx, names); err != nil && (child.Root() || !errors.Is(err, os.ErrPermission)) {
		return nil, errors.Join(err, s.end())
	}
	return s, nil
}

func (s *session) end() error {
	err := s.child.Close()
	if s.udp != nil {
		err = errors.Join(err, s.udp.Close(), s.tcp.Close())
	}
	return errors.Join(err, s.dev.Close())
}

// parent is the user's side in a process of its own. It says its child's pid
// when all is set, and ends the session when its input ends or the child does. In the
// background it has no input.
func parent(ctx context.Context) error {
	detach := proc.Detachment()
	s, err := begin(ctx)
	if err != nil {
		return err
	}
	fmt.Println(s.child.proc.Pid)
	input := make(chan struct{})
	if detach == nil {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			close(input)
		}()
	} else if err := detach(); err != nil {
		return errors.Join(err, s.end())
	}
	select {
	case <-input:
	case <-s.child.Done():
	}
	return s.end()
}

// snapshot is the machine as anybody can see it.
func snapshot(t *testing.T) string {
	t.Helper()
	return sh(t, `ip -d addr; ip route show table all; ip -6 route show table all; ip rule; ip -6 rule
		ls -l --time-style=full-iso /etc/resolv.conf*; stat -c %i /etc/resolv.conf; cat /etc/resolv.conf
		ss -Hlntu`)
}

func sh(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// inMachine gives the test a machine with an uplink, without systemd-resolved.
// Only what the test does may differ, so it waits for the uplink to settle.
func inMachine(t *testing.T, do func(t *testing.T)) {
	t.Helper()
	resolvertest.InMachine(t, func(t *testing.T) {
		sh(t, `ip link set lo up
			ip link add up0 type veth peer name up1
			echo 1 >/proc/sys/net/ipv6/conf/up0/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/up1/disable_ipv6
			ip addr add 10.9.0.2/24 dev up0; ip link set up1 up; ip link set up0 up
			ip route add default via 10.9.0.1
			until ip link show up0 | grep -q "state UP" && ip link show up1 | grep -q "state UP"; do sleep 0.01; done
			rm -f /etc/resolv.conf; echo "nameserver 10.9.0.53" >/etc/resolv.conf; echo "search corp.example" >>/etc/resolv.conf`)
		do(t)
	})
}

func same(t *testing.T, before string) {
	t.Helper()
	if after := snapshot(t); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

func TestSession(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		defer goleak.VerifyNone(t)
		before := snapshot(t)
		files := openFiles(t)
		for range 3 {
			s, err := begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			works(t, s)
			if err := s.end(); err != nil {
				t.Fatal(err)
			}
			<-s.child.Done()
			same(t, before)
			if err := s.child.Close(); err != nil {
				t.Errorf("Close again: %v", err)
			}
			if err := s.child.SetRoutes(t.Context(), nil); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		}
		if now := openFiles(t); now != files {
			t.Errorf("%d open files, %d before", now, files)
		}
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// works looks at everything that was asked for.
func works(t *testing.T, s *session) {
	t.Helper()
	if !strings.HasPrefix(s.dev.Name(), "culvert") || s.dev.Index <= 0 || len(s.dev.Addrs) == 0 {
		t.Errorf("device %s, %d, %v", s.dev.Name(), s.dev.Index, s.dev.Addrs)
	}
	for _, to := range []string{"10.96.0.7", "10.244.3.4"} {
		if got := sh(t, "ip route get "+to); !strings.Contains(got, "dev "+s.dev.Name()) {
			t.Errorf("way to %s: %s", to, got)
		}
	}
	if got := sh(t, "cat /etc/resolv.conf"); !strings.Contains(got, "nameserver 198.18.0.1\nsearch shop.svc.cluster.local svc.cluster.local corp.example\n") {
		t.Errorf("resolv.conf: %s", got)
	}
	if s.plan.Mode != resolver.ModeFile {
		t.Errorf("plan %+v", s.plan)
	}
	if got := s.udp.LocalAddr().String(); got != "198.18.0.1:53" {
		t.Errorf("udp %s", got)
	}
	if got := s.tcp.Addr().String(); got != "198.18.0.1:53" {
		t.Errorf("tcp %s", got)
	}
	conn, err := net.Dial("udp", "198.18.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 16)
	if _, err := conn.Write([]byte("name?")); err != nil {
		t.Fatal(err)
	}
	s.udp.SetDeadline(time.Now().Add(5 * time.Second))
	if n, _, err := s.udp.ReadFrom(buf); err != nil || string(buf[:n]) != "name?" {
		t.Errorf("udp on port 53: %q, %v", buf[:n], err)
	}
	packet(t, s)
}

// packet sends one into a route and reads it from the device.
func packet(t *testing.T, s *session) {
	t.Helper()
	conn, err := net.Dial("udp", "10.96.0.7:9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("marked")); err != nil {
		t.Fatal(err)
	}
	for range 20 { // the kernel's own IPv6 packets come first
		buf := make([]byte, 2048)
		n, err := s.dev.Readv([][]byte{buf})
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(string(buf[:n]), "marked") {
			return
		}
	}
	t.Error("the packet did not come out")
}

// process is a parent that can be killed, with its child.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	child int
}

func startParent(t *testing.T) *process {
	t.Helper()
	return follow(t, exec.Command("/proc/self/exe", "parent"))
}

// follow starts a parent and returns when its session is set up.
func follow(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewReader(out); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("parent: %v, %v, %q", err, cmd.Wait(), line)
		}
		if child, err := strconv.Atoi(strings.TrimSpace(line)); err == nil { // sudo may have asked before
			go func() { _, _ = io.Copy(os.Stderr, lines) }()
			return &process{cmd, stdin, child}
		}
	}
}

// reap waits for a process that became ours when its parent died: we are
// process 1 here.
func reap(t *testing.T, pid int) {
	t.Helper()
	for {
		_, err := unix.Wait4(pid, nil, 0, nil)
		if err == nil {
			return
		}
		if !errors.Is(err, unix.EINTR) {
			t.Fatalf("wait for %d: %v", pid, err)
		}
	}
}

func killBoth(t *testing.T, p *process) {
	t.Helper()
	kill(t, p.cmd.Process.Pid, unix.SIGSTOP) // so that it cannot act on the child's death
	if _, err := unix.Wait4(p.cmd.Process.Pid, nil, unix.WUNTRACED, nil); err != nil {
		t.Fatal(err)
	}
	kill(t, p.child, unix.SIGKILL)
	kill(t, p.cmd.Process.Pid, unix.SIGKILL)
	p.cmd.Wait()
	reap(t, p.child)
}

func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := unix.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

func changed(t *testing.T, before string) {
	t.Helper()
	if snapshot(t) == before {
		t.Fatal("the session changed nothing")
	}
}

func TestKillParent(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		before := snapshot(t)
		p := startParent(t)
		changed(t, before)
		kill(t, p.cmd.Process.Pid, unix.SIGKILL)
		p.cmd.Wait()
		reap(t, p.child)
		same(t, before)
	})
}

// TestKillParentSymlink: what stands for NetworkManager and its like.
func TestKillParentSymlink(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		sh(t, "mkdir -p /run/NetworkManager; mv /etc/resolv.conf /run/NetworkManager/; ln -s ../run/NetworkManager/resolv.conf /etc/resolv.conf")
		before := snapshot(t)
		p := startParent(t)
		changed(t, before)
		kill(t, p.cmd.Process.Pid, unix.SIGKILL)
		p.cmd.Wait()
		reap(t, p.child)
		same(t, before)
	})
}

func TestKillChild(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		before := snapshot(t)
		p := startParent(t)
		changed(t, before)
		kill(t, p.child, unix.SIGKILL)
		if err := p.cmd.Wait(); err != nil { // it sees, and puts back
			t.Errorf("parent: %v", err)
		}
		same(t, before)
	})
}

// TestKillBoth leaves the bare file, which Clean or the next session finds.
func TestKillBoth(t *testing.T) {
	for name, clean := range map[string]func(context.Context) error{
		"clean": func(ctx context.Context) error { return Clean(ctx, Config{}) },
		"next": func(ctx context.Context) error {
			s, err := begin(ctx)
			if err != nil {
				return err
			}
			return s.end()
		},
	} {
		t.Run(name, func(t *testing.T) {
			inMachine(t, func(t *testing.T) {
				before := snapshot(t)
				p := startParent(t)
				killBoth(t, p)
				if left := sh(t, "ip -br link; ip route"); strings.Contains(left, "culvert") {
					t.Errorf("left: %s", left)
				}
				if err := clean(t.Context()); err != nil {
					t.Fatal(err)
				}
				same(t, before)
			})
		})
	}
}

// TestSignals: what a terminal sends to both is nothing to the child.
func TestSignals(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		before := snapshot(t)
		s, err := begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTSTP} {
			kill(t, s.child.proc.Pid, sig)
			if err := s.child.SetRoutes(t.Context(), routes); err != nil {
				t.Fatalf("after %v: %v", sig, err)
			}
		}
		if err := s.end(); err != nil {
			t.Fatal(err)
		}
		same(t, before)
	})
}

// TestTwoSessions: the one that came last is asked. Whichever ends first, and
// however, the other is asked then, and after both all is as before.
func TestTwoSessions(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		before := snapshot(t)
		for _, killed := range []bool{false, true} {
			for _, firstEndsFirst := range []bool{false, true} {
				twoSessions(t, killed, firstEndsFirst)
				same(t, before)
			}
		}
	})
}

func twoSessions(t *testing.T, killed, firstEndsFirst bool) {
	t.Helper()
	first, err := begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := begin(t.Context()); err == nil {
		t.Fatal("the same again")
	}
	second := &session{}
	if second.child, err = Start(t.Context(), Config{}); err != nil {
		t.Fatal(err)
	}
	s := names
	s.Server = netip.MustParseAddr("198.18.0.2")
	if second.dev, err = second.child.OpenTUN(t.Context(), TUN{MTU: 1500, Addrs: []netip.Addr{s.Server}}); err != nil {
		t.Fatal(err)
	}
	if _, err := second.child.SetDNS(t.Context(), s); err != nil {
		t.Error(err)
	}
	asked(t, s.Server)
	ends, stays, left := second, first, addr4
	if firstEndsFirst {
		ends, stays, left = first, second, s.Server
	}
	if killed {
		kill(t, ends.child.proc.Pid, unix.SIGKILL)
	} else if err := ends.end(); err != nil {
		t.Error(err)
	}
	asked(t, left)
	if killed {
		if err := ends.end(); err != nil {
			t.Error(err)
		}
	}
	asked(t, left)
	if err := stays.end(); err != nil {
		t.Error(err)
	}
}

// asked waits until resolv.conf names a server, as the last thing that is done.
func asked(t *testing.T, server netip.Addr) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !strings.Contains(sh(t, "cat /etc/resolv.conf"), "\nnameserver "+server.String()+"\n"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is not asked:\n%s", server, sh(t, "head /etc/resolv.conf*"))
		}
	}
}

func TestRefusedWithDevice(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		before := snapshot(t)
		s, err := begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		with := snapshot(t)
		ctx := t.Context()
		elsewhere, root := names, names
		elsewhere.Server = netip.MustParseAddr("192.0.2.1")
		root.Zones = []string{"."}
		_, twice := s.child.OpenTUN(ctx, TUN{MTU: 1500, Addrs: []netip.Addr{addr4}})
		_, dns := s.child.SetDNS(ctx, elsewhere)
		_, _, port := s.child.ListenDNS(ctx, netip.MustParseAddr("10.9.0.2"))
		for what, err := range map[string]error{
			"a second device": twice, "another server": dns, "another address": port,
			"a default route": s.child.SetRoutes(ctx, prefixes("10.0.0.0/8", "0.0.0.0/0")),
		} {
			if !errors.Is(err, errRefused) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if _, err := s.child.SetDNS(ctx, root); err == nil {
			t.Error("all names")
		}
		if _, _, err := s.child.ListenDNS(ctx, addr4); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("port 53 twice: %v", err)
		}
		same(t, with)
		if err := s.end(); err != nil {
			t.Fatal(err)
		}
		same(t, before)
	})
}

// TestConcurrent: many ask at once, one gives up half-way, and the machine is
// as before.
func TestConcurrent(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		defer goleak.VerifyNone(t)
		before := snapshot(t)
		s, err := begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for i := range 16 {
			all.Go(func() {
				if err := s.child.SetRoutes(t.Context(), routes[:i%len(routes)+1]); err != nil {
					t.Error(err)
				}
				if _, err := s.child.SetDNS(t.Context(), names); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		for range 8 {
			all.Go(func() { s.child.SetRoutes(ctx, routes) })
		}
		cancel()
		all.Wait()
		if err := s.end(); err != nil {
			t.Error(err)
		}
		same(t, before)
	})
}

// TestDeviceDeleted: somebody else deletes the device under us.
func TestDeviceDeleted(t *testing.T) {
	inMachine(t, func(t *testing.T) {
		before := snapshot(t)
		s, err := begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sh(t, "ip link del "+s.dev.Name())
		if err := s.end(); err != nil {
			t.Error(err)
		}
		same(t, before)
	})
}

// TestResolved: the same deaths where systemd-resolved has the names.
func TestResolved(t *testing.T) {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/var/cache"
	}
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	program, err := resolvertest.Fetch(t.Context(), filepath.Join(dir, "culvert-e2e"))
	if err != nil {
		t.Skip(err)
	}
	inMachine(t, func(t *testing.T) {
		stop, err := program.Start(t.Context(), resolvertest.Config{Upstream: map[string]netip.Addr{"up0": netip.MustParseAddr("10.9.0.53")}})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		state := func() string {
			return snapshot(t) + sh(t, "for what in dns domain default-route llmnr mdns dnssec; do "+program.Resolvectl()+" $what; done")
		}
		before := state()
		for name, die := range map[string]func(p *process){
			"orderly": func(p *process) { p.stdin.Close(); p.cmd.Wait() },
			"parent": func(p *process) {
				kill(t, p.cmd.Process.Pid, unix.SIGKILL)
				p.cmd.Wait()
				reap(t, p.child)
			},
			"child": func(p *process) { kill(t, p.child, unix.SIGKILL); p.cmd.Wait() },
			"both":  func(p *process) { killBoth(t, p) },
		} {
			p := startParent(t)
			with := state()
			if !strings.Contains(with, "~svc") || !strings.Contains(with, "nameserver 127.0.0.53") {
				t.Errorf("%s: not set\n%s", name, with)
			}
			die(p)
			// It is the kernel that tells systemd-resolved that a link is gone.
			for range 100 {
				if state() == before {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			if after := state(); after != before {
				t.Errorf("%s: before\n%s\nafter\n%s", name, before, after)
			}
		}
	})
}

// TestDeviceIsNotPolled: the child does not wake for packets.
func TestDeviceIsNotPolled(t *testing.T) {
	resolvertest.InMachine(t, func(t *testing.T) {
		dev, err := tun.Open("")
		if err != nil {
			t.Fatal(err)
		}
		c := &child{}
		give, err := c.hold(dev)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := c.keep.(rawFD); !ok {
			t.Errorf("kept as %T", c.keep)
		}
		name := dev.Name()
		dev.Close()
		give.Close()
		if _, err := net.InterfaceByName(name); err != nil {
			t.Errorf("the device went while it is held: %v", err)
		}
		c.keep.Close()
		if _, err := net.InterfaceByName(name); err == nil {
			t.Error("the device outlives its last descriptor")
		}
	})
}
