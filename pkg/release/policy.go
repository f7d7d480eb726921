package release

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// A Policy is what a host allows to whoever deploys an app: a file of the host's, which the
// forced command names. What it does not list is refused. An item is the whole text, as it
// is asked for ("pm2 shop", "http http://127.0.0.1:8000/health", the text of a hook), or "*".
type Policy struct {
	App string `yaml:"app"`
	To  string `yaml:"to"` // absolute
	// User is who owns releases, and runs hooks, actions and commands; "" is who runs apply.
	// Only root can name another. Of actions, systemd and supervisor stay apply's.
	User    string   `yaml:"user,omitempty"`
	Shared  []string `yaml:"shared"` // "*" if not there: they are below To. [] is none
	Restart []string `yaml:"restart,omitempty"`
	Drain   []string `yaml:"drain,omitempty"` // and what undoes one
	Health  []string `yaml:"health,omitempty"`
	Hooks   []string `yaml:"hooks,omitempty"`
	Exec    []string `yaml:"exec,omitempty"` // arguments joined by single spaces
}

// goWords are yaml's of a key that is none.
var goWords = regexp.MustCompile(`field (\S+) not found in type \S+`)

// ParsePolicy reads the file. Keys that it does not know are errors, with their lines.
func ParsePolicy(text []byte) (*Policy, error) {
	in := yaml.NewDecoder(bytes.NewReader(text))
	in.KnownFields(true)
	p := &Policy{Shared: []string{everything}}
	if err := in.Decode(p); err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.New("policy: " + goWords.ReplaceAllString(strings.Join(strings.Fields(err.Error()), " "), `unknown key "$1"`))
	}
	switch {
	case p.App == "":
		return nil, errors.New("policy: no app")
	case p.To == "" || p.To[0] != '/' || path.Clean(p.To) != p.To || p.To == "/":
		return nil, fmt.Errorf("policy: to %q is not a clean absolute path", p.To)
	}
	for i, s := range p.Shared {
		p.Shared[i] = strings.TrimSuffix(s, "/")
	}
	return p, nil
}

const everything = "*"

// check is what of a deployer's settings is refused. nil allows all.
func (p *Policy) check(c *Config) []Problem {
	if p == nil {
		return nil
	}
	var all []Problem
	ask := func(list []string, what, text string) {
		if text != "" && !allowed(list, text) {
			all = append(all, Problem{Code: Refused, Text: fmt.Sprintf("the policy of this host does not allow %s %q", what, text)})
		}
	}
	for _, s := range c.Shared {
		ask(p.Shared, "shared", strings.TrimSuffix(s, "/"))
	}
	if a := c.Restart; a != nil {
		ask(p.Restart, "restart", a.String())
	}
	if a := c.Drain; a != nil {
		ask(p.Drain, "drain", a.String())
		if a.Undo != "" {
			ask(p.Drain, "drain", a.Kind+" "+a.Undo)
		}
	}
	if h := c.Health; h != nil {
		ask(p.Health, "health", h.String())
	}
	ask(p.Hooks, "hook", c.Hooks.PreRelease)
	ask(p.Hooks, "hook", c.Hooks.PostRelease)
	return all
}

func allowed(list []string, what string) bool {
	return slices.Contains(list, everything) || slices.ContainsFunc(list, func(item string) bool {
		return strings.TrimSpace(item) == strings.TrimSpace(what)
	})
}

// allowsExec: joined arguments are only told apart where none has a space.
func (p *Policy) allowsExec(argv []string) bool {
	if slices.Contains(p.Exec, everything) {
		return true
	}
	return !slices.ContainsFunc(argv, func(a string) bool { return a == "" || strings.ContainsFunc(a, unicode.IsSpace) }) &&
		slices.Contains(p.Exec, strings.Join(argv, " "))
}
