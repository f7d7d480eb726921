package cli

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/hubs"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/session"
)

const forwardLong = `Have ports of this machine lead to Services, pods and hosts of the cluster until
Ctrl-C. Needs no root, and nothing else of this machine changes.

Each connection is dialled when it comes: to a Service by its name, and to a headless
one or a workload at a pod that is ready then. So it goes on over a pod's restart, and
while the wire is opened again connections wait for it.

Ports are written as kubectl port-forward has them, LOCAL:PORT, PORT for the same on
both sides, :PORT for any that is free; and names of ports. HOST:PORT is as seen from
the cluster, and LOCAL:HOST:PORT as ssh -L has it. With /udp it is a port of UDP.

With --hub there is no cluster: HOST is one that is attached to a hub, and what is asked
for must be permitted to the key that is shown there.`

func (a *app) forwardCommand() *cobra.Command {
	var o forwardOptions
	c := &cobra.Command{
		Use:   "forward TARGET [LOCAL:]PORT[/udp]... | [LOCAL:]HOST:PORT[/udp]...",
		Short: "Have ports of this machine lead into the cluster until Ctrl-C",
		Long:  forwardLong,
		Example: `  culvert forward svc/web 8080:80
  culvert forward deploy/web 8080:http :9090
  culvert forward sts/db 5432 svc/dns 5353:53/udp
  culvert forward 5432:pg.internal:5432
  culvert forward --hub hub.example:8443 5353:db-01:53/udp`,
		RunE: func(c *cobra.Command, args []string) error {
			if c.Flags().Changed("hub") {
				return a.forwardHub(c, args, o)
			}
			for _, flag := range []string{"key", "cert", "hub-key", "known-hosts", "keepalive"} {
				if c.Flags().Changed(flag) {
					return talk.Usage(fmt.Errorf("--%s is for --hub", flag))
				}
			}
			return a.forward(c, args, o)
		},
	}
	c.Flags().StringSliceVar(&o.addresses, "address", []string{"127.0.0.1"}, "address of this machine to listen at, or localhost (repeatable)")
	o.flags(a, c, "shadow")
	o.hub.Flags(c.Flags())
	return c
}

type forwardOptions struct {
	farOptions
	addresses []string
	hub       hubs.Wire
}

// config checks what was typed.
func (o forwardOptions) config(args []string) (cfg session.PortForwardConfig, err error) {
	if cfg.FarEnd, err = o.farEnd(); err != nil {
		return cfg, err
	}
	if cfg.Addresses, err = listenAddresses(o.addresses); err != nil {
		return cfg, err
	}
	cfg.Mappings, err = session.ParseMappings(args)
	return cfg, talk.Usage(err)
}

// listenAddresses has the word localhost stand for both of its addresses, as kubectl has
// it, or for one where this machine has no IPv6.
func listenAddresses(texts []string) (all []string, err error) {
	for _, text := range texts {
		if text == "localhost" {
			all = append(all, "127.0.0.1")
			if l, err := net.ListenPacket("udp", "[::1]:0"); err == nil {
				l.Close()
				all = append(all, "::1")
			}
			continue
		}
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, talk.Usage(fmt.Errorf("--address is an address of this machine or localhost, not %q", text))
		}
		all = append(all, a.String())
	}
	return all, nil
}

func (a *app) forward(c *cobra.Command, args []string, o forwardOptions) error {
	cfg, err := o.config(args)
	if err != nil {
		return err
	}
	cfg.Out = a.Out
	return a.reach(&cfg.TunnelConfig, func() error { return session.NewPortForward(cfg).Run(c.Context()) })
}
