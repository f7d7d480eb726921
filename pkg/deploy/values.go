package deploy

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
)

// at is an error with its place in the file.
func at(node ast.Node, format string, values ...any) error {
	return &yaml.SyntaxError{Message: fmt.Sprintf(format, values...), Token: node.GetToken()}
}

// decode is a node as a value.
func decode(node ast.Node, into any, want string) error {
	if err := yaml.NodeToValue(node, into, yaml.Strict()); err != nil {
		return at(node, "this is not %s", want)
	}
	return nil
}

// plain is a node past an anchor.
func plain(node ast.Node) ast.Node {
	if a, ok := node.(*ast.AnchorNode); ok {
		return a.Value
	}
	return node
}

// scalar is the text of a node that is neither list nor mapping.
func scalar(node ast.Node) (string, bool) {
	switch n := plain(node).(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func (s *Script) UnmarshalYAML(node ast.Node) error {
	if text, ok := scalar(node); ok {
		*s = Script(text)
		return nil
	}
	var lines []string
	if err := decode(node, &lines, "a script, or a list of its lines"); err != nil {
		return err
	}
	*s = Script(strings.Join(lines, "\n"))
	return nil
}

func (d *Duration) UnmarshalYAML(node ast.Node) error {
	text, _ := scalar(node)
	v, err := time.ParseDuration(text)
	if err != nil || v < 0 {
		return at(node, "a time is as 90s or 2m, not %q", node.String())
	}
	*d = Duration(v)
	return nil
}

func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText writes it as it is read.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

func (b *Batch) UnmarshalYAML(node ast.Node) error {
	list, ok := plain(node).(*ast.SequenceNode)
	if !ok {
		return at(node, "batch is a list, as [1, 50%%, 100%%]")
	}
	*b = Batch{}
	for _, n := range list.Values {
		text, _ := scalar(n)
		step, err := parseStep(text)
		if err != nil {
			return at(n, "%v", err)
		}
		*b = append(*b, step)
	}
	return nil
}

// MarshalText of a step is as it is read.
func (s Step) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (h *Hosts) UnmarshalYAML(node ast.Node) error {
	*h = Hosts{}
	roles, ok := plain(node).(ast.MapNode)
	if !ok {
		return h.add("", node)
	}
	for pairs := roles.MapRange(); pairs.Next(); {
		if err := h.add(pairs.Key().GetToken().Value, pairs.Value()); err != nil {
			return err
		}
	}
	return nil
}

// add has the hosts of a role: one, or a list.
func (h *Hosts) add(role string, node ast.Node) error {
	nodes := []ast.Node{plain(node)}
	if list, ok := nodes[0].(*ast.SequenceNode); ok {
		nodes = list.Values
	}
	for _, n := range nodes {
		text, ok := scalar(n)
		if !ok {
			return at(n, "hosts are names, lists of names, or lists of names by role")
		}
		names, err := expand(text)
		if err != nil {
			return at(n, "%v", err)
		}
		for _, name := range names {
			*h = append(*h, Host{Name: name, Role: role})
		}
	}
	return nil
}

// byWord fills a mapping's field named by the first word of a text.
func byWord(node ast.Node, fields map[string]*string, want string) (short bool, err error) {
	text, ok := scalar(node)
	if !ok {
		return false, nil
	}
	word, rest, _ := strings.Cut(text, " ")
	into := fields[word]
	if into == nil || strings.TrimSpace(rest) == "" {
		return true, at(node, "%s, not %q", want, text)
	}
	*into = strings.TrimSpace(rest)
	return true, nil
}

func (d *Drain) UnmarshalYAML(node ast.Node) error {
	short, err := byWord(node, map[string]*string{"consul": &d.Consul}, "drain is consul SERVICE, or a mapping with cmd or http, and undo")
	if short {
		return err
	}
	type fields Drain
	return strictly(node, (*fields)(d))
}

func (h *Health) UnmarshalYAML(node ast.Node) error {
	short, err := byWord(node, map[string]*string{"get": &h.Get, "tcp": &h.TCP, "cmd": &h.Cmd}, "health is get URL, tcp HOST:PORT, cmd COMMAND, or a mapping")
	if short {
		return err
	}
	type fields Health
	return strictly(node, (*fields)(h))
}

func (k *K8s) UnmarshalYAML(node ast.Node) error {
	if text, ok := scalar(node); ok {
		k.Workload = text
	} else {
		type fields K8s
		if err := strictly(node, (*fields)(k)); err != nil {
			return err
		}
	}
	kind, name, _ := strings.Cut(k.Workload, "/")
	if (kind != "deployment" && kind != "statefulset" && kind != "daemonset") || name == "" {
		return at(node, "k8s is deployment/NAME, statefulset/NAME or daemonset/NAME, not %q", k.Workload)
	}
	if k.Image != "" && k.Env != "" {
		return at(node, "k8s has an image or an env to set, not both")
	}
	return nil
}

// strictly decodes a mapping, and keeps the place of what is wrong in it.
func strictly(node ast.Node, into any) error { return yaml.NodeToValue(node, into, yaml.Strict()) }

// digestible is a value as bytes that are the same for the same value.
func digestible(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("%T: %v", v, err)) // only values of this package come here
	}
	return b
}
