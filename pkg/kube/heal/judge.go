package heal

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// What an exchanged Service bears: the annotation with its Mark, and in its
// selector the label of the session whose router its traffic goes to.
const (
	Annotation = "culvert.dev/exchange"
	Label      = "culvert.dev/session"
)

// The states of a Service, as a session sees it.
const (
	Ours    = "ours"     // its traffic goes to our router
	Changed = "changed"  // it does, and its ports are others than those the router was made for
	Mixed   = "mixed"    // our mark is on it, and somebody else's selector
	PutBack = "put back" // nothing of ours is on it
	Gone    = "gone"
)

// A Mark is the annotation's value: all that undoing needs, on the thing itself.
type Mark struct {
	Session  string            `json:"session"`
	Selector map[string]string `json:"selector"`        // the original one
	Ports    string            `json:"ports,omitempty"` // PortsText of those that the router was made for
	By       string            `json:"by"`
	Since    time.Time         `json:"since"`
}

// ParseMark reads an annotation; there is no mark in what it cannot read.
func ParseMark(annotation string) (m Mark, ok bool) {
	err := json.Unmarshal([]byte(annotation), &m)
	return m, err == nil && m.Session != ""
}

// Live is what the decision is made from.
type Live struct {
	ResourceVersion string
	Annotation      string // its value, "" for none
	Selector        map[string]string
	Ports           string // PortsText
}

// A Port is what of a Service's port says where its traffic goes.
type Port struct {
	Protocol   string
	Port       int
	TargetPort any // a number, or a name
}

// PortsText is the same for ports that lead to the same.
func PortsText(ports []Port) string {
	var all []string
	for _, p := range ports {
		all = append(all, fmt.Sprintf("%s/%d=%v", p.Protocol, p.Port, p.TargetPort))
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// An Op is one line of a JSON patch (RFC 6902).
type Op struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// annotationPath is where a JSON patch finds the annotation.
const annotationPath = "/metadata/annotations/culvert.dev~1exchange"

// Take is the JSON patch that leads a Service's traffic to the router of the
// session of a mark, for the version that was looked at; first says that it will
// be the Service's first annotation.
func Take(live Live, first bool, mark Mark) []Op {
	text, _ := json.Marshal(mark) // it is plain values
	note := Op{"add", annotationPath, string(text)}
	if first {
		note = Op{"add", "/metadata/annotations", map[string]string{Annotation: string(text)}}
	}
	return []Op{
		{"test", "/metadata/resourceVersion", live.ResourceVersion}, note,
		{"add", "/spec/selector", map[string]string{Label: mark.Session}},
	}
}

// Judge says what a session's Service is like, and the JSON patch that puts it
// back: nil where there is nothing of ours, and where no copy of the original
// selector is left. Selectors that others wrote meanwhile are kept; only what
// is ours is taken out of them. The patch holds for the version that was judged.
func Judge(live Live, session string, original map[string]string) (state string, patch []Op) {
	mark, readable := ParseMark(live.Annotation)
	marked := readable && mark.Session == session
	selected := live.Selector[Label] == session
	if !marked && !selected {
		return PutBack, nil
	}
	state = Mixed
	if selected && len(live.Selector) == 1 {
		state = Ours
	}
	if state == Ours && marked && mark.Ports != "" && mark.Ports != live.Ports {
		state = Changed
	}
	if marked && len(mark.Selector) > 0 {
		original = mark.Selector
	}
	selector := maps.Clone(live.Selector)
	if selected {
		delete(selector, Label)
	}
	if len(selector) == 0 {
		selector = original
	}
	if len(selector) == 0 {
		return state, nil
	}
	patch = []Op{{"test", "/metadata/resourceVersion", live.ResourceVersion}}
	if !maps.Equal(selector, live.Selector) {
		patch = append(patch, Op{"add", "/spec/selector", selector}) // add replaces, too
	}
	if marked || selected && live.Annotation != "" && !readable {
		patch = append(patch, Op{Op: "remove", Path: annotationPath})
	}
	return state, patch
}
