package cli

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/session"
)

func (a *app) statusCommand() *cobra.Command {
	var output outputFormat
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the sessions that run on this machine",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := session.Statuses(c.Context())
			if err != nil {
				return err
			}
			if all == nil {
				all = []session.Status{}
			}
			return a.print(output, all, func() { a.tableOfStatuses(all) })
		},
	}
	outputFlag(c, &output)
	return c
}

func (a *app) tableOfStatuses(all []session.Status) {
	if len(all) == 0 {
		fmt.Fprintln(a.err, "not connected")
	}
	for i, s := range all {
		if i > 0 {
			fmt.Fprintln(a.out)
		}
		a.tableOfStatus(s)
	}
}

func (a *app) tableOfStatus(s session.Status) {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	row := func(key, format string, args ...any) { fmt.Fprintf(w, key+"\t"+format+"\n", args...) }
	row("session", "%s of %s, process %d, for %v", s.Session, s.Owner, s.PID, time.Since(s.Since).Round(time.Second))
	row("cluster", "%s, namespace %s, %s", s.Context, s.Namespace, s.Server)
	row("shadow", "%s, pod %s", s.Shadow.Kind, s.Shadow.Pod)
	row("wire", "%s", wireLine(s.Wire))
	row("flows", "%d tcp, %d udp, %d ping; %s sent, %s received, %d dials failed",
		s.Flows.TCP, s.Flows.UDP, s.Flows.Ping, byteCount(s.Flows.Sent), byteCount(s.Flows.Received), s.Flows.Failed)
	row("device", "%s, MTU %d, offload %v", s.Device.Name, s.Device.MTU, s.Device.Offload)
	for _, r := range s.Routes {
		row("route", "%s\t%s", r.Prefix, r.Source)
	}
	row("names", "%s, answered at %s; watched namespaces: %s", s.DNS.Mode, s.DNS.Server, strings.Join(s.DNS.Whole, " "))
	for _, m := range s.Missing {
		row("missing", "%s", m)
	}
}

func wireLine(w session.WireStatus) string {
	state := "down"
	if w.Up {
		state = "up"
	}
	line := fmt.Sprintf("%s since %v through %s", state, time.Since(w.Since).Round(time.Second), w.Way)
	if w.RTT != "" {
		line += ", round trip " + w.RTT
	}
	if w.Reopened > 0 {
		line += fmt.Sprintf(", opened again %d times", w.Reopened)
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
