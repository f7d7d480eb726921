package cli

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
	"github.com/culvert-dev/culvert/pkg/session"
)

// ofHub are the flags that forward takes with --hub; the others are of a cluster.
var ofHub = []string{"hub", "key", "cert", "hub-key", "known-hosts", "keepalive", "address", "verbose", "quiet"}

// hubConfig checks what was typed.
func (o forwardOptions) hubConfig(c *cobra.Command, args []string) (cfg session.PortForwardConfig, wire hub.AgentConfig, err error) {
	c.Flags().Visit(func(f *pflag.Flag) {
		if !slices.Contains(ofHub, f.Name) {
			err = talk.Usage(fmt.Errorf("--%s is not for --hub", f.Name))
		}
	})
	if err != nil {
		return cfg, wire, err
	}
	if cfg.Addresses, err = listenAddresses(o.addresses); err != nil {
		return cfg, wire, err
	}
	if cfg.Mappings, err = session.ParseMappings(args); err != nil {
		return cfg, wire, talk.Usage(err)
	}
	for _, m := range cfg.Mappings {
		if m.Host == "" {
			return cfg, wire, talk.Usage(fmt.Errorf("with --hub it is [LOCAL:]HOST:PORT, not %s", m))
		}
	}
	wire, err = o.hub.Config()
	return cfg, wire, err
}

// forwardHub has ports of this machine lead to hosts of a hub.
func (a *app) forwardHub(c *cobra.Command, args []string, o forwardOptions) error {
	cfg, wire, err := o.hubConfig(c, args)
	if err != nil {
		return err
	}
	cfg.Out, cfg.Reporter, wire.Log = a.Out, a.Steps(), a.Logger()
	hosts := hub.NewClient(wire)
	all, ctx := errgroup.WithContext(c.Context())
	all.Go(func() error { return hosts.Run(ctx) })
	all.Go(func() error { return session.ForwardTo(ctx, hosts, cfg) })
	if err := all.Wait(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
