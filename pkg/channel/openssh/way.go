package openssh

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"unicode"
)

// A Way is how ssh gets to a destination, as it says itself (ssh -G).
type Way struct {
	// Host is what this machine connects to: the server, or the first jump host.
	Host string

	// Command tells that a ProxyCommand makes the connection, to wherever.
	Command bool

	ssh    string
	config map[string]string // of the destination
}

// mostJumps ends a chain that leads to itself.
const mostJumps = 8

// Look asks ssh for the way to a destination. Nothing is connected to.
func Look(ctx context.Context, destination string) (Way, error) {
	if err := check(destination); err != nil {
		return Way{}, err
	}
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		return Way{}, fmt.Errorf("ssh to %s: %w", destination, err)
	}
	w := Way{ssh: ssh}
	at := destination
	for range mostJumps {
		config, err := configOf(ctx, ssh, at)
		if err != nil {
			return Way{}, fmt.Errorf("ssh to %s: %w", destination, err)
		}
		if w.config == nil {
			w.config = config
		}
		if !set(config["proxyjump"]) {
			w.Host, w.Command = config["hostname"], set(config["proxycommand"])
			return w, nil
		}
		first, _, _ := strings.Cut(config["proxyjump"], ",")
		at = "ssh://" + first
	}
	return Way{}, fmt.Errorf("ssh to %s: more than %d jump hosts", destination, mostJumps)
}

func set(option string) bool { return option != "" && option != "none" }

// check refuses what ssh would take for an option, and what is no destination at all.
func check(destination string) error {
	odd := func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }
	if destination == "" || strings.HasPrefix(destination, "-") || strings.ContainsFunc(destination, odd) {
		return fmt.Errorf("%q is no destination of ssh, as user@host or ssh://user@host:port", destination)
	}
	return nil
}

// configOf is what counts for a destination: keys in lower case, the first value of each.
func configOf(ctx context.Context, ssh, destination string) (map[string]string, error) {
	cmd := exec.CommandContext(ctx, ssh, "-N", "-G", "--", destination) // -N: for what needs no command
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		if line := strings.TrimSpace(said.String()); line != "" {
			err = errors.New(words(line))
		}
		return nil, fmt.Errorf("read its configuration: %w", err)
	}
	config := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), " ")
		if _, known := config[key]; !known {
			config[key] = value
		}
	}
	return config, nil
}

// defaults are for what is not configured. What a version does not list it does not
// know, either.
func (w Way) defaults() []string {
	var options []string
	if v := w.config["serveraliveinterval"]; v == "0" {
		options = append(options, "ServerAliveInterval=10", "ServerAliveCountMax=3")
	}
	if v := w.config["connecttimeout"]; v == "none" || v == "0" {
		options = append(options, "ConnectTimeout=15")
	}
	if _, known := w.config["forkafterauthentication"]; known {
		options = append(options, "ForkAfterAuthentication=no")
	}
	return options
}

// Addrs are those of the host. Behind a ProxyCommand its name need not resolve here.
func (w Way) Addrs(ctx context.Context) ([]netip.Addr, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", w.Host)
	if err != nil && !w.Command {
		return nil, fmt.Errorf("resolve the SSH host: %w", err)
	}
	for i, a := range addrs {
		addrs[i] = a.Unmap().WithZone("")
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}
