package hubs

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

const dialLong = `Join stdin and stdout to a port of a host that is attached to a hub, as nc does. As the
ProxyCommand of ssh it shows a key at the hub, goes by HTTPS_PROXY where that is set, and
says why it fails. When a hub is lost it goes on by another, if the host runs culvert agent;
else it dials again, unless the host has answered before.`

func (a *app) dialCommand() *cobra.Command {
	var w Wire
	c := &cobra.Command{
		Use:     "dial --hub HUB:PORT HOST:PORT",
		Short:   "Join stdin and stdout to a port of a host of a hub",
		Long:    dialLong,
		Example: `  ssh -o ProxyCommand='culvert dial --hub hub.example:8443 %h:%p' db-01`,
		RunE:    func(c *cobra.Command, args []string) error { return a.dial(c.Context(), args, w) },
	}
	w.Flags(c.Flags())
	return c
}

func (a *app) dial(ctx context.Context, args []string, w Wire) error {
	if len(args) != 1 {
		return talk.Usage(errors.New("dial takes HOST:PORT, as db-01:22"))
	}
	if !isHostPort(args[0]) {
		return talk.Usage(fmt.Errorf("dial takes HOST:PORT, as db-01:22, not %q", args[0]))
	}
	cfg, err := w.Config()
	if err != nil {
		return err
	}
	cfg.Log = a.Logger()
	err = hub.Talk(ctx, cfg, args[0], os.Stdin, os.Stdout)
	if ctx.Err() != nil { // told to end, as ssh does at its own
		return nil
	}
	return err
}
