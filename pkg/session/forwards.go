package session

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// A Forward says where the traffic of one port of a Service goes.
type Forward struct {
	Port     string // of the Service, its name or number; "": the only one
	Network  string // "udp"; "": as the Service says, tcp for a new one
	Address  string // host:port, as seen from this machine
	Protocol string // "http", "tcp"; "": seen from what is sent
}

const forwardForm = "[SERVICE_PORT=][HOST:]PORT[:http|:tcp|/udp]"

// ParseForward reads [SERVICE_PORT=][HOST:]PORT[:http|:tcp|/udp], the argument
// of --to.
func ParseForward(text string) (f Forward, err error) {
	rest := text
	if port, after, found := strings.Cut(text, "="); found {
		if f.Port, rest = port, after; port == "" {
			return f, fmt.Errorf("%q names no port before =", text)
		}
	}
	if before, found := strings.CutSuffix(rest, "/udp"); found {
		f.Network, rest = "udp", before
	}
	for _, p := range []string{"http", "tcp"} {
		if before, found := strings.CutSuffix(rest, ":"+p); found && f.Network == "" && f.Protocol == "" {
			f.Protocol, rest = p, before
		}
	}
	host, port := "127.0.0.1", rest
	if strings.Contains(rest, ":") {
		if host, port, err = net.SplitHostPort(rest); err != nil {
			return f, fmt.Errorf("%q is not %s", text, forwardForm)
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return f, fmt.Errorf("%q is not %s", text, forwardForm)
	}
	f.Address = net.JoinHostPort(host, port)
	return f, nil
}

// forwarded is a Forward together with the port of the Service that it is for.
type forwarded struct {
	Forward
	port kube.ServicePort
}

// route is how a router names the port.
func (f forwarded) route() string { return routeName(f.port) }

func routeName(p kube.ServicePort) string { return p.Network + "/" + strconv.Itoa(p.Port) }

// assign finds the port of the Service for each Forward. A port that is named
// by its number alone stands for both networks that it is spoken on.
func assign(subject string, ports []kube.ServicePort, to []Forward) ([]forwarded, error) {
	var all []forwarded
	for _, f := range to {
		found := slices.DeleteFunc(slices.Clone(ports), func(p kube.ServicePort) bool { return !f.names(p) })
		if len(found) == 0 {
			return nil, fmt.Errorf("%s has no port %s: it has %s", subject, f.Port, portList(ports))
		}
		if f.Port == "" && len(found) > 1 {
			return nil, fmt.Errorf("%s has several ports, say which one goes to %s: it has %s", subject, f.Address, portList(ports))
		}
		for _, p := range found {
			if slices.ContainsFunc(all, func(o forwarded) bool { return o.route() == routeName(p) }) {
				return nil, fmt.Errorf("port %s of %s is given twice", portWord(p), subject)
			}
			all = append(all, forwarded{f, p})
		}
	}
	return all, nil
}

func (f Forward) names(p kube.ServicePort) bool {
	if f.Network != "" && f.Network != p.Network {
		return false
	}
	return f.Port == "" || f.Port == p.Name || f.Port == strconv.Itoa(p.Port) ||
		slices.ContainsFunc(p.Also, func(also int) bool { return f.Port == strconv.Itoa(also) })
}

// unprivileged is added to port numbers that only root may listen on.
const unprivileged = 20000

// exposed is a Service that does not exist yet, with a port for each Forward.
func exposed(name string, to []Forward) (*kube.Service, []forwarded, error) {
	s := &kube.Service{Name: name}
	var all []forwarded
	for _, f := range to {
		port := f.Port
		if port == "" {
			_, port, _ = net.SplitHostPort(f.Address)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return nil, nil, fmt.Errorf("a new Service has ports by number, not %q", port)
		}
		p := kube.ServicePort{Network: "tcp", Port: int(n), Target: int(n)}
		if f.Network != "" {
			p.Network = f.Network
		}
		if f.Protocol == "http" {
			p.AppProtocol = "http"
		}
		if p.Target < 1024 {
			p.Target += unprivileged
		}
		p.Name = fmt.Sprintf("%s-%d", p.Network, p.Port)
		if slices.ContainsFunc(s.Ports, func(o kube.ServicePort) bool { return routeName(o) == routeName(p) }) {
			return nil, nil, fmt.Errorf("port %s is given twice", portWord(p))
		}
		s.Ports = append(s.Ports, p)
		all = append(all, forwarded{f, p})
	}
	return s, all, nil
}

func portWord(p kube.ServicePort) string {
	word := strconv.Itoa(p.Port)
	if p.Name != "" {
		word = p.Name + "=" + word
	}
	if p.Network == "udp" {
		word += "/udp"
	}
	return word
}

func portList(ports []kube.ServicePort) string {
	var words []string
	for _, p := range ports {
		words = append(words, portWord(p))
	}
	return strings.Join(words, ", ")
}
