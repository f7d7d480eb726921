package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// A report is the outcome of one run. As JSON it has every round's figures.
type report struct {
	Time    time.Time `json:"time"`
	Machine string    `json:"machine"`
	Command string    `json:"command"`
	Seconds float64   `json:"seconds"`
	Rounds  int       `json:"rounds"`
	Series  []*series `json:"series"`
	Notes   []string  `json:"notes,omitempty"` // what was left out, and why
}

// A series is paths side by side.
type series struct {
	Title    string    `json:"title"`
	File     string    `json:"file"` // name of the plot
	Base     string    `json:"base"` // the path that ratios are to
	Results  []outcome `json:"results"`
	Failures []string  `json:"failures,omitempty"`
}

// An outcome has the figures of one path, a round each, by the keys of measures.
type outcome struct {
	Path    string               `json:"path"`
	Figures map[string][]float64 `json:"figures"`
}

// begin adds a series.
func (r *report) begin(title, file, base string) *series {
	s := &series{Title: title, File: file + ".svg", Base: base}
	r.Series = append(r.Series, s)
	return s
}

// note says something of the run, once.
func (r *report) note(n string) {
	if !slices.Contains(r.Notes, n) {
		r.Notes = append(r.Notes, n)
	}
}

// outcome is that of a path, which is made if it is not there yet.
func (s *series) outcome(path string) *outcome {
	for i := range s.Results {
		if s.Results[i].Path == path {
			return &s.Results[i]
		}
	}
	s.Results = append(s.Results, outcome{Path: path, Figures: map[string][]float64{}})
	return &s.Results[len(s.Results)-1]
}

// add takes what is known.
func (o *outcome) add(s sample) {
	for key, v := range s {
		if !math.IsNaN(v) && !math.IsInf(v, 0) {
			o.Figures[key] = append(o.Figures[key], v)
		}
	}
}

// median of a measure, and its ratio to that of the base. NaN where there is none.
func (s *series) median(path, key string) (v, ratio float64) {
	v, b := math.NaN(), math.NaN()
	for _, o := range s.Results {
		if o.Path == path {
			v = median(o.Figures[key])
		}
		if o.Path == s.Base {
			b = median(o.Figures[key])
		}
	}
	if b == 0 {
		return v, math.NaN()
	}
	return v, v / b
}

// measures are those of which anything is known.
func (s *series) measures() (known []measure) {
	for _, m := range measures {
		if slices.ContainsFunc(s.Results, func(o outcome) bool { return len(o.Figures[m.Key]) > 0 }) {
			known = append(known, m)
		}
	}
	return known
}

// write has a table for each series, a line for each measure: the medians, and
// what they are of the base's. It is Markdown that can be read as it is.
func (r *report) write(out io.Writer) error {
	b := &bytes.Buffer{}
	fmt.Fprintf(b, "%s, %s: `%s`. Rounds: %d, of which medians; loads of %g s.\n", r.Time.Format(time.DateOnly), r.Machine, r.Command, r.Rounds, r.Seconds)
	for _, s := range r.Series {
		fmt.Fprintf(b, "\n**%s**; ×: of %s's\n\n", s.Title, s.Base)
		s.table(b)
		for _, f := range s.Failures {
			fmt.Fprintf(b, "\nfailed: %s\n", strings.ReplaceAll(f, "\n", "; "))
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(b, "\nnote: %s\n", n)
	}
	_, err := out.Write(b.Bytes())
	return err
}

func (s *series) table(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	row := func(cells ...string) { fmt.Fprintf(w, "| %s\t|\n", strings.Join(cells, "\t| ")) }
	head, rule := []string{""}, []string{"---"}
	for _, o := range s.Results {
		head, rule = append(head, o.Path), append(rule, "---")
	}
	row(head...)
	row(rule...)
	for _, m := range s.measures() {
		cells := []string{m.Name + ", " + m.Unit}
		for _, o := range s.Results {
			cells = append(cells, cell(s.median(o.Path, m.Key)))
		}
		row(cells...)
	}
	w.Flush()
}

func cell(v, ratio float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	if math.IsNaN(ratio) {
		return figure(v)
	}
	return figure(v) + " ×" + figure(ratio)
}

// figure has three digits, and never an exponent.
func figure(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// save writes tables, JSON and a plot for each series into a folder, if there is
// one, and takes away the plots that were there.
func (r *report) save(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	old, _ := filepath.Glob(filepath.Join(dir, "*.svg"))
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	var tables bytes.Buffer
	errs := []error{r.write(&tables)}
	put := func(name string, content []byte) {
		errs = append(errs, os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
	put("bench.json", append(b, '\n'))
	for _, s := range r.Series {
		var svg bytes.Buffer
		plot(&svg, r, s)
		put(s.File, svg.Bytes())
		fmt.Fprintf(&tables, "\n![%s](%s)\n", s.Title, s.File)
	}
	put("bench.md", tables.Bytes())
	return errors.Join(errs...)
}

// machine names this one by what figures depend on.
func machine() string {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	cpus, _ := os.ReadFile("/proc/cpuinfo")
	return fmt.Sprintf("%d cores of %s, %s, Linux %s", runtime.NumCPU(), model(string(cpus)), runtime.GOARCH, strings.TrimSpace(string(kernel)))
}

// model is what /proc/cpuinfo calls the processor; not every kind has a name there.
func model(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "an unnamed processor"
}
