package hubs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

const loginLong = `Get a certificate from a hub for this job's ID token, so that ssh -J reaches what the hub's
rights say that such certificates may. The token is that of --id-token-file, or of
CULVERT_ID_TOKEN, which id_tokens of a GitLab job sets, or GitHub is asked for one.

The certificate is put beside the key, where ssh finds it; the key is made if there is none.
The hub is known by its TLS certificate, or by its key if --hub-key or --known-hosts says so.`

type loginOptions struct {
	reachOptions
	token, audience, key, hosts string
	agent                       bool
}

func (a *app) loginCommand() *cobra.Command {
	var o loginOptions
	c := &cobra.Command{
		Use:   "login HUB:PORT",
		Short: "Get a certificate from a hub for this CI job",
		Long:  loginLong,
		Example: `  culvert hub login hub.example:8443 --cert-authority 'db-*' >> ~/.ssh/known_hosts
  ssh -J hub.example:8443 db-01`,
		Args: exactly(1),
		RunE: func(c *cobra.Command, args []string) error { return a.login(c.Context(), o, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.token, "id-token-file", "", "file with the ID token")
	f.StringVar(&o.audience, "audience", "", "whom GitHub is to make the token for (default: the hub's host)")
	f.StringVar(&o.key, "key", "", "file with the private key (default: ~/.ssh/id_ed25519)")
	f.BoolVar(&o.agent, "ssh-agent", false, "have the agent at SSH_AUTH_SOCK keep a new key and its certificate while that holds, and no file")
	f.StringVar(&o.hosts, "cert-authority", "", "print the line of known_hosts by which hosts of these names (db-*,web-*) are known")
	o.flags(c)
	return c
}

// reachOptions are by what a hub is known.
type reachOptions struct {
	hubKeys           []string
	knownHosts, roots string
}

func (o *reachOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&o.hubKeys, "hub-key", nil, "the hub's public key, as ssh-keygen writes it, or @cert-authority and that of who certifies it (repeatable)")
	f.StringVar(&o.knownHosts, "known-hosts", "", "file with the hub's public key, or a line @cert-authority")
	f.StringVar(&o.roots, "tls-ca", "", "file with the root of its TLS certificate (default: the system's roots)")
}

func (o reachOptions) reach(address string) (l hub.Login, err error) {
	if !isHostPort(address) {
		return l, talk.Usage(fmt.Errorf("the hub is HOST:PORT, not %q", address))
	}
	byKey := len(o.hubKeys) > 0 || o.knownHosts != ""
	if o.roots != "" && byKey {
		return l, talk.Usage(errors.New("a hub is known by --tls-ca, or by --hub-key or --known-hosts"))
	}
	l.Hub, l.Dial = address, hub.Reach(address)
	if !byKey {
		if l.TLS, err = hub.Rooted(o.roots); err != nil {
			return l, fmt.Errorf("read --tls-ca: %w", err)
		}
		return l, nil
	}
	known, err := Wire{hub: address, hubKeys: o.hubKeys, knownHosts: o.knownHosts}.known()
	if err != nil {
		return l, err
	}
	l.TLS = hub.Pinned(known)
	return l, nil
}

func (a *app) login(ctx context.Context, o loginOptions, address string) error {
	l, err := o.reach(address)
	if err != nil {
		return err
	}
	switch {
	case o.agent && (os.Getenv("SSH_AUTH_SOCK") == "" || o.key != ""):
		return talk.Usage(errors.New("--ssh-agent needs an agent (SSH_AUTH_SOCK), and no --key"))
	case strings.ContainsAny(o.hosts, " \t\r\n"):
		return talk.Usage(fmt.Errorf("--cert-authority is names with commas between them, not %q", o.hosts))
	}
	if o.audience == "" {
		o.audience, _, _ = net.SplitHostPort(address)
	}
	token, err := ca.FindToken(ctx, o.token, o.audience)
	if err != nil {
		return err
	}
	path := ofHome(o.key, "id_ed25519")
	private, public, err := o.keyPair(path)
	if err != nil {
		return fmt.Errorf("read --key: %w", err)
	}
	cert, err := l.Certificate(ctx, token, public)
	if err != nil {
		return fmt.Errorf("get a certificate from %s: %w", address, err)
	}
	// From here on something is changed.
	if o.agent {
		err = hub.AddToAgent(os.Getenv("SSH_AUTH_SOCK"), private, cert)
	} else if private != nil {
		err = hub.WriteKey(path, private, public)
	}
	if err == nil && !o.agent {
		err = hub.WriteCertificate(path, cert)
	}
	if err != nil {
		return fmt.Errorf("keep the certificate: %w", err)
	}
	a.Steps().Say(fmt.Sprintf("certificate of %s until %s", strings.Join(cert.ValidPrincipals, ", "), endOf(cert.ValidBefore)))
	if home := sshHome(); o.key == "" && !o.agent && home != "" && !strings.HasPrefix(path, home) {
		a.Steps().Warn(fmt.Sprintf("it is in %s, and ssh looks in %s, whatever HOME is: begin again with HOME=%s", hub.CertPath(path), home, home))
	}
	if o.hosts != "" {
		_, err = fmt.Fprintln(a.Out, hostLine(o.hosts, hub.KeyLine(cert.SignatureKey)))
	}
	return err
}

func endOf(unix uint64) string { return time.Unix(int64(unix), 0).Format("2006-01-02 15:04") }

// hostLine is for known_hosts (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT").
func hostLine(patterns, authority string) string {
	return "@cert-authority " + patterns + " " + authority
}

// sshHome is this user's home for ssh(1), which some containers of CI have another HOME than;
// "" where it is not known.
func sshHome() string {
	u, err := user.LookupId(strconv.Itoa(os.Getuid()))
	if err != nil {
		return ""
	}
	return u.HomeDir
}

// keyPair is a new key, or the one of the file, of which the private half is not needed.
func (o loginOptions) keyPair(path string) (private, public []byte, err error) {
	if _, err := os.Stat(path); err == nil && !o.agent {
		public, err = os.ReadFile(path + ".pub")
		return nil, public, err
	}
	return hub.GenerateKey("culvert")
}

func (a *app) authorityCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "ca",
		Short: "The authority of a hub: certificates for hosts, and its key",
		Args:  talk.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.showCommand(), a.hostCommand())
	return c
}

func (a *app) showCommand() *cobra.Command {
	var o reachOptions
	c := &cobra.Command{
		Use:   "show HUB:PORT",
		Short: "Print the public key of a hub's authority",
		Args:  exactly(1),
		RunE: func(c *cobra.Command, args []string) error {
			l, err := o.reach(args[0])
			if err != nil {
				return err
			}
			key, err := l.Authority(c.Context())
			if err != nil {
				return fmt.Errorf("get the authority's key from %s: %w", args[0], err)
			}
			_, err = fmt.Fprintln(a.Out, key)
			return err
		},
	}
	o.flags(c)
	return c
}

const hostLong = `Sign the key of a host's sshd, which is read from stdin, for its names, and print the
certificate: who trusts the authority for such names knows the host, without ssh-keyscan.`

func (a *app) hostCommand() *cobra.Command {
	var key string
	var last time.Duration
	c := &cobra.Command{
		Use:   "host NAME...",
		Short: "Sign a host's key",
		Long:  hostLong,
		Example: `  ssh db-01 cat /etc/ssh/ssh_host_ed25519_key.pub | culvert hub ca host --ca-key ca db-01 > ssh_host_ed25519_key-cert.pub
  # on the host, in sshd_config: HostCertificate /etc/ssh/ssh_host_ed25519_key-cert.pub`,
		Args: atLeast(1),
		RunE: func(c *cobra.Command, names []string) error {
			if key == "" {
				return talk.Usage(errors.New("--ca-key is needed: ssh-keygen -t ed25519 -f FILE makes one"))
			}
			authority, err := readAuthority(key)
			if err != nil {
				return err
			}
			text, err := io.ReadAll(c.InOrStdin())
			if err != nil {
				return err
			}
			cert, err := hub.SignHost(authority, text, names, last)
			if err != nil {
				return fmt.Errorf("sign the key of %s: %w", names[0], err)
			}
			a.Steps().Say(fmt.Sprintf("it holds until %s; who reaches %s needs, in known_hosts: %s", endOf(cert.ValidBefore), names[0], hostLine(strings.Join(names, ","), hub.KeyLine(cert.SignatureKey))))
			_, err = fmt.Fprintln(a.Out, hub.KeyLine(cert))
			return err
		},
	}
	c.Flags().StringVar(&key, "ca-key", "", "file with the authority's private key")
	c.Flags().DurationVar(&last, "for", 365*24*time.Hour, "how long it holds")
	return c
}

func readAuthority(path string) (*ca.Authority, error) {
	key, err := hub.ReadKey(path)
	if err != nil {
		return nil, fmt.Errorf("read --ca-key: %w", err)
	}
	return ca.New(key)
}

func exactly(n int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error { return talk.Usage(cobra.ExactArgs(n)(c, args)) }
}

func atLeast(n int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error { return talk.Usage(cobra.MinimumNArgs(n)(c, args)) }
}
