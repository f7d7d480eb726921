package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/session"
)

const proxyLong = `Let programs into the cluster's network that can use a proxy, until Ctrl-C. Needs no
root, and nothing else of this machine changes.

SOCKS5 carries TCP and UDP, HTTP what CONNECT and plain requests do. Names are the
cluster's, as for a pod (web, web.shop, web.shop.svc.cluster.local), where programs leave
them to the proxy, as with socks5h in its URL. What is not the cluster's is reached from
this machine, directly and past any other proxy; --only refuses it.

The environment that most programs take a proxy from is told, printed with --print-env,
or given to the command after --, with which the proxy ends. Whoever may connect to the
address that is listened at is in the cluster's network.`

func (a *app) proxyCommand() *cobra.Command {
	var o proxyOptions
	c := &cobra.Command{
		Use:   "proxy [-- COMMAND ARGS...]",
		Short: "Let programs into the cluster by SOCKS5 and HTTP proxies until Ctrl-C",
		Long:  proxyLong,
		Example: `  culvert proxy
  culvert proxy --socks 1080 --http off
  culvert proxy --only -- curl http://web.shop`,
		Args: func(c *cobra.Command, args []string) error {
			before, _ := beforeDash(c, args)
			return talk.NoArgs(c, before)
		},
		RunE: func(c *cobra.Command, args []string) error {
			_, o.command = beforeDash(c, args)
			return a.proxy(c, o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.socks, "socks", "", "port of the SOCKS5 proxy: 0 is any that is free, off is none (1080; with a command 0)")
	f.StringVar(&o.http, "http", "", "port of the HTTP proxy, likewise (8118; with a command 0)")
	f.StringVar(&o.address, "address", "127.0.0.1", "address of this machine to listen at")
	f.BoolVar(&o.only, "only", false, "refuse what is not the cluster's")
	f.BoolVar(&o.printEnv, "print-env", false, "print the environment to export, for a shell to read")
	o.ranges.flags(c)
	o.flags(a, c, "shadow")
	return c
}

type proxyOptions struct {
	farOptions
	ranges               rangeOptions
	socks, http, address string
	only, printEnv       bool
	command              []string
}

// config checks what was typed.
func (o proxyOptions) config() (cfg session.ProxyConfig, err error) {
	if cfg.FarEnd, err = o.farEnd(); err != nil {
		return cfg, err
	}
	if cfg.SOCKS, err = o.at("--socks", o.socks, "1080"); err != nil {
		return cfg, err
	}
	if cfg.HTTP, err = o.at("--http", o.http, "8118"); err != nil {
		return cfg, err
	}
	if cfg.SOCKS == "" && cfg.HTTP == "" {
		return cfg, talk.Usage(errors.New("--socks and --http are both off"))
	}
	cfg.Only = o.only
	cfg.Include, cfg.Exclude, err = o.ranges.parse()
	return cfg, err
}

// at is where to listen, "" for not to. A command is told, so that any port will do for it.
func (o proxyOptions) at(flag, port, usual string) (string, error) {
	if _, err := netip.ParseAddr(o.address); err != nil {
		return "", talk.Usage(fmt.Errorf("--address is an address of this machine, not %q", o.address))
	}
	switch {
	case port == "off":
		return "", nil
	case port == "" && len(o.command) > 0:
		port = "0"
	case port == "":
		port = usual
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", talk.Usage(fmt.Errorf("%s is a port, 0 or off, not %q", flag, port))
	}
	return net.JoinHostPort(o.address, port), nil
}

func (a *app) proxy(c *cobra.Command, o proxyOptions) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	if o.printEnv {
		cfg.Environ = a.Out
	}
	cfg.Command = process.Config{Args: o.command, Stdin: os.Stdin, Stdout: a.Out, Stderr: a.Err}
	cfg.Hurry = a.Hurry
	return a.reach(&cfg.TunnelConfig, func() error { return session.NewProxy(cfg).Run(c.Context()) })
}
