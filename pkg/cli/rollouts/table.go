package rollouts

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/release"
)

// cell is a text of a host's in a table: one line, and nothing for a terminal to obey.
func cell(text string) string {
	if text == "" {
		return "-"
	}
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 }), " ")
}

// printReport prints who runs what, and below it what failed hosts have said.
func printReport(out io.Writer, rows []deploy.Row) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "HOST\tROLE\tRELEASE\tSTATE\tWHY")
	for _, r := range rows {
		why := r.Error
		if r.Phase != "" && why != "" {
			why = r.Phase + ": " + why
		}
		if r.Next != "" {
			why = "would go back to " + r.Next
		}
		if why == "" && r.Before != r.Release {
			why = "was " + orNone(r.Before)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.Host, cell(r.Role), cell(r.Release), r.State, cell(why))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, r := range rows {
		if r.Output == "" {
			continue
		}
		fmt.Fprintf(out, "\n%s said last:\n", r.Host)
		lines := strings.Split(strings.TrimRight(r.Output, "\n"), "\n")
		for _, line := range lines[max(0, len(lines)-mostLines):] {
			fmt.Fprintln(out, "  "+cell(line))
		}
	}
	return nil
}

// mostLines is how much of what failed is shown.
const mostLines = 20

func orNone(id string) string {
	if id == "" {
		return "no release"
	}
	return id
}

// printPlan prints what would be done.
func printPlan(out io.Writer, p *deploy.Plan) error {
	of := ""
	if p.Commit != "" {
		of = " of " + short(p.Commit)
	}
	fmt.Fprintf(out, "%s: release %s%s, %s, %s\n", strings.TrimSpace(p.App+" "+p.Env), p.Release, of, count(p.Files, "file"), size(p.Bytes))
	for _, line := range p.Does {
		fmt.Fprintln(out, "  "+strings.ReplaceAll(strings.TrimSpace(line), "\n", "\n    "))
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "HOST\tROLE\tBATCH\tRUNS\tSEND\tPROBLEMS")
	for _, h := range p.Hosts {
		batch := 1 + slices.IndexFunc(p.Batches, func(names []string) bool { return slices.Contains(names, h.Host) })
		var problems []string
		for _, problem := range h.Problems {
			problems = append(problems, problem.Text)
		}
		if h.Holder != "" {
			problems = append(problems, "just now with "+h.Holder)
		}
		send := size(h.Send)
		if h.Unchanged {
			send = "nothing to do"
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\n", h.Host, cell(h.Role), batch, cell(h.Current), send, cell(strings.Join(problems, "; ")))
	}
	return w.Flush()
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func short(commit string) string { return commit[:min(7, len(commit))] }

// printReleases prints the releases, and on which hosts they are how.
func printReleases(out io.Writer, all []deploy.Listed) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "RELEASE\tCOMMIT\tWHEN\tWHO\tHOSTS")
	for _, l := range all {
		when := "-"
		if !l.When.IsZero() {
			when = l.When.UTC().Format(time.DateTime)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", cell(l.ID), cell(short(l.Commit)), when, cell(l.Who), hostsOf(l))
	}
	return w.Flush()
}

// hostsOf is how a release is on hosts, as "live: web-1 web-2; good: web-3".
func hostsOf(l deploy.Listed) string {
	var order []string
	names := map[string][]string{}
	for _, h := range l.Hosts {
		state := h.State
		if h.Error == release.GoneBack {
			state = h.Error
		}
		if h.Current {
			state = "live"
			if h.State != release.StateGood {
				state = "live, " + h.State
			}
		}
		if state = cell(state); names[state] == nil {
			order = append(order, state)
		}
		names[state] = append(names[state], h.Host)
	}
	for i, state := range order {
		order[i] = state + ": " + strings.Join(names[state], " ")
	}
	return strings.Join(order, "; ")
}
