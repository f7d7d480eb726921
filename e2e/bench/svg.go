package main

import (
	"fmt"
	"html"
	"io"
	"math"
)

// Sizes of a plot, in pixels.
const (
	plotWidth = 820
	barLeft   = 290
	barMost   = 420
	barHigh   = 14
	groupGap  = 16
)

var barColours = []string{"#9aa5b1", "#e07b39", "#c94f4f", "#8a63b8", "#1f7a8c", "#2a9d57", "#3566b0", "#d1a52b", "#7d5a4f", "#c76b9b"}

// plot draws a group of bars for each measure, the longest of a group as long as
// can be: measures have units of their own, and what counts is the ratio beside.
func plot(out io.Writer, r *report, s *series) {
	measures := s.measures()
	high := 54 + len(measures)*(len(s.Results)*barHigh+groupGap) + 8
	fmt.Fprintf(out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="11">`+"\n", plotWidth, high)
	fmt.Fprintf(out, `<rect width="%d" height="%d" fill="white"/>`+"\n", plotWidth, high)
	text(out, 8, 18, "", fmt.Sprintf("%s; ×: of %s's", s.Title, s.Base), `font-size="14" font-weight="bold"`)
	text(out, 8, 36, "", fmt.Sprintf("%s; rounds: %d, of which medians; loads of %g s", r.Machine, r.Rounds, r.Seconds), `fill="#555"`)
	y := 54
	for _, m := range measures {
		y = group(out, s, m, y) + groupGap
	}
	fmt.Fprintln(out, "</svg>")
}

// group draws one measure from y on, and tells where it ends.
func group(out io.Writer, s *series, m measure, y int) int {
	better := "less is better"
	if m.more {
		better = "more is better"
	}
	text(out, 8, y+11, "", m.Name, `font-weight="bold"`)
	text(out, 8, y+24, "", m.Unit+", "+better, `fill="#555"`)
	most := 0.0
	for _, o := range s.Results {
		if v, _ := s.median(o.Path, m.Key); v > most { // NaN is not
			most = v
		}
	}
	for i, o := range s.Results {
		v, ratio := s.median(o.Path, m.Key)
		if long := barLength(v, most); long > 0 {
			fmt.Fprintf(out, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", barLeft, y+1, long, barHigh-2, barColours[i%len(barColours)])
			text(out, barLeft+int(long)+5, y+11, "", cell(v, ratio), "")
		} else {
			text(out, barLeft+5, y+11, "", cell(v, ratio), "")
		}
		text(out, barLeft-5, y+11, "end", o.Path, "")
		y += barHigh
	}
	return y
}

func barLength(v, most float64) float64 {
	if math.IsNaN(v) || most <= 0 {
		return 0
	}
	return v / most * barMost
}

func text(out io.Writer, x, y int, anchor, s, attributes string) {
	if anchor != "" {
		attributes += fmt.Sprintf(` text-anchor="%s"`, anchor)
	}
	fmt.Fprintf(out, `<text x="%d" y="%d" %s>%s</text>`+"\n", x, y, attributes, html.EscapeString(s))
}
