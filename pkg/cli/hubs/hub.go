package hubs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

const hubLong = `Be a hub: the place where hosts that can only dial out are reached by name. They come by
"culvert agent", or by any SSH client (ssh -NR db-01:22:localhost:22 hub), and are reached
by any as well (ssh -J hub db-01), by HTTP CONNECT and by SOCKS5, all on one port.

Who may do what is an authorized_keys file. Without permitlisten="db-01:22" a key is no
host, without permitopen="db-*:22" it reaches none; from, expiry-time, restrict and
cert-authority mean what they mean to sshd. A line may have the word "anonymous" in place of
a key, with a from. The file is read again when it changes; while it is wrong, what was
before holds. Each host and each connection is a line of JSON on stdout.`

const sshConfigLong = `Print the lines of ssh_config that lead to hosts of a hub, and the line of known_hosts that
goes with them: ssh, scp, rsync, Ansible and whatever else is built on ssh reach them by name
then.`

func (a *app) sshConfigCommand() *cobra.Command {
	var user, key, hubKey, authority string
	c := &cobra.Command{
		Use:     "ssh-config HUB:PORT HOST...",
		Short:   "Print the lines of ssh_config that lead to hosts of a hub",
		Long:    sshConfigLong,
		Example: "  culvert ssh-config hub.example:8443 'db-*' >> ~/.ssh/config",
		Args:    atLeast(2),
		RunE: func(_ *cobra.Command, args []string) error {
			host, port, err := net.SplitHostPort(args[0])
			if err != nil || host == "" || port == "" {
				return talk.Usage(fmt.Errorf("the hub is HOST:PORT, not %q", args[0]))
			}
			for _, word := range slices.Concat(args, []string{user, key}) {
				if strings.ContainsAny(word, " \t\r\n\"#") {
					return talk.Usage(fmt.Errorf("%q is no word of ssh_config", word))
				}
			}
			if hubKey != "" {
				if _, err := hub.ParsePublicKey(hubKey); err != nil {
					return talk.Usage(fmt.Errorf("--hub-key: %w", err))
				}
				fmt.Fprintf(a.Out, "# known_hosts: %s %s\n", hub.KnownName(args[0]), strings.TrimSpace(hubKey))
			}
			if authority != "" {
				if _, err := hub.ParsePublicKey(authority); err != nil {
					return talk.Usage(fmt.Errorf("--ca: %w", err))
				}
				fmt.Fprintf(a.Out, "# known_hosts: %s\n", hostLine(strings.Join(args[1:], ","), strings.TrimSpace(authority)))
			}
			alias := "culvert-hub-" + host
			fmt.Fprintf(a.Out, "Host %s\n  HostName %s\n  Port %s\n  ServerAliveInterval 15\n  Ciphers %s\n", alias, host, port, ciphers)
			if user != "" {
				fmt.Fprintf(a.Out, "  User %s\n", user)
			}
			if key != "" {
				fmt.Fprintf(a.Out, "  IdentityFile %s\n  IdentitiesOnly yes\n", key)
			}
			_, err = fmt.Fprintf(a.Out, "Host %s\n  ProxyJump %s\n", strings.Join(args[1:], " "), alias)
			return err
		},
	}
	c.Flags().StringVar(&user, "user", "", "who to be at the hub, where a certificate counts")
	c.Flags().StringVar(&key, "key", "", "file with the key to show there")
	c.Flags().StringVar(&hubKey, "hub-key", "", "the hub's public key, to print the line of known_hosts, too")
	c.Flags().StringVar(&authority, "ca", "", "the public key of the authority that has signed the hosts' keys, to print its line of known_hosts")
	return c
}

// ciphers are OpenSSH's with authentication built in. Its own first choice, ChaCha20, costs a
// hub twice as much.
const ciphers = "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com"

type hubOptions struct {
	listen, rights, hostKey string
	cert, key               string
	caKey, caRules          string
	hostCert                string
	names                   []string
	peers                   []string
	keepalive, drain        time.Duration
	metrics, advertise      string
	balancers               []string
}

func (a *app) hubCommand() *cobra.Command {
	var o hubOptions
	c := &cobra.Command{
		Use:   "hub",
		Short: "Let hosts that can only dial out be reached by name",
		Long:  hubLong,
		Example: `  ssh-keygen -t ed25519 -N '' -f hub_key
  culvert hub --listen :8443 --authorized-keys keys --host-key hub_key`,
		Args: talk.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.hub(c, o) },
	}
	f := c.Flags()
	f.StringVar(&o.listen, "listen", ":8443", "where to listen")
	f.StringVar(&o.rights, "authorized-keys", "", "file that says who may do what")
	f.StringVar(&o.hostKey, "host-key", "", "file with the hub's private key, as ssh-keygen makes it")
	f.StringVar(&o.cert, "tls-cert", "", "file with a certificate for clients of TLS (default: one of the host key, which nobody has signed)")
	f.StringVar(&o.key, "tls-key", "", "file with its key")
	f.StringVar(&o.caKey, "ca-key", "", "file with the private key of the authority that signs certificates")
	f.StringVar(&o.caRules, "ca-rules", "", "file that says which ID tokens are worth which certificate")
	f.StringVar(&o.hostCert, "host-cert", "", "file with a certificate of the host key, as ssh-keygen -h makes it")
	f.StringArrayVar(&o.names, "name", nil, "name that the hub is reached by: it makes itself a certificate for that with --ca-key (repeatable)")
	f.DurationVar(&o.drain, "drain", 30*time.Second, "how long open connections have when it is told to end; a second Ctrl-C ends them")
	f.StringArrayVar(&o.peers, "peer", nil, "another hub with the same host key, HOST:PORT, or dns:HOST:PORT for all that a name leads to (repeatable)")
	f.StringVar(&o.advertise, "advertise", "", "where agents may dial this very hub, HOST:PORT, which its peers tell them (default: they come by chance)")
	f.DurationVar(&o.keepalive, "keepalive", defaultKeepalive, "how long a silent wire is taken for alive")
	f.StringSliceVar(&o.balancers, "proxy-protocol-from", nil, "network of balancers that say who has come by them, by the PROXY protocol, as 10.0.0.0/24 (repeatable)")
	f.StringVar(&o.metrics, "metrics", "", "where to listen for Prometheus, as 127.0.0.1:9090 (default: nowhere)")
	c.AddCommand(a.inviteCommand(), a.loginCommand(), a.authorityCommand())
	return c
}

const (
	defaultKeepalive = 42 * time.Second
	beatsOfLife      = 7 // that a wire may miss
)

func (o hubOptions) config() (cfg hub.Config, rights *hub.File[hub.Rights], err error) {
	switch {
	case o.rights == "":
		return cfg, nil, talk.Usage(errors.New("--authorized-keys is needed: it says who may do what"))
	case o.hostKey == "":
		return cfg, nil, talk.Usage(errors.New("--host-key is needed: ssh-keygen -t ed25519 -N '' -f FILE makes one"))
	case o.keepalive < time.Second:
		return cfg, nil, talk.Usage(errors.New("--keepalive is at least 1s"))
	case len(o.names) > 0 && (o.caKey == "" || o.hostCert != ""):
		return cfg, nil, talk.Usage(errors.New("--name goes with --ca-key, and without --host-cert"))
	case o.advertise != "" && !isHostPort(o.advertise):
		return cfg, nil, talk.Usage(fmt.Errorf("--advertise is HOST:PORT, not %q", o.advertise))
	}
	if rights, err = hub.OpenFile(o.rights, hub.ParseRights); err != nil {
		return cfg, nil, fmt.Errorf("read --authorized-keys: %w", err)
	}
	if cfg.HostKey, err = hub.ReadKey(o.hostKey); err != nil {
		return cfg, nil, fmt.Errorf("read --host-key: %w", err)
	}
	if cfg.TLS, err = hub.ReadTLS(o.cert, o.key); err != nil {
		return cfg, nil, fmt.Errorf("read --tls-cert: %w", err)
	}
	if err := o.certificates(&cfg); err != nil {
		return cfg, nil, err
	}
	if len(o.peers) > 0 {
		cfg.Peers = hub.Addresses(o.peers)
	}
	if cfg.Balancers, err = networks(o.balancers); err != nil {
		return cfg, nil, talk.Usage(fmt.Errorf("--proxy-protocol-from: %w", err))
	}
	cfg.Rights, cfg.Beat, cfg.Drain, cfg.Advertise = rights.Now, o.keepalive/beatsOfLife, o.drain, o.advertise
	return cfg, rights, nil
}

// certificates are those that the hub makes, and its own.
func (o hubOptions) certificates(cfg *hub.Config) (err error) {
	cfg.Names = o.names
	if o.caKey != "" {
		if cfg.CA, err = readAuthority(o.caKey); err != nil {
			return err
		}
	}
	if o.hostCert != "" {
		file, err := hub.OpenCert(cfg.HostKey, o.hostCert)
		if err != nil {
			return fmt.Errorf("read --host-cert: %w", err)
		}
		if file.Now() == nil {
			return fmt.Errorf("read --host-cert: %s: %w", o.hostCert, os.ErrNotExist)
		}
		cfg.HostCert = file.Now
	}
	return nil
}

// exchange has the hub give certificates for ID tokens; the rules are nil if it does not.
func (o hubOptions) exchange(cfg *hub.Config) (*hub.File[ca.Rules], error) {
	switch {
	case o.caRules == "":
		return nil, nil
	case cfg.CA == nil:
		return nil, talk.Usage(errors.New("--ca-rules needs --ca-key: it signs what they say"))
	}
	rules, err := hub.OpenFile(o.caRules, ca.ParseRules)
	if err != nil {
		return nil, fmt.Errorf("read --ca-rules: %w", err)
	}
	cfg.Exchange = ca.NewExchange(cfg.CA, rules.Now, nil)
	return rules, nil
}

func (a *app) hub(c *cobra.Command, o hubOptions) error {
	cfg, rights, err := o.config()
	if err != nil {
		return err
	}
	rules, err := o.exchange(&cfg)
	if err != nil {
		return err
	}
	cfg.Hurry = a.Hurry
	cfg.Log, cfg.Audit = a.Logger(), slog.New(slog.NewJSONHandler(a.Out, nil))
	h, err := hub.New(cfg)
	if err != nil {
		return err
	}
	if o.metrics != "" {
		end, err := serveMetrics(o.metrics, h)
		if err != nil {
			return err
		}
		defer end()
	}
	l, err := (&net.ListenConfig{Control: channel.Congestion}).Listen(c.Context(), "tcp", o.listen)
	if err != nil {
		return err
	}
	a.Steps().Say(fmt.Sprintf("listening at %s; Ctrl-C ends it", l.Addr()))
	watching, end := context.WithCancel(context.WithoutCancel(c.Context())) // also while it leaves
	defer end()
	go rights.Watch(watching, a.reread("rights", h.RightsRead))
	if rules != nil {
		go rules.Watch(watching, a.reread("rules", func(error) {}))
	}
	if err := h.Serve(c.Context(), l); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// reread tells of a file that was read again, or that it is wrong.
func (a *app) reread(what string, then func(error)) func(error) {
	return func(err error) {
		if err != nil {
			a.Steps().Warn(fmt.Sprintf("the %s are as before: %v", what, err))
		} else {
			a.Steps().Say(what + " read again")
		}
		then(err)
	}
}

func isHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	return err == nil && host != "" && port != ""
}

// networks are ADDRESS/BITS, or an address alone.
func networks(texts []string) (all []netip.Prefix, err error) {
	for _, t := range texts {
		p, err := netip.ParsePrefix(t)
		if a, alone := netip.ParseAddr(t); alone == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, p.Masked())
	}
	return all, nil
}

// serveMetrics answers Prometheus at an address of its own until it is ended.
func serveMetrics(address string, h *hub.Hub) (end func(), err error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h.Metrics())
	s := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second}
	go func() { _ = s.Serve(l) }() // which says that it was ended
	return func() { s.Close() }, nil
}
