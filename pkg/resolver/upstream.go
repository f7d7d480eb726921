package resolver

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
)

const (
	origSuffix = ".culvert-orig"
	tmpSuffix  = ".culvert-new"

	// entrySuffix, and a link's name, is the file of one session.
	entrySuffix = ".culvert-for-"

	// uplinks is where systemd-resolved lists the servers it asks itself.
	uplinks = "/run/systemd/resolve/resolv.conf"
)

// Upstreams returns whom a session's server asks for what is not its own: the
// server of the session that came before it, else the machine's Nameservers.
func (r *Resolver) Upstreams(ours netip.Addr) ([]netip.AddrPort, error) {
	living, err := r.living()
	if err != nil {
		return nil, err
	}
	// One that is not among them yet will be the last to have come.
	if i := slices.IndexFunc(living, func(e entry) bool { return e.Server == ours }); i+1 < len(living) {
		return []netip.AddrPort{netip.AddrPortFrom(living[i+1].Server, 53)}, nil
	}
	return r.Nameservers(ours)
}

// Nameservers returns the machine's own, whether Set was called or not and by
// whichever process: ours, and other sessions', are never among them. It needs
// no rights.
func (r *Resolver) Nameservers(ours netip.Addr) ([]netip.AddrPort, error) {
	living, err := r.living()
	if err != nil {
		return nil, err
	}
	o, err := pathsIn(r.cfg).original(len(living) > 0)
	if err != nil {
		return nil, err
	}
	conf := o.conf()
	if len(conf.Servers) == 0 { // resolv.conf(5)
		conf.Servers = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	}
	isOurs := func(a netip.Addr) bool {
		return a == ours || slices.ContainsFunc(living, func(e entry) bool { return e.Server == a })
	}
	var out []netip.AddrPort
	for _, a := range r.pastStub(conf.Servers) {
		ap := netip.AddrPortFrom(a, 53)
		if !isOurs(a) && !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no nameserver but our own in %s", r.cfg.path("/etc/resolv.conf"))
	}
	return out, nil
}

// Conf is the machine's resolv.conf as it would be with these settings, for who puts it
// elsewhere than Set. It needs no rights.
func (r *Resolver) Conf(s Settings) ([]byte, error) {
	living, err := r.living()
	if err != nil {
		return nil, err
	}
	o, err := pathsIn(r.cfg).original(len(living) > 0)
	if err != nil {
		return nil, err
	}
	return o.conf().with(s).text(), nil
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
