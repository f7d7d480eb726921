package hubs

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

const hostsLong = `List the hosts that are attached to a hub, or to another that it knows, of those that your
key may reach, and those that were attached to this one. With names it lists these, and fails
unless all of them are attached.`

type hostsOptions struct {
	wire   Wire
	output string
}

func (a *app) hostsCommand() *cobra.Command {
	var o hostsOptions
	c := &cobra.Command{
		Use:     "hosts --hub HUB:PORT [NAME...]",
		Short:   "List the hosts of a hub",
		Long:    hostsLong,
		Example: "  culvert hosts --hub hub.example:8443\n  culvert hosts --hub hub.example:8443 db-01 && ssh db-01",
		RunE:    func(c *cobra.Command, names []string) error { return a.hosts(c, o, names) },
	}
	f := c.Flags()
	o.wire.Flags(f)
	f.StringVarP(&o.output, "output", "o", "table", "table or json")
	return c
}

func (a *app) hosts(c *cobra.Command, o hostsOptions, names []string) error {
	if o.output != "table" && o.output != "json" {
		return talk.Usage(fmt.Errorf("--output is table or json, not %q", o.output))
	}
	cfg, err := o.wire.Config()
	if err != nil {
		return err
	}
	all, err := hub.Hosts(c.Context(), cfg)
	if err != nil {
		return fmt.Errorf("ask %s for its hosts: %w", o.wire.hub, err)
	}
	var missing []error
	for _, name := range names {
		i := slices.IndexFunc(all, func(h hub.Host) bool { return strings.EqualFold(h.Name, name) })
		if i < 0 || all[i].Hubs == 0 {
			missing = append(missing, fmt.Errorf("%s is not attached", name))
		}
	}
	if len(names) > 0 {
		all = slices.DeleteFunc(all, func(h hub.Host) bool {
			return !slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, h.Name) })
		})
	}
	return errors.Join(append(missing, a.printHosts(o.output, all))...)
}

func (a *app) printHosts(output string, all []hub.Host) error {
	if output == "json" {
		e := json.NewEncoder(a.Out)
		e.SetIndent("", "  ")
		return e.Encode(all)
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NAME\tATTACHED\tHUBS\tPORTS")
	for _, h := range all {
		how := "for " + (time.Duration(h.For) * time.Second).String()
		if h.Hubs == 0 {
			how = "no, for " + (time.Duration(h.For) * time.Second).String()
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", h.Name, how, h.Hubs, strings.Join(h.Ports, " "))
	}
	return w.Flush()
}
