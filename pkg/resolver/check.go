package resolver

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Bounds on what is accepted: far more than a cluster has reason to ask, far
// less than what could choke the system. systemd-resolved itself takes 1024
// domains on a link.
const (
	maxSearch = 16
	maxZones  = 1000
)

func (s Settings) check() error {
	switch {
	case !validLink(s.Link):
		return fmt.Errorf("link name %q", s.Link)
	case s.LinkIndex <= 0:
		return fmt.Errorf("link index %d", s.LinkIndex)
	case !validServer(s.Server):
		return fmt.Errorf("server address %v", s.Server)
	case len(s.Search) > maxSearch:
		return fmt.Errorf("%d search domains, at most %d", len(s.Search), maxSearch)
	case len(s.Zones) > maxZones:
		return fmt.Errorf("%d zones, at most %d", len(s.Zones), maxZones)
	}
	for _, list := range [][]string{s.Search, s.Zones} {
		for _, name := range list {
			if err := CheckName(name); err != nil {
				return fmt.Errorf("domain %q: %w", name, err)
			}
		}
	}
	return nil
}

func validLink(name string) bool {
	return name != "" && len(name) <= 15 && name != "." && name != ".." &&
		!strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune("/:%#;", r) })
}

func validServer(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsMulticast()
}

// CheckName takes names of hosts as the Kubernetes DNS specification and
// SRV records have them, with or without the last dot. The root is refused: it
// would take all of the machine's names.
func CheckName(name string) error {
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return errors.New("empty, or the root")
	}
	if len(name) > 253 {
		return errors.New("longer than 253")
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return errors.New("a label is empty or longer than 63")
		}
		if strings.ContainsFunc(label, notInLabel) || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") {
			return fmt.Errorf("bad label %q", label)
		}
	}
	return nil
}

func notInLabel(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
}
