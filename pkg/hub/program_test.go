//go:build unix

package hub

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// sshdDir is what sshd(8) wants there; Debian's makes it when it starts. It stays: tests of
// other packages run beside.
const sshdDir = "/run/sshd"

// The test program is a hub, an agent and a client, too: such as can be killed, and be in a
// namespace of its own.
func TestMain(m *testing.M) {
	if file := os.Getenv("CULVERT_JOIN_TEST"); file != "" {
		joinIn(file, os.Args[1], os.Args[2])
	}
	dir := os.Getenv("CULVERT_HUB_TEST")
	if dir == "" {
		goleak.VerifyTestMain(m)
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	err := map[string]func(context.Context, string, []string) error{
		"hub": hubIn, "agent": agentIn, "dial": dialIn, "forward": forwardIn, "scan": scan,
	}[os.Args[1]](ctx, dir, os.Args[2:])
	if err != nil && !errors.Is(err, net.ErrClosed) {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// joinIn is a host that joins, and can be killed, or finds the disk full.
func joinIn(key, hub, token string) {
	if most, err := strconv.ParseUint(os.Getenv("CULVERT_DISK_TEST"), 10, 64); err == nil {
		signal.Ignore(syscall.SIGXFSZ)
		_ = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: most, Max: most})
	}
	err := Join(context.Background(), JoinConfig{Hub: hub, Dial: Reach(hub), Token: token, Name: "db-01", Key: key, Say: func(string) {}})
	fmt.Fprintln(os.Stderr, "joined:", err)
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

const programBeat = 500 * time.Millisecond

// program is this one, with the files of a yard.
func (y *yard) program(role string, args ...string) *exec.Cmd {
	cmd := exec.Command(must(os.Executable())(y.t), append([]string{role}, args...)...)
	cmd.Env = append(os.Environ(), "CULVERT_HUB_TEST="+y.dir)
	return cmd
}

// hubIn is a hub with an address and peers.
func hubIn(ctx context.Context, dir string, args []string) error {
	rights, err := OpenFile(filepath.Join(dir, "rights"), ParseRights)
	if err != nil {
		return err
	}
	key, err := ReadKey(filepath.Join(dir, "hub"))
	if err != nil {
		return err
	}
	audit := slog.New(slog.NewJSONHandler(os.Stdout, nil))
	cfg := Config{HostKey: key, Rights: rights.Now, Beat: programBeat, Audit: audit}
	if len(args) > 1 {
		cfg.Peers = Addresses(args[1:])
	}
	h, err := New(cfg)
	if err != nil {
		return err
	}
	go rights.Watch(ctx, func(error) { h.Recheck() })
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "listening")
	return h.Serve(ctx, l)
}

// endIn is what an agent or a client needs to know: a hub, and the name of a key.
func endIn(dir, address, key string) (cfg AgentConfig, err error) {
	public, err := os.ReadFile(filepath.Join(dir, "hub.pub"))
	if err != nil {
		return cfg, err
	}
	var own crypto.Signer
	if own, err = ReadKey(filepath.Join(dir, key)); err != nil {
		return cfg, err
	}
	cfg = AgentConfig{Hub: address, Dial: Reach(address), Key: own, Beat: programBeat}
	cfg.HostKey, err = ParsePublicKey(string(public))
	return cfg, err
}

// agentIn has a name and offers, too.
func agentIn(ctx context.Context, dir string, args []string) error {
	cfg, err := endIn(dir, args[0], args[1])
	if err != nil {
		return err
	}
	cfg.Name = args[2]
	cfg.Say = func(line string) { fmt.Fprintln(os.Stderr, line) }
	for _, text := range args[3:] {
		o, err := ParseOffer(text)
		if err != nil {
			return err
		}
		cfg.Offers = append(cfg.Offers, o)
	}
	return NewAgent(cfg).Run(ctx)
}

// dialIn is a ProxyCommand.
func dialIn(ctx context.Context, dir string, args []string) error {
	cfg, err := endIn(dir, args[0], args[1])
	if err != nil {
		return err
	}
	return Talk(ctx, cfg, args[2], os.Stdin, os.Stdout)
}

// forwardIn has a local address lead to one behind a hub.
func forwardIn(ctx context.Context, dir string, args []string) error {
	cfg, err := endIn(dir, args[0], args[1])
	if err != nil {
		return err
	}
	hosts := NewClient(cfg)
	go hosts.Run(ctx)
	l, err := (&channel.Host{}).Listen(ctx, args[2], args[3])
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "forwarding")
	return relay.Forward(ctx, l, hosts, args[2], args[4])
}

// scan prints the ports of an address that somebody listens at.
func scan(_ context.Context, _ string, args []string) error {
	ports := make(chan int)
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for port := range ports {
				c, err := net.DialTimeout("tcp", net.JoinHostPort(args[0], strconv.Itoa(port)), time.Second)
				if err == nil {
					c.Close()
					fmt.Println(port)
				}
			}
		})
	}
	for port := range 1 << 16 {
		ports <- port
	}
	close(ports)
	all.Wait()
	return nil
}
