package release

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// A Policy is what a host allows to whoever deploys an app: a file of the host's, which the
// forced command names. What it does not list is refused. An item is the whole text, as it
// is asked for ("pm2 shop", "http http://127.0.0.1:8000/health", the text of a hook), or "*".
type Policy struct {
	App string `yaml:"app"`
	To  string `yaml:"to"` // absolute
	// User is who owns releases, and runs hooks, actions and commands; "" is who runs apply.
	// Only root can name another.
	User    string   `yaml:"user,omitempty"`
	Shared  []string `yaml:"shared,omitempty"` // "*" if not there: they are below To
	Restart []string `yaml:"restart,omitempty"`
	Drain   []string `yaml:"drain,omitempty"` // and what undoes one
	Health  []string `yaml:"health,omitempty"`
	Hooks   []string `yaml:"hooks,omitempty"`
	Exec    []string `yaml:"exec,omitempty"` // arguments joined by single spaces
}

// ParsePolicy reads the file. Keys that it does not know are errors, with their lines.
func ParsePolicy(text []byte) (*Policy, error) {
	in := yaml.NewDecoder(bytes.NewReader(text))
	in.KnownFields(true)
	p := &Policy{Shared: []string{everything}}
	if err := in.Decode(p); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("policy: %w", err)
	}
	switch {
	case p.App == "":
		return nil, errors.New("policy: no app")
	case p.To == "" || p.To[0] != '/' || path.Clean(p.To) != p.To || p.To == "/":
		return nil, fmt.Errorf("policy: to %q is not a clean absolute path", p.To)
	}
	return p, nil
}

const everything = "*"

func allowed(list []string, what string) bool {
	return slices.Contains(list, everything) || slices.Contains(list, strings.TrimSpace(what))
}
