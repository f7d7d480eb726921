package hubs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

type agentOptions struct {
	Wire
	name   string
	offers []string

	install, uninstall, print bool
}

const agentLong = `Make a host of this machine at a hub: it is reached there by name, at the ports that it
offers and nowhere else, for as long as this runs. It only dials out, by way of HTTPS_PROXY
where that is set. That the hub is away, or refuses, never ends it.`

func (a *app) agentCommand() *cobra.Command {
	var o agentOptions
	c := &cobra.Command{
		Use:   "agent",
		Short: "Make this machine a host of a hub, until Ctrl-C",
		Long:  agentLong,
		Example: `  culvert agent --hub hub.example:8443 --name db-01 --offer 22
  culvert agent --hub hub.example:8443 --offer 8080=10.0.0.7:80 --offer 53/udp`,
		Args: talk.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.agent(c, o) },
	}
	f := c.Flags()
	o.flags(f, "that of --join, else ~/.ssh/id_ed25519", "that of --join, else ~/.ssh/known_hosts")
	f.StringVar(&o.name, "name", "", "name of this host there (default: the machine's)")
	f.StringArrayVar(&o.offers, "offer", nil, "PORT, PORT=PORT or PORT=HOST:PORT, with /udp behind the first for that (repeatable)")
	f.StringVar(&o.join, "join", "", "invitation of the hub's (culvert hub invite): make a key, and have it certified, if that has not been done; - reads it from stdin, where nobody else sees it")
	f.BoolVar(&o.print, "print-unit", false, "print a unit of systemd that runs this agent")
	f.BoolVar(&o.install, "install", false, "write that unit, with a key in "+agentKey+" unless one is named, and start it")
	f.BoolVar(&o.uninstall, "uninstall", false, "stop and remove it; the key stays")
	return c
}

func (o agentOptions) config() (cfg hub.AgentConfig, err error) {
	if len(o.offers) == 0 {
		return cfg, talk.Usage(errors.New("--offer is needed: nothing else is reached"))
	}
	var offers []hub.Offer
	for _, text := range o.offers {
		offer, err := hub.ParseOffer(text)
		if err != nil {
			return cfg, talk.Usage(err)
		}
		offers = append(offers, offer)
	}
	if cfg, err = o.Wire.config(); err != nil {
		return cfg, err
	}
	cfg.Offers, cfg.Others = offers, hub.Reach
	cfg.Name, err = o.host()
	return cfg, err
}

// host is the name of this host.
func (o agentOptions) host() (string, error) {
	if o.name != "" {
		return o.name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("name of this machine: %w", err)
	}
	return name, nil
}

func (a *app) agent(c *cobra.Command, o agentOptions) error {
	switch {
	case o.install && o.print, o.install && o.uninstall, o.print && o.uninstall:
		return talk.Usage(errors.New("--print-unit, --install and --uninstall are one or the other"))
	case o.uninstall:
		return a.uninstallAgent(c.Context())
	case o.join != "" && o.print:
		return talk.Usage(errors.New("--join is done once, and not by a unit: --install does it first"))
	case o.install || o.print:
		return a.unit(c, o)
	}
	if err := a.join(c.Context(), o); err != nil {
		return err
	}
	cfg, err := o.config()
	if err != nil {
		return err
	}
	boss, steps := hub.FindSupervisor(), a.Steps()
	_ = boss.Tell("READY=1") // that the hub is away is no reason to be started again
	go boss.Watch(c.Context())
	say := func(line string) {
		steps.Say(line)
		_ = boss.Tell("STATUS=" + line)
	}
	cfg.Say, cfg.Log = say, a.Logger()
	if err := hub.NewAgent(cfg).Run(c.Context()); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// join makes the key, and has it certified, where there is an invitation.
func (a *app) join(ctx context.Context, o agentOptions) error {
	if o.join == "" {
		return nil
	}
	name, err := o.host()
	if err != nil {
		return err
	}
	token := o.join
	if token == "-" {
		if token, err = bufio.NewReader(os.Stdin).ReadString('\n'); err != nil && token == "" {
			return fmt.Errorf("read the invitation: %w", err)
		}
	}
	steps := a.Steps()
	cfg := hub.JoinConfig{Hub: o.hub, Dial: hub.Reach(o.hub), Token: token, Name: name, Key: o.keyPath(), Say: steps.Say}
	if err := hub.Join(ctx, cfg); err != nil {
		return fmt.Errorf("join %s as %s: %w", o.hub, name, err)
	}
	steps.Say(fmt.Sprintf("%s is a host of %s, by %s", name, o.hub, hub.CertPath(cfg.Key)))
	return nil
}

const (
	agentKey  = "/etc/culvert/agent_key"
	unitsPath = "/etc/systemd/system/"
)

// args are what the service is started with: what was typed, but for where it is from.
func (o agentOptions) args(c *cobra.Command) []string {
	args := []string{"--hub", o.hub}
	for _, offer := range o.offers {
		args = append(args, "--offer", offer)
	}
	if o.name != "" {
		args = append(args, "--name", o.name)
	}
	if c.Flags().Changed("keepalive") {
		args = append(args, "--keepalive", o.keepalive.String())
	}
	return args
}

// unit prints the unit, or writes and starts it. What is wrong is said before.
func (a *app) unit(c *cobra.Command, o agentOptions) error {
	if o.key == "" {
		o.key = agentKey
	}
	key, err := filepath.Abs(o.key)
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if o.install && hidden(program) {
		return fmt.Errorf("the service would not see %s: install -m 755 %s /usr/local/bin/culvert, and begin again with that", program, program)
	}
	if err := a.join(c.Context(), o); err != nil {
		return err
	}
	if _, err := os.Stat(key); err == nil {
		if _, err := o.config(); err != nil {
			return err
		}
	}
	text, err := o.unitText(c, program, key)
	if err != nil {
		return err
	}
	if o.print {
		_, err := fmt.Fprint(a.Out, text)
		return err
	}
	if err := a.makeKey(key); err != nil {
		return fmt.Errorf("make %s: %w", key, err)
	}
	return a.installAgent(c.Context(), text)
}

func (o agentOptions) unitText(c *cobra.Command, program, key string) (string, error) {
	known, err := o.known()
	if err != nil {
		return "", err
	}
	args := o.args(c)
	for _, line := range known.Lines() {
		args = append(args, "--hub-key", line)
	}
	cert := ""
	if path, err := filepath.Abs(o.certPath()); err == nil {
		if _, err := os.Stat(path); err == nil {
			cert = path
		}
	}
	text, err := hub.Unit(program, args, key, cert)
	if err != nil {
		return "", talk.Usage(err)
	}
	return text, nil
}

// hidden tells whether a service that has no homes and a /tmp of its own lacks a file.
func hidden(path string) bool {
	return slices.ContainsFunc([]string{"/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/"}, func(p string) bool { return strings.HasPrefix(path, p) })
}

// makeKey makes one if there is none, and tells the line that a hub needs.
func (a *app) makeKey(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := hub.MakeKey(path, "culvert agent"); err != nil {
		return err
	}
	public, err := os.ReadFile(path + ".pub")
	if err != nil {
		return err
	}
	a.Steps().Say("made " + path + "; the hub's authorized_keys needs a line with a permitlisten and " + strings.TrimSpace(string(public)))
	return nil
}

func (a *app) installAgent(ctx context.Context, text string) error {
	path := unitsPath + hub.UnitName
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write the unit: %w", err)
	}
	for _, args := range [][]string{{"daemon-reload"}, {"enable", hub.UnitName}, {"restart", hub.UnitName}} {
		if err := systemctl(ctx, args...); err != nil {
			return err
		}
	}
	a.Steps().Say("installed as " + path + ", and started: systemctl status " + hub.UnitName)
	return nil
}

func (a *app) uninstallAgent(ctx context.Context) error {
	path := unitsPath + hub.UnitName
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("find the unit: %w", err)
	}
	if err := systemctl(ctx, "disable", "--now", hub.UnitName); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the unit: %w", err)
	}
	return systemctl(ctx, "daemon-reload")
}

func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
