package resolver

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"strings"
)

// Asked is whom programs ask that use the C library, in this order.
type Asked struct {
	Cache   bool         // nscd, which remembers
	Sources []string     // hosts of nsswitch.conf: "files", "dns", "resolve"
	Servers []netip.Addr // that resolv.conf names; for the source "dns"
	Mounted bool         // resolv.conf is a mount of its own
}

// nscdSocket is where the C library looks for it.
const nscdSocket = "/var/run/nscd/socket"

// Asked sees whom programs ask now, ours or not. It needs no rights.
func (r *Resolver) Asked() (a Asked, err error) {
	path := r.cfg.path("/etc/resolv.conf")
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	a.Servers, a.Mounted = parseConf(text).Servers, mounted(path)
	_, err = os.Stat(r.cfg.path(nscdSocket))
	a.Cache = err == nil
	text, err = os.ReadFile(r.cfg.path("/etc/nsswitch.conf"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	a.Sources = sources(string(text))
	return a, nil
}

// sources are the services of the hosts line, or those that glibc has without one.
func sources(nsswitch string) []string {
	for line := range strings.Lines(nsswitch) {
		line, _, _ = strings.Cut(line, "#")
		if rest, found := strings.CutPrefix(strings.TrimSpace(line), "hosts:"); found {
			return strings.Fields(actions(rest))
		}
	}
	return []string{"dns", "files"}
}

// actions cuts what is in brackets, which may hold blanks: [!UNAVAIL=return].
func actions(line string) string {
	for {
		before, rest, found := strings.Cut(line, "[")
		if !found {
			return line
		}
		_, after, _ := strings.Cut(rest, "]")
		line = before + " " + after
	}
}
