package resolver

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
)

const (
	origSuffix = ".culvert-orig"
	tmpSuffix  = ".culvert-new"

	// uplinks is where systemd-resolved lists the servers it asks itself.
	uplinks = "/run/systemd/resolve/resolv.conf"
)

// Upstreams returns the machine's own nameservers, whether Set was called or
// not and by whichever process: ours is never among them. It needs no rights.
func (r *Resolver) Upstreams(ours netip.Addr) ([]netip.AddrPort, error) {
	conf, err := r.original()
	if err != nil {
		return nil, err
	}
	if len(conf.Servers) == 0 { // resolv.conf(5)
		conf.Servers = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	}
	var out []netip.AddrPort
	for _, a := range r.pastStub(conf.Servers) {
		ap := netip.AddrPortFrom(a, 53)
		if a != ours && !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no nameserver but our own in %s", r.cfg.path("/etc/resolv.conf"))
	}
	return out, nil
}

// original reads resolv.conf, or what is kept of it while ours is in place.
func (r *Resolver) original() (conf, error) {
	path := r.cfg.path("/etc/resolv.conf")
	text, err := os.ReadFile(path)
	if err == nil && markOf(text) != "" {
		text, err = os.ReadFile(path + origSuffix)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return conf{}, err
	}
	return parseConf(text), nil
}

// pastStub puts systemd-resolved's own upstreams in place of its stub. With a
// bare resolv.conf of ours in place it would ask us, and we it.
func (r *Resolver) pastStub(servers []netip.Addr) []netip.Addr {
	isStub := func(a netip.Addr) bool { return slices.Contains(stubs, a) }
	if !slices.ContainsFunc(servers, isStub) {
		return servers
	}
	text, err := os.ReadFile(r.cfg.path(uplinks))
	past := parseWhole(text).Servers
	if err != nil || len(past) == 0 {
		return servers
	}
	return append(past, slices.DeleteFunc(slices.Clone(servers), isStub)...)
}
