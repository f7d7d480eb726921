package session

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// A Mapping is a port on this machine and what it leads to in the cluster.
type Mapping struct {
	Target  kube.Target // what answers, or nothing
	Host    string      // then the host, as seen from the cluster
	Port    string      // there, its name or number
	Local   string      // its number here: "" is the same one, "0" any that is free
	Network string      // "tcp" or "udp"
}

// String is what it leads to, as it was typed.
func (m Mapping) String() string {
	to := net.JoinHostPort(m.Host, m.Port)
	if m.Host == "" {
		to = targetWord(m.Target) + ":" + m.Port
	}
	if m.Network == "udp" {
		to += "/udp"
	}
	return to
}

var kindWords = map[string]string{"service": "svc", "deployment": "deploy", "statefulset": "sts", "pod": "pod"}

func targetWord(t kube.Target) string { return kindWords[t.Kind] + "/" + t.Name }

// ParseMappings reads the arguments of "culvert forward": a target and its ports in the
// form of kubectl, TARGET [LOCAL:]PORT..., as often as wanted; and hosts with theirs in
// that of ssh -L, [LOCAL:]HOST:PORT. Either may end in /udp.
func ParseMappings(args []string) ([]Mapping, error) {
	var all []Mapping
	var target kube.Target
	idle := "" // a target without ports, so far
	for _, arg := range args {
		rest, network := cutNetwork(arg)
		if m, is := hostMapping(rest); is {
			m.Network = network
			all = append(all, m)
			continue
		}
		if target.Kind != "" && !isTarget(arg) {
			local, port, err := splitPorts(rest)
			if err != nil {
				return nil, fmt.Errorf("%q is not %s", arg, portForm)
			}
			all, idle = append(all, Mapping{Target: target, Port: port, Local: local, Network: network}), ""
			continue
		}
		if idle != "" {
			break
		}
		var err error
		if target, err = kube.ParseTarget(arg); err != nil {
			return nil, err
		}
		idle = arg
	}
	if idle != "" {
		return nil, fmt.Errorf("%s is named without a port of it, as 8080:80", idle)
	}
	if len(all) == 0 {
		return nil, errors.New("forward takes a target and its ports, as svc/web 8080:80")
	}
	return all, nil
}

const portForm = "[LOCAL:]PORT[/udp]"

// isTarget tells a further target, svc/web, from a port, 53/udp.
func isTarget(arg string) bool {
	kind, _, found := strings.Cut(arg, "/")
	_, err := kube.ParseTarget(kind + "/x")
	return found && err == nil
}

func cutNetwork(arg string) (rest, network string) {
	if !isTarget(arg) {
		for _, n := range []string{"tcp", "udp"} {
			if rest, found := strings.CutSuffix(arg, "/"+n); found {
				return rest, n
			}
		}
	}
	return arg, "tcp"
}

// splitPorts reads [LOCAL:]PORT, where :PORT is any local one that is free.
func splitPorts(text string) (local, port string, err error) {
	local, port, both := strings.Cut(text, ":")
	switch {
	case !both:
		local, port = "", text
	case local == "":
		local = "0"
	}
	if _, err := portNumber(local); local != "" && err != nil {
		return "", "", err
	}
	if number, err := strconv.Atoi(port); err == nil {
		if number < 1 || number > 65535 {
			return "", "", strconv.ErrRange
		}
		return local, port, nil
	}
	if !portName(port) {
		return "", "", strconv.ErrSyntax
	}
	return local, port, nil
}

func portNumber(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	return int(n), err
}

// portName tells whether a port may be called so.
func portName(text string) bool {
	const allowed = "abcdefghijklmnopqrstuvwxyz0123456789-"
	return text != "" && len(text) <= 63 && strings.Trim(text, allowed) == ""
}

// hostMapping reads [LOCAL:]HOST:PORT. A host is no number, or it would be a port.
func hostMapping(text string) (m Mapping, is bool) {
	local, rest, found := strings.Cut(text, ":")
	if _, err := portNumber(local); !found || local != "" && err != nil {
		local, rest = "", text
	} else if local == "" {
		local = "0"
	}
	host, port, err := net.SplitHostPort(rest)
	if err != nil || !isHost(host) {
		return m, false
	}
	if n, err := portNumber(port); err != nil || n == 0 {
		return m, false
	}
	return Mapping{Host: host, Port: port, Local: local}, true
}

// isHost is of an address or a name, which has a letter.
func isHost(text string) bool {
	if _, err := netip.ParseAddr(text); err == nil {
		return true
	}
	letter := func(r rune) bool { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' }
	return strings.ContainsFunc(text, letter) && !strings.ContainsAny(text, "/%[]@ \t\n")
}

// port finds the one that was named among those of b.
func (m Mapping) port(b *kube.Backend) (kube.ServicePort, error) {
	named := Forward{Port: m.Port, Network: m.Network}
	if i := slices.IndexFunc(b.Ports, named.names); i >= 0 {
		return b.Ports[i], nil
	}
	if n, err := portNumber(m.Port); err == nil && b.Open {
		return kube.PodPort(m.Network, n), nil
	}
	if len(b.Ports) == 0 {
		return kube.ServicePort{}, fmt.Errorf("%s has no port %s: it names none", targetWord(m.Target), m.Port)
	}
	return kube.ServicePort{}, fmt.Errorf("%s has no port %s: it has %s", targetWord(m.Target), portAndNetwork(m), portList(b.Ports))
}

func portAndNetwork(m Mapping) string {
	if m.Network == "udp" {
		return m.Port + "/udp"
	}
	return m.Port
}
