package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/session"
	"github.com/culvert-dev/culvert/pkg/tun"
)

const connectLong = `Join this machine to the cluster's network: pods and Services answer by address
and by name (web, web.shop, web.shop.svc.cluster.local) until you stop it with
Ctrl-C; then this machine and the cluster are as before.

Kubernetes is spoken to as you. Only a small child runs as root, for the device,
its routes and the resolver; it is started with sudo where you are not root.

With --via no cluster is needed, but any SSH server: the ranges are reached from
there, over TCP alone. Your own ssh makes the connection, so its configuration, agent,
known hosts and jump hosts count. Names below --dns-zone, and of addresses in the
ranges, are asked of --dns, all others where they were asked before.`

func (a *app) connectCommand() *cobra.Command {
	var o connectOptions
	c := &cobra.Command{
		Use:   "connect [--via HOST RANGE...]",
		Short: "Join this machine to the cluster's network until Ctrl-C",
		Long:  connectLong,
		Example: `  culvert connect
  culvert connect --context staging -n shop --as staging   # web.shop.staging, beside other clusters
  culvert connect -d  # in the background, until: culvert disconnect
  culvert connect --include 10.20.0.0/16 --exclude 10.96.7.0/24
  culvert connect --ssh me@bastion
  culvert connect --via me@bastion 10.0.0.0/8 --dns 10.0.0.2 --dns-zone corp.example`,
		Args: func(c *cobra.Command, args []string) error {
			if o.via.destination != "" {
				return nil
			}
			return talk.NoArgs(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			if o.via.destination != "" {
				return a.connectVia(c, o, args)
			}
			return a.connect(c, o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.as, "as", "", "domain under which this machine finds this cluster's names, beside other clusters: with staging, web.shop.staging")
	o.conflicts(c)
	f.BoolVarP(&o.detach, "detach", "d", false, "go on in the background when connected, until: culvert disconnect")
	f.BoolVar(&o.printClient, "print-wg-config", false, "print the configuration of a stock WireGuard client (wg-quick, a phone) that reaches the cluster while this runs")
	o.ranges.flags(c)
	o.flags(a, c, "shadow")
	o.via.flags(c)
	return c
}

type connectOptions struct {
	farOptions
	ranges      rangeOptions
	conflict    string
	as          string
	printClient bool
	detach      bool
	via         viaOptions
}

// conflicts adds the flag that says what to do about them.
func (o *connectOptions) conflicts(c *cobra.Command) {
	c.Flags().StringVar(&o.conflict, "conflict", string(tun.Either), "what to do where this machine's network has addresses of the cluster's: exact (route those in use), map (reach them under others), refuse, or auto")
	_ = c.RegisterFlagCompletionFunc("conflict", cobra.FixedCompletions(avoids, cobra.ShellCompDirectiveNoFileComp))
}

var avoids = []string{string(tun.Either), string(tun.Exact), string(tun.Map), string(tun.Refuse)}

// config checks what was typed.
func (o connectOptions) config() (cfg session.ConnectConfig, err error) {
	if cfg.FarEnd, err = o.farEnd(); err != nil {
		return cfg, err
	}
	if cfg.As, err = parseAs(o.as); err != nil {
		return cfg, err
	}
	if !slices.Contains(avoids, o.conflict) {
		return cfg, talk.Usage(fmt.Errorf("--conflict is auto, exact, map or refuse, not %q", o.conflict))
	}
	cfg.Conflict = tun.Avoid(o.conflict)
	if o.printClient && o.detach {
		return cfg, talk.Usage(errors.New("--print-wg-config needs somebody to read it: leave out --detach"))
	}
	if o.printClient {
		cfg.Endpoint = cmp.Or(cfg.Endpoint, kube.Auto)
	}
	if cfg.Include, cfg.Exclude, err = o.ranges.parse(); err != nil {
		return cfg, err
	}
	if err := privileged.CheckRoutes(cfg.Include); err != nil {
		return cfg, talk.Usage(fmt.Errorf("--include: %w", err))
	}
	return cfg, nil
}

// parseAs takes a domain that is nobody's who must be found.
func parseAs(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	as := strings.ToLower(strings.TrimSuffix(text, "."))
	last := as[strings.LastIndexByte(as, '.')+1:]
	if err := resolver.CheckName(as); err != nil {
		return "", talk.Usage(fmt.Errorf("--as takes a domain like staging, not %q: %w", text, err))
	}
	if slices.Contains([]string{"arpa", "local", "localhost", "svc"}, last) {
		return "", talk.Usage(fmt.Errorf("--as takes a domain like staging; names below %s are others'", last))
	}
	return as, nil
}

// parsePrefixes takes ranges and single addresses.
func parsePrefixes(flag string, texts []string) ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if a, aerr := netip.ParseAddr(text); err != nil && aerr == nil {
			p, err = a.Prefix(a.BitLen())
		}
		if err != nil {
			return nil, talk.Usage(fmt.Errorf("%s takes an address range like 10.20.0.0/16, not %q", flag, text))
		}
		if p.Bits() == 0 {
			return nil, talk.Usage(fmt.Errorf("%s %s is everything; name the ranges", flag, text))
		}
		all = append(all, p.Masked())
	}
	return all, nil
}

func (a *app) connect(c *cobra.Command, o connectOptions) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	detach := process.Detachment()
	if o.detach && detach == nil {
		return a.behind(c)
	}
	cfg.Stderr = a.Err
	cfg.HowToEnd, cfg.Up = a.stay(detach)
	if o.printClient {
		cfg.StockClient = a.Out
	}
	return a.reach(&cfg.TunnelConfig, func() error { return session.NewConnect(cfg).Run(c.Context()) })
}

// stay is what a session that is up is ended by, and what it does first.
func (a *app) stay(detach func() error) (end string, up func() error) {
	if detach == nil {
		return "Ctrl-C", nil
	}
	return "culvert disconnect", func() error {
		a.Steps().LeaveTerminal()
		return detach()
	}
}

// reach completes the configuration of a verb that reaches the cluster, and runs it.
func (a *app) reach(cfg *session.TunnelConfig, run func() error) error {
	cluster, err := a.cluster()
	if err != nil {
		return err
	}
	defer cluster.Close()
	defer talk.OutliveReaders()()
	steps := a.Steps()
	cfg.Cluster, cfg.Reporter, cfg.Log = cluster, steps, a.Logger()
	if err = run(); err != nil {
		steps.Fail()
	}
	return err
}

// cluster is the one that the flags name.
func (a *app) cluster() (*kube.Cluster, error) { return a.clusterBy(false) }

// clusterAt is the cluster of a context and a namespace that a file names; flags come first.
func (a *app) clusterAt(context, namespace string) (*kube.Cluster, error) {
	a.context, a.namespace = cmp.Or(a.context, context), cmp.Or(a.namespace, namespace)
	return a.cluster()
}

// clusterBy asks nobody anything on the way, if batch is set.
func (a *app) clusterBy(batch bool) (*kube.Cluster, error) {
	cfg := a.kubeConfig()
	log := cfg.Log
	if a.ssh == "" {
		return kube.Load(cfg)
	}
	bastion, err := a.openSSH(batch, log)
	if err != nil {
		return nil, err
	}
	cfg.Through = bastion
	cluster, err := kube.Load(cfg)
	if err != nil {
		bastion.Close()
	}
	return cluster, err
}

// kubeConfig is what the flags say.
func (a *app) kubeConfig() kube.Config {
	log := a.Logger()
	kube.LogTo(log)
	return kube.Config{
		Kubeconfig: a.kubeconfig, Context: a.context, Namespace: a.namespace,
		UserAgent: "culvert/" + a.version, Log: log,
	}
}

// openSSH opens the way to the API server.
func (a *app) openSSH(batch bool, log *slog.Logger) (*session.Bastion, error) {
	report := a.Steps()
	if batch {
		report = (&talk.Person{Err: io.Discard, Quiet: true}).Steps()
	}
	bastion := session.NewBastion(session.BastionConfig{Destination: a.ssh, Batch: batch, Reporter: report, Log: log})
	report.Begin("opening the connection of ssh")
	if err := bastion.Open(a.ctx); err != nil {
		bastion.Close()
		report.Fail()
		return nil, err
	}
	report.Done("ssh to " + a.ssh)
	return bastion, nil
}

// defaultImage is the shadow that belongs to this binary.
func (a *app) defaultImage() string {
	if image := os.Getenv("CULVERT_IMAGE"); image != "" {
		return image
	}
	return "ghcr.io/culvert-dev/culvert-shadow:" + a.version
}
