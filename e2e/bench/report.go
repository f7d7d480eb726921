package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
)

// A report is the outcome of one run. As JSON it has every round's figures.
type report struct {
	Time     time.Time `json:"time"`
	Machine  string    `json:"machine"`
	Command  string    `json:"command"`
	Seconds  float64   `json:"seconds"`
	Rounds   int       `json:"rounds"`
	Base     string    `json:"base"` // the path that ratios are to
	Series   []series  `json:"series"`
	Failures []string  `json:"failures,omitempty"`
}

// A series is all paths on one condition of the link.
type series struct {
	RTTms   float64   `json:"rttMs"`
	Loss    float64   `json:"lossPercent"`
	By      string    `json:"by,omitempty"` // netem or relay
	Results []outcome `json:"results"`
}

// An outcome has the figures of one path, a round each, by the keys of measures.
type outcome struct {
	Path    string               `json:"path"`
	Figures map[string][]float64 `json:"figures"`
}

func (s series) String() string {
	c := condition{RTT: time.Duration(s.RTTms * float64(time.Millisecond)), Loss: s.Loss}.String()
	if s.By == "" {
		return c
	}
	return c + " by " + s.By
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
func (s series) median(path, base, key string) (v, ratio float64) {
	v, b := math.NaN(), math.NaN()
	for _, o := range s.Results {
		if o.Path == path {
			v = median(o.Figures[key])
		}
		if o.Path == base {
			b = median(o.Figures[key])
		}
	}
	if b == 0 {
		return v, math.NaN()
	}
	return v, v / b
}

// write has a table for each condition, a line for each measure: the medians,
// and what they are of the base's.
func (r *report) write(out io.Writer) {
	fmt.Fprintf(out, "%s\n%s\nmedians of %d rounds of %g s; ×: of %s's\n", r.Machine, r.Command, r.Rounds, r.Seconds, r.Base)
	for _, s := range r.Series {
		fmt.Fprintf(out, "\n%s\n", s)
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		fmt.Fprint(w, "\t\t")
		for _, o := range s.Results {
			fmt.Fprintf(w, "%s\t", o.Path)
		}
		fmt.Fprintln(w)
		for _, m := range measures {
			fmt.Fprintf(w, "%s\t%s\t", m.Name, m.Unit)
			for _, o := range s.Results {
				fmt.Fprintf(w, "%s\t", cell(s.median(o.Path, r.Base, m.Key)))
			}
			fmt.Fprintln(w)
		}
		w.Flush()
	}
	for _, f := range r.Failures {
		fmt.Fprintln(out, "failed:", f)
	}
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

// save writes the JSON and a plot for each condition into a folder.
func (r *report) save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bench.json"), append(b, '\n'), 0o644); err != nil {
		return err
	}
	for _, s := range r.Series {
		var svg bytes.Buffer
		plot(&svg, r, s)
		if err := os.WriteFile(filepath.Join(dir, s.file()), svg.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (s series) file() string {
	name := fmt.Sprintf("rtt-%gms", s.RTTms)
	if s.Loss > 0 {
		name += fmt.Sprintf("-loss-%g", s.Loss)
	}
	return name + ".svg"
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
