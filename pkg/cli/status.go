package cli

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/session"
)

func (a *app) statusCommand() *cobra.Command {
	var output outputFormat
	var wide, watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the sessions that run on this machine",
		Args:  talk.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if watch {
				return a.watchStatus(c, output, wide)
			}
			return a.status(c, output, wide)
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "again each second, until Ctrl-C")
	c.Flags().BoolVar(&wide, "cluster", false, "also what others hold of the namespace's Services and pods")
	outputFlag(c, &output)
	return c
}

func (a *app) status(c *cobra.Command, output outputFormat, wide bool) error {
	all, err := session.Statuses(c.Context())
	if err != nil {
		return err
	}
	all = append([]session.Status{}, all...)
	var held []session.Status
	if wide {
		held, err = a.held(c, all)
	}
	printed := a.print(output, append(all, held...), func() {
		if len(all) > 0 || !wide {
			a.tableOfStatuses(all)
		}
		a.tableOfHeld(held, wide && err == nil)
	})
	return errors.Join(err, printed)
}

// watchStatus shows the status again and again: on a terminal in the same place.
func (a *app) watchStatus(c *cobra.Command, output outputFormat, wide bool) error {
	out, err := a.Out, a.Err
	defer func() { a.Out, a.Err = out, err }()
	clear := ""
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		clear = "\x1b[H\x1b[2J"
	}
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		page := &bytes.Buffer{}
		a.Out, a.Err = page, page
		err := a.status(c, output, wide)
		if c.Context().Err() != nil {
			return nil
		}
		if err != nil { // it may be another time
			explain(page, err, typed{flags: a.clusterFlags()})
		}
		if _, err := fmt.Fprint(out, clear, page); err != nil {
			return err
		}
		select {
		case <-c.Context().Done():
			return nil
		case <-t.C:
		}
	}
}

// held is what other sessions than those of this machine hold.
func (a *app) held(c *cobra.Command, here []session.Status) ([]session.Status, error) {
	cluster, err := a.cluster()
	if err != nil {
		return nil, err
	}
	defer cluster.Close()
	held, err := session.Held(c.Context(), cluster, a.Logger())
	return slices.DeleteFunc(held, func(s session.Status) bool {
		return slices.ContainsFunc(here, func(h session.Status) bool { return h.Session == s.Session })
	}), err
}

func (a *app) tableOfHeld(held []session.Status, looked bool) {
	if len(held) == 0 {
		if looked {
			fmt.Fprintln(a.Err, "nobody else holds anything of this namespace")
		}
		return
	}
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintln(w, "TARGET\tHOLDER\tSINCE\tWHAT\tWIRE\tREQUESTS")
	for _, s := range held {
		wire := "silent"
		if s.Wire.Up {
			wire = "up"
		}
		fmt.Fprintf(w, "%s\t%s\t%v\t%s\t%s\t%d\n", plain(s.Exchange.Subject()), plain(s.Owner), time.Since(s.Since).Round(time.Second), plain(whatComes(*s.Exchange)), wire, s.Exchange.Requests)
	}
}

func (a *app) tableOfStatuses(all []session.Status) {
	if len(all) == 0 {
		fmt.Fprintln(a.Err, "not connected")
	}
	for i, s := range all {
		if i > 0 {
			fmt.Fprintln(a.Out)
		}
		a.tableOfStatus(s)
	}
}

func (a *app) tableOfStatus(s session.Status) {
	w := tabwriter.NewWriter(a.Out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	row := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", key, plain(fmt.Sprintf(format, args...)))
	}
	row("session", "%s of %s, process %d, for %v", s.Session, s.Owner, s.PID, time.Since(s.Since).Round(time.Second))
	if s.Kind == session.KindVia {
		row("via", "%s", s.Server)
	} else {
		row("cluster", "%s, namespace %s, %s", s.Context, s.Namespace, s.Server)
	}
	if s.Exchange != nil {
		rowsOfExchange(row, s.Kind, *s.Exchange)
	}
	if s.Kind != session.KindVia {
		row("shadow", "%s, pod %s%s", s.Shadow.Kind, s.Shadow.Pod, lentBy(s.Shadow))
	}
	row("wire", "%s", wireLine(s.Wire))
	for _, kind := range slices.Sorted(maps.Keys(s.Wire.Others)) {
		row("", "not %s: %s", kind, s.Wire.Others[kind])
	}
	if s.Device != nil {
		rowsOfConnect(row, s)
	}
	if s.Command != nil {
		row(s.Kind, "%s", lineOf(s.Command))
	}
	for _, l := range s.Listening {
		row(s.Kind, "%s/%s\t%s", l.Network, l.Address, l.For)
	}
	for _, m := range s.Missing {
		row("missing", "%s", m)
	}
}

// plain leaves out what a terminal would act on: others wrote some of it.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\t' && unicode.IsControl(r) {
			return '?'
		}
		return r
	}, text)
}

// whatComes is which of the traffic, and how.
func whatComes(e session.ExchangeStatus) string {
	which := cmp.Or(e.Match, "everything")
	if e.Mirror {
		which = "copies of " + which
	}
	if e.Method != "" && e.Method != session.BySelector {
		which += ", by method " + string(e.Method)
	}
	return which
}

func rowsOfConnect(row func(key, format string, args ...any), s session.Status) {
	row("flows", "%d tcp, %d udp, %d ping; %s sent, %s received, %d dials failed",
		s.Flows.TCP, s.Flows.UDP, s.Flows.Ping, byteCount(s.Flows.Sent), byteCount(s.Flows.Received), s.Flows.Failed)
	row("device", "%s, MTU %d, offload %v", s.Device.Name, s.Device.MTU, s.Device.Offload)
	for _, r := range s.Routes {
		from := r.Source
		if r.Real.IsValid() {
			from += fmt.Sprintf(", instead of %v", r.Real)
		}
		row("route", "%s\t%s", r.Prefix, from)
	}
	switch {
	case s.DNS == nil:
	case s.DNS.Mode == "":
		row("names", "answered at %s, of which the resolver was not told", s.DNS.Server)
	case s.DNS.Remote != "":
		row("names", "%s, answered at %s; asked of %s: %s", s.DNS.Mode, s.DNS.Server, s.DNS.Remote, strings.Join(append(s.DNS.Zones, "addresses of the routes"), ", "))
	default:
		row("names", "%s, answered at %s; watched namespaces: %s", s.DNS.Mode, s.DNS.Server, strings.Join(s.DNS.Whole, " "))
	}
	if s.DNS != nil && s.DNS.As != "" {
		row("as", "*.%s", s.DNS.As)
	}
	if s.DNS != nil && s.DNS.Passed {
		row("names", "not found: something else writes %s again and again", s.DNS.Mode)
	}
}

func rowsOfExchange(row func(key, format string, args ...any), kind string, e session.ExchangeStatus) {
	row(kind, "%s, %s", e.Subject(), whatComes(e))
	switch w := e.Workload; {
	case w == nil:
	case w.Replicas > 0:
		row("workload", "%s runs, scaled to %d by somebody else: its pods answer what does not come here", w.Name, w.Replicas)
	default:
		row("workload", "%s does not run", w.Name)
	}
	for _, f := range e.Forwards {
		row("forward", "%s\t%s", f.Port, f.Address)
	}
	row("served", "%d requests, %d other connections; %d open now", e.Requests, e.Connections, e.Open)
}

func wireLine(w session.WireStatus) string {
	state := "down"
	if w.Up {
		state = "up"
	}
	line := fmt.Sprintf("%s since %v, %s through %s", state, time.Since(w.Since).Round(time.Second), w.Kind, w.Way)
	if w.Congestion != "" {
		line += " (" + w.Congestion + ")"
	}
	if w.RTT != "" {
		line += ", round trip " + w.RTT
	}
	if w.Reopened > 0 {
		line += fmt.Sprintf(", opened again %d times", w.Reopened)
	}
	if w.NotDirect != "" {
		line += ", and not past the API server: " + w.NotDirect
	}
	if !w.Up && w.LastError != "" {
		line += ": " + w.LastError
	}
	return line
}

// byteCount in powers of 1,024.
func byteCount(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), -1
	for v >= 1024 && unit < 4 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTP"[unit])
}

func lentBy(s session.ShadowStatus) string {
	if s.Of == "" {
		return ""
	}
	return ", of session " + s.Of
}
