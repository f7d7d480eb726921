package cli

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/session"
)

// viaOptions are of connect to a network behind an SSH server.
type viaOptions struct {
	destination string
	dns         string
	zones       []string
}

func (o *viaOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.destination, "via", "", "SSH server to reach the given ranges by, in place of a cluster: a name of ~/.ssh/config, user@host or ssh://user@host:port")
	f.StringVar(&o.dns, "dns", "", "with --via: DNS server of that network, ADDRESS or ADDRESS:PORT; it is asked over TCP")
	f.StringSliceVar(&o.zones, "dns-zone", nil, "with --via: domain whose names --dns is asked for (repeatable)")
	for _, flag := range []string{"via", "dns", "dns-zone"} {
		_ = c.RegisterFlagCompletionFunc(flag, cobra.NoFileCompletions)
	}
}

// ofVia are the flags that it takes; most others are of a cluster.
var ofVia = []string{"via", "dns", "dns-zone", "exclude", "detach", "verbose", "quiet"}

// viaConfig checks what was typed.
func (o connectOptions) viaConfig(c *cobra.Command, ranges []string) (cfg session.ViaConfig, err error) {
	c.Flags().Visit(func(f *pflag.Flag) {
		if !slices.Contains(ofVia, f.Name) {
			err = talk.Usage(fmt.Errorf("--%s is not for --via", f.Name))
		}
	})
	if err != nil {
		return cfg, err
	}
	if len(ranges) == 0 {
		return cfg, talk.Usage(errors.New("--via takes the address ranges to reach, like 10.0.0.0/8, as arguments"))
	}
	cfg.Destination = o.via.destination
	if cfg.Ranges, err = parsePrefixes("--via", ranges); err != nil {
		return cfg, err
	}
	if err := privileged.CheckRoutes(cfg.Ranges); err != nil {
		return cfg, talk.Usage(fmt.Errorf("--via: %w", err))
	}
	if cfg.Exclude, err = parsePrefixes("--exclude", o.ranges.exclude); err != nil {
		return cfg, err
	}
	cfg.DNS, cfg.Zones, err = o.via.names()
	return cfg, err
}

// domainName is of one label or more.
var domainName = regexp.MustCompile(`^(\w([-\w]{0,61}\w)?\.)*\w([-\w]{0,61}\w)?$`)

// names are the server, which there is none of where none was named, and the domains.
func (o viaOptions) names() (server netip.AddrPort, zones []string, err error) {
	if o.dns == "" {
		if len(o.zones) > 0 {
			err = talk.Usage(errors.New("--dns-zone needs the --dns that knows it"))
		}
		return server, nil, err
	}
	if server, err = netip.ParseAddrPort(o.dns); err != nil {
		a, addrErr := netip.ParseAddr(o.dns)
		if addrErr != nil {
			return server, nil, talk.Usage(fmt.Errorf("--dns takes an address like 10.0.0.2 or 10.0.0.2:53, not %q", o.dns))
		}
		server = netip.AddrPortFrom(a, 53)
	}
	for _, zone := range o.zones {
		zone = strings.Trim(zone, ".")
		if !domainName.MatchString(zone) {
			return server, nil, talk.Usage(fmt.Errorf("--dns-zone takes a domain like corp.example, not %q", zone))
		}
		zones = append(zones, zone)
	}
	return server, zones, nil
}

// leadsTo tells whether some of each range is reached.
func leadsTo(s session.Status, ranges []netip.Prefix) bool {
	for _, r := range ranges {
		if !slices.ContainsFunc(s.Routes, func(route session.RouteStatus) bool { return route.Prefix.Overlaps(r) }) {
			return false
		}
	}
	return true
}

func (a *app) connectVia(c *cobra.Command, o connectOptions, ranges []string) error {
	cfg, err := o.viaConfig(c, ranges)
	if err != nil {
		return err
	}
	detach := process.Detachment()
	if o.detach && detach == nil {
		return a.background(c, "via-"+cfg.Destination, func(s session.Status) bool {
			return s.Kind == session.KindVia && s.Server == cfg.Destination && leadsTo(s, cfg.Ranges)
		})
	}
	cfg.HowToEnd, cfg.Up = a.stay(detach)
	defer talk.OutliveReaders()()
	steps := a.Steps()
	cfg.Reporter, cfg.Stderr, cfg.Log = steps, a.Err, a.Logger()
	err = session.NewVia(cfg).Run(c.Context())
	if err != nil {
		steps.Fail()
	}
	return err
}
