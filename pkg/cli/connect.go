package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/session"
)

const connectLong = `Join this machine to the cluster's network: pods and Services answer by address
and by name (web, web.shop, web.shop.svc.cluster.local) until you stop it with
Ctrl-C; then this machine and the cluster are as before.

Kubernetes is spoken to as you. Only a small child runs as root, for the device,
its routes and the resolver; it is started with sudo where you are not root.`

func (a *app) connectCommand() *cobra.Command {
	var o connectOptions
	c := &cobra.Command{
		Use:   "connect",
		Short: "Join this machine to the cluster's network until Ctrl-C",
		Long:  connectLong,
		Example: `  culvert connect
  culvert connect --context staging -n shop
  culvert connect --include 10.20.0.0/16 --exclude 10.96.7.0/24`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.connect(c, o) },
	}
	f := c.Flags()
	f.StringSliceVar(&o.include, "include", nil, "address range to route to the cluster as well (repeatable)")
	f.StringSliceVar(&o.exclude, "exclude", nil, "address range never to route to the cluster (repeatable)")
	f.StringVar(&o.endpoint, "endpoint", "", "where to reach the shadow past the API server, when it can: auto (a port of its node), HOST or HOST:PORT")
	o.flags(a, c, "shadow")
	return c
}

type connectOptions struct {
	farOptions
	include, exclude []string
	endpoint         string
}

// config checks what was typed.
func (o connectOptions) config() (cfg session.ConnectConfig, err error) {
	if cfg.FarEnd, err = o.farEnd(); err != nil {
		return cfg, err
	}
	if cfg.Endpoint, err = endpoint(o.endpoint); err != nil {
		return cfg, err
	}
	if cfg.Include, err = parsePrefixes("--include", o.include); err != nil {
		return cfg, err
	}
	if err := privileged.CheckRoutes(cfg.Include); err != nil {
		return cfg, usage(fmt.Errorf("--include: %w", err))
	}
	cfg.Exclude, err = parsePrefixes("--exclude", o.exclude)
	return cfg, err
}

// endpoint is an address or a name, and a port if there is one.
func endpoint(text string) (string, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		host, port = text, "1"
	}
	if n, err := strconv.ParseUint(port, 10, 16); text != "" && (host == "" || err != nil || n == 0 || strings.ContainsAny(host, "/ [")) {
		return "", usage(fmt.Errorf("--endpoint is auto, HOST or HOST:PORT, not %q", text))
	}
	return text, nil
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
			return nil, usage(fmt.Errorf("%s takes an address range like 10.20.0.0/16, not %q", flag, text))
		}
		if p.Bits() == 0 {
			return nil, usage(fmt.Errorf("%s %s is everything; name the ranges", flag, text))
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
	cluster, err := a.cluster()
	if err != nil {
		return err
	}
	defer cluster.Close()
	defer outliveReaders()()
	steps := a.steps()
	cfg.Cluster, cfg.Reporter, cfg.Stderr, cfg.Log = cluster, steps, a.err, a.logger()
	err = session.NewConnect(cfg).Run(c.Context())
	if err != nil {
		steps.Fail()
	}
	return err
}

// outliveReaders lets writes to a closed pipe fail like any other: of "culvert
// connect | tee log" Ctrl-C ends tee first, and there is much to put back.
func outliveReaders() (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGPIPE)
	return func() { signal.Stop(signals) }
}

// cluster is the one that the flags name.
func (a *app) cluster() (*kube.Cluster, error) {
	log := a.logger()
	kube.LogTo(log)
	return kube.Load(kube.Config{
		Kubeconfig: a.kubeconfig, Context: a.context, Namespace: a.namespace,
		UserAgent: "culvert/" + a.version, Log: log,
	})
}

// defaultImage is the shadow that belongs to this binary.
func (a *app) defaultImage() string {
	if image := os.Getenv("CULVERT_IMAGE"); image != "" {
		return image
	}
	return "ghcr.io/culvert-dev/culvert-shadow:" + a.version
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usage(errors.New(c.CommandPath() + " takes no arguments, but was given " + fmt.Sprintf("%q", args[0])))
}
