package cli

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/session"
)

const exchangeLong = `Bring the traffic of a Service to a process on this machine until Ctrl-C; then the
Service is as before, and no request is lost on the way.

No pod is restarted or changed. While this machine is silent, or nothing listens
at the address, the original answers; after the grace time the cluster puts the
Service back by itself. With --header and --path only matching requests come
here, and several people can share a Service. Needs no root.

After -- is a command that serves it: it gets the environment of the original's
container. Ctrl-C leads the traffic back first, then interrupts the command, which has
answered what it had begun; a second Ctrl-C interrupts it at once. A command that reads
from the terminal has Ctrl-C for itself, and the exchange ends when the command does.

With --method scale the original does not run meanwhile, so that nobody answers in
this machine's stead; at the end it runs again before the traffic goes there. What
somebody else scales meanwhile stays, and is said.

The names of a headless Service lead to addresses, which clients and DNS remember for
the time to live of its answers. After the end who still comes is led to the original
for so long, and only then all is gone: by itself, or, with the rights of the role edit
alone, while this waits. Meanwhile a name reaches only ports that the Service lists
or, of one pod, the pod declares.

With --method ephemeral what is sent to a pod's own address comes here, through a
Service or not: a container is added to that pod, which listens before the original.
It is for a pod, or the only pod of a deployment or statefulset. It needs the right to
add it and one to NET_ADMIN, and the original then sees its pod's address as the
client's. The container ends with the exchange, or after the grace time; that it was
there stays listed in the pod. Its keys are there, too: while it runs, whoever may
read the pod can take the same traffic.`

func (a *app) exchangeCommand() *cobra.Command {
	var o exchangeOptions
	c := &cobra.Command{
		Use:   "exchange TARGET --to [SERVICE_PORT=][HOST:]PORT [-- COMMAND ARGS...]",
		Short: "Bring a Service's traffic to this machine until Ctrl-C",
		Long:  exchangeLong,
		Example: `  culvert exchange svc/web --to 8080
  culvert exchange deploy/web --to http=8080 --to metrics=9090
  culvert exchange svc/web --to 8080 --header 'x-dev: mine' --path /api
  culvert exchange svc/web --to 8080 --mirror
  culvert exchange svc/web --to 8080 --mounts ./mounts -- go run .`,
		Args: func(c *cobra.Command, args []string) error {
			if args, _ = beforeDash(c, args); len(args) == 1 {
				return nil
			}
			return talk.Usage(fmt.Errorf("exchange takes one target, as svc/web, but was given %q", args))
		},
		RunE: func(c *cobra.Command, args []string) error {
			_, o.local.Command = beforeDash(c, args)
			return a.exchange(c, args[0], o)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.to, "to", nil, "where the traffic goes: [SERVICE_PORT=][HOST:]PORT[:http|:tcp|/udp] (repeatable)")
	f.StringArrayVarP(&o.headers, "header", "H", nil, "only requests with this header: 'NAME: VALUE', 'NAME: PREFIX*' or 'NAME: /REGEX/' (repeatable)")
	f.StringVar(&o.path, "path", "", "only requests whose path begins so")
	f.StringVar(&o.method, "method", string(session.BySelector), "selector: what comes through a Service; scale: and the original does not run meanwhile; ephemeral: what is sent to a pod's address")
	_ = c.RegisterFlagCompletionFunc("method", cobra.FixedCompletions(methods, cobra.ShellCompDirectiveNoFileComp))
	f.BoolVar(&o.mirror, "mirror", false, "send copies here and let the original answer")
	f.BoolVar(&o.take, "take", false, "take over what somebody else holds")
	f.StringVar(&o.local.EnvFile, "env-file", "", "write the original's environment to this file while it lasts")
	f.StringVar(&o.local.Mounts, "mounts", "", "copy the original's mounted ConfigMaps and Secrets below this folder while it lasts")
	f.StringVar(&o.local.Container, "container", "", "container of the original's pod, for environment and mounts (default: its main one)")
	o.flags(a, c, "router")
	return c
}

const exposeLong = `Make a new Service whose traffic comes to a process on this machine until Ctrl-C;
then it is gone. Needs no root.`

func (a *app) exposeCommand() *cobra.Command {
	var o exchangeOptions
	var as string
	c := &cobra.Command{
		Use:   "expose [SERVICE_PORT=][HOST:]PORT... --as NAME[:SERVICE_PORT]",
		Short: "Give a process on this machine a Service in the cluster until Ctrl-C",
		Long:  exposeLong,
		Example: `  culvert expose 8080 --as web-preview:80
  culvert expose 80=8080 53=5353/udp --as preview`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return nil
			}
			return talk.Usage(errors.New("expose takes the port of a process on this machine"))
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.to = args
			return a.expose(c, as, o)
		},
	}
	c.Flags().StringVar(&as, "as", "", "name of the new Service, and its port if it is another: NAME[:SERVICE_PORT]")
	o.flags(a, c, "router")
	return c
}

// beforeDash splits what was typed before -- from the command after it.
func beforeDash(c *cobra.Command, args []string) (before, command []string) {
	if n := c.ArgsLenAtDash(); n >= 0 {
		return args[:n], args[n:]
	}
	return args, nil
}

type exchangeOptions struct {
	farOptions
	local        session.Local
	to, headers  []string
	method       string
	path         string
	mirror, take bool
}

// config checks what was typed.
func (o exchangeOptions) config() (cfg session.ExchangeConfig, err error) {
	if cfg.FarEnd, err = o.farEnd(); err != nil {
		return cfg, err
	}
	cfg.Mirror, cfg.Take = o.mirror, o.take
	if len(o.to) == 0 {
		return cfg, talk.Usage(errors.New("--to is missing: the port on this machine that the traffic goes to, as --to 8080"))
	}
	for _, text := range o.to {
		f, err := session.ParseForward(text)
		if err != nil {
			return cfg, talk.Usage(err)
		}
		cfg.To = append(cfg.To, f)
	}
	for _, text := range o.headers {
		h, err := router.ParseHeader(text)
		if err != nil {
			return cfg, talk.Usage(fmt.Errorf("--header: %w", err))
		}
		cfg.Match.Headers = append(cfg.Match.Headers, h)
	}
	if o.path != "" && !strings.HasPrefix(o.path, "/") {
		return cfg, talk.Usage(fmt.Errorf("--path begins with /, not %q", o.path))
	}
	cfg.Match.Path, cfg.Local = o.path, o.local
	return cfg, nil
}

func (a *app) exchange(c *cobra.Command, target string, o exchangeOptions) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	if cfg.Target, err = kube.ParseTarget(target); err != nil {
		return talk.Usage(err)
	}
	if cfg.Method, err = o.methodFor(cfg.Target); err != nil {
		return talk.Usage(err)
	}
	return a.runExchange(c, cfg)
}

var methods = []string{string(session.BySelector), string(session.ByScale), string(session.ByEphemeral)}

// methodFor tells which methods can serve what was typed.
func (o exchangeOptions) methodFor(t kube.Target) (session.Method, error) {
	m := session.Method(o.method)
	switch {
	case !slices.Contains(methods, o.method):
		return m, fmt.Errorf("--method is %s, not %q", strings.Join(methods, " or "), o.method)
	case m == session.ByScale && o.mirror:
		return m, errors.New("--mirror needs an original that answers, and --method scale leaves none")
	case m == session.ByScale && t.Kind == "pod":
		return m, fmt.Errorf("--method scale takes all pods of a deployment or statefulset, not %s alone", t)
	case m == session.ByEphemeral && t.Kind == "service":
		return m, fmt.Errorf("--method ephemeral is for a pod, as pod/NAME, or the only one of deploy/NAME or sts/NAME, not %s", t)
	case m == session.ByEphemeral && (o.endpoint != "" || o.wire == string(wires.WireGuard)):
		return m, errors.New("--endpoint is not for --method ephemeral: nothing leads to another's pod past the API server")
	case m == session.ByEphemeral && len(o.pullSecrets) > 0:
		return m, errors.New("--image-pull-secret cannot be added to a pod that is there: the pod's own pull secrets are used")
	}
	return m, nil
}

// serviceName is a label of RFC 1035.
var serviceName = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (a *app) expose(c *cobra.Command, as string, o exchangeOptions) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	name, port, found := strings.Cut(as, ":")
	if found && len(cfg.To) != 1 {
		return talk.Usage(errors.New("--as has a port only where one is exposed: with several, write SERVICE_PORT=PORT for each"))
	}
	if found && cfg.To[0].Port != "" {
		return talk.Usage(fmt.Errorf("the Service's port is given twice: %s and %s", as, o.to[0]))
	}
	if found {
		cfg.To[0].Port = port
	}
	if cfg.Expose = name; !serviceName.MatchString(name) {
		return talk.Usage(fmt.Errorf("--as is the name of a new Service, as web-preview or web-preview:80, not %q", as))
	}
	return a.runExchange(c, cfg)
}

func (a *app) runExchange(c *cobra.Command, cfg session.ExchangeConfig) error {
	cfg.Local.Stdin, cfg.Local.Stdout, cfg.Local.Stderr, cfg.Hurry = os.Stdin, a.Out, a.Err, a.Hurry
	return a.reach(&cfg.TunnelConfig, func() error { return session.NewExchange(cfg).Run(c.Context()) })
}
