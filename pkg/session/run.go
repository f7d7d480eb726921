package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/sandbox"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// RunConfig is what "culvert run" is asked for.
type RunConfig struct {
	TunnelConfig

	Path           string // of the command; see sandbox.Look
	Args           []string
	Stdin          io.Reader
	Stdout, Stderr io.Writer

	// Include and Exclude are added to, and cut out of, what is found.
	Include, Exclude []netip.Prefix

	Only    bool             // the cluster, and nothing else
	Signals <-chan os.Signal // the command's, or the end of what comes before it
}

// A Run is a command that is in the cluster's network, and a machine that is not.
type Run struct {
	*tunnel
	cfg    RunConfig
	outer  func() []netip.AddrPort // this machine's own nameservers
	server netip.Addr              // and the one inside
	addrs  []netip.Addr            // of the device inside

	started sync.Mutex // guards what there is once it runs
	command *sandbox.Sandbox
	stack   *netstack.Stack
}

// NewRun starts nothing.
func NewRun(cfg RunConfig) *Run {
	r := &Run{tunnel: newTunnel(cfg.TunnelConfig, kube.Connect), cfg: cfg}
	r.plan = routePlan{include: cfg.Include, exclude: cfg.Exclude}
	r.only = cfg.Only
	r.outer = r.upstreams(netip.Addr{}, func() {})
	return r
}

// Run runs the command and blocks until it has ended, and all is put back. That it has
// not ended well is a *process.ExitError; a signal before it began is as if it had ended
// it.
func (r *Run) Run(ctx context.Context) error {
	return r.course.run(ctx, []step{
		{"asking the cluster", r.begin},
		{"checking rights", r.checkRights},
		{"trying a sandbox", r.trySandbox},
		// Above this line all fails for free, below it things change.
		{"making the shadow", r.shareShadow},
		{"waiting for the shadow pod", r.awaitShadow},
		{"opening the wire", r.openWire},
		{"reading names", r.readNames},
		{"listening for status", r.tellStatus},
		{"starting the command", r.start},
	})
}

func (r *Run) begin(ctx context.Context) (string, error) {
	r.group.Go(r.passSignals)
	return r.askCluster(ctx)
}

func (r *Run) passSignals() {
	for {
		select {
		case s := <-r.cfg.Signals:
			if command, _ := r.running(); command != nil {
				command.Signal(s)
			} else if n, ok := s.(syscall.Signal); ok {
				r.fail(&process.ExitError{Name: r.name(), Code: 128 + int(n), Signal: s})
			}
		case <-r.life.Done():
			return
		}
	}
}

func (r *Run) name() string { return filepath.Base(r.cfg.Path) }

// running is what there is of it.
func (r *Run) running() (*sandbox.Sandbox, *netstack.Stack) {
	r.started.Lock()
	defer r.started.Unlock()
	return r.command, r.stack
}

func (r *Run) trySandbox(context.Context) (string, error) {
	return "this machine allows a sandbox", sandbox.Check()
}

func (r *Run) openWire(ctx context.Context) (string, error) {
	result, err := r.tunnel.openWire(ctx)
	if err == nil {
		r.warnOfPing()
	}
	return result, err
}

// start starts the command, whose end is the session's. What is said is said before it has
// the terminal.
func (r *Run) start(ctx context.Context) (string, error) {
	cfg, err := r.sandbox()
	if err != nil {
		return "", err
	}
	r.reporter.Done(fmt.Sprintf("%s is in the network of %s", r.name(), r.cfg.Cluster.Context))
	r.started.Lock() // a signal is for the command from its first breath
	defer r.started.Unlock()
	command, err := sandbox.Start(cfg)
	if err != nil {
		return "", err
	}
	r.undo.add("end "+r.name(), func(context.Context) error { return end(command) })
	stack, err := netstack.New(netstack.Config{Device: command.Device, MTU: deviceMTU, Network: &surroundings{Run: r}, Local: true, Log: r.log})
	if err != nil {
		return "", errors.Join(err, command.Device.Close())
	}
	r.background("network stack", stack.Run)
	r.command, r.stack = command, stack
	r.group.Go(func() {
		if err := command.Wait(); err != nil {
			r.fail(err)
			return
		}
		r.leave()
	})
	return "", nil
}

// sandbox is what the command is to have.
func (r *Run) sandbox() (cfg sandbox.Config, err error) {
	cfg = sandbox.Config{Path: r.cfg.Path, Args: r.cfg.Args, Stdin: r.cfg.Stdin, Stdout: r.cfg.Stdout, Stderr: r.cfg.Stderr, MTU: deviceMTU}
	r.mu.Lock()
	taken := prefixes(r.routes)
	r.mu.Unlock()
	if len(taken) == 0 {
		return cfg, errNoRanges
	}
	inUse, err := usedPrefixes()
	if err != nil {
		return cfg, err
	}
	taken = slices.Concat(taken, inUse)
	v4, v6 := tun.FreeAddrs(taken)
	if v4.IsValid() {
		r.server, _ = tun.FreeAddrs(append(taken, netip.PrefixFrom(v4, v4.BitLen())))
	}
	if !r.server.IsValid() || !v6.IsValid() {
		return cfg, errNoAddress
	}
	r.addrs = []netip.Addr{v4, v6}
	cfg.Addrs = r.addrs
	cfg.Leaves = func(names []string) {
		r.reporter.Say(fmt.Sprintf("%s has ended, and what it left behind is told to: %s", r.name(), strings.Join(names, ", ")))
	}
	cfg.ResolvConf, err = resolver.New(resolver.Config{Log: r.log}).Conf(resolver.Settings{Server: r.server, Search: r.naming.search()})
	return cfg, err
}

// end ends a command that has not ended by itself.
func end(command *sandbox.Sandbox) error {
	command.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(process.DefaultPatience, func() { command.Signal(os.Kill) })
	defer kill.Stop()
	_ = command.Wait() // it was told
	return nil
}
