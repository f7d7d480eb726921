package router

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// A Match is what a request must be like. The zero value is like everything,
// also what is no HTTP.
type Match struct {
	Headers []Header `json:"headers,omitempty"` // all of them
	Path    string   `json:"path,omitempty"`    // how the path begins, letter for letter
}

// A Header is one condition on a header field: one of its values must be like
// Value. The field "Host" is where the request is meant to go, also in HTTP/2.
type Header struct {
	Name  string `json:"name"`
	Kind  string `json:"kind"` // "exact", "prefix" or "regex"
	Value string `json:"value"`
}

const (
	exact  = "exact"
	prefix = "prefix"
	regex  = "regex"
)

// ParseHeader reads a condition as a user writes it: "x-dev: mine" is exact,
// "x-dev: mine*" a prefix, "x-dev: /re/" a regular expression (RE2) that may
// match anywhere in the value.
func ParseHeader(text string) (Header, error) {
	name, value, ok := strings.Cut(text, ":")
	if !ok {
		return Header{}, fmt.Errorf("header %q has no colon between name and value", text)
	}
	h := Header{Name: http.CanonicalHeaderKey(strings.TrimSpace(name)), Kind: exact, Value: strings.Trim(value, " \t")}
	switch {
	case len(h.Value) >= 2 && h.Value[0] == '/' && h.Value[len(h.Value)-1] == '/':
		h.Kind, h.Value = regex, h.Value[1:len(h.Value)-1]
	case strings.HasSuffix(h.Value, "*"):
		h.Kind, h.Value = prefix, h.Value[:len(h.Value)-1]
	case h.Value == "":
		return Header{}, fmt.Errorf("header %q has no value: write %q for any", text, h.Name+": *")
	}
	_, err := h.test()
	return h, err
}

// String is the condition as ParseHeader reads it; what that cannot say is
// spelt out, so that different conditions have different strings.
func (h Header) String() string {
	name := http.CanonicalHeaderKey(h.Name)
	text := name + ": " + map[string]string{exact: h.Value, prefix: h.Value + "*", regex: "/" + h.Value + "/"}[h.Kind]
	if back, err := ParseHeader(text); err != nil || back.Kind != h.Kind || back.Value != h.Value || strings.ContainsAny(text, `,"`) {
		return name + ": " + h.Kind + " " + strconv.Quote(h.Value)
	}
	return text
}

// String is the same for what matches the same, whatever the order it was
// written in, and different for what is different.
func (m Match) String() string {
	var all []string
	for _, h := range m.Headers {
		all = append(all, h.String())
	}
	slices.Sort(all)
	all = slices.Compact(all)
	if m.Path != "" {
		path := m.Path
		if strings.ContainsAny(path, ` ,"`) || !strconv.CanBackquote(path) {
			path = strconv.Quote(path)
		}
		all = append(all, "path "+path)
	}
	if len(all) == 0 {
		return "everything"
	}
	return strings.Join(all, ", ")
}

// conditions counts what is asked for: who asks for more is meant more.
func (m Match) conditions() int {
	n := len(m.Headers)
	if m.Path != "" {
		n++
	}
	return n
}

// A test tells whether a request is matched.
type test func(*http.Request) bool

// test makes a Match ready for use.
func (m Match) test() (test, error) {
	var all []test
	for _, h := range m.Headers {
		t, err := h.test()
		if err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	if m.Path != "" {
		all = append(all, func(req *http.Request) bool { return strings.HasPrefix(req.URL.Path, m.Path) })
	}
	return func(req *http.Request) bool {
		return !slices.ContainsFunc(all, func(t test) bool { return !t(req) })
	}, nil
}

func (h Header) test() (test, error) {
	if !httpguts.ValidHeaderFieldName(h.Name) || !httpguts.ValidHeaderFieldValue(h.Value) {
		return nil, fmt.Errorf("header %q cannot be in a request", h.Name+": "+h.Value)
	}
	like, err := h.like()
	if err != nil {
		return nil, err
	}
	name := http.CanonicalHeaderKey(h.Name)
	if name == "Host" {
		return func(req *http.Request) bool { return like(req.Host) }, nil
	}
	return func(req *http.Request) bool { return slices.ContainsFunc(req.Header[name], like) }, nil
}

func (h Header) like() (func(string) bool, error) {
	switch h.Kind {
	case exact:
		return func(v string) bool { return v == h.Value }, nil
	case prefix:
		return func(v string) bool { return strings.HasPrefix(v, h.Value) }, nil
	case regex:
		re, err := regexp.Compile(h.Value)
		if err != nil {
			return nil, fmt.Errorf("header %s: %w", h.Name, err)
		}
		return re.MatchString, nil
	}
	return nil, fmt.Errorf("header %s: a value is %s, %s or %s, not %q", h.Name, exact, prefix, regex, h.Kind)
}
