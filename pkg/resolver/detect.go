package resolver

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// A Mode is a way to tell the system.
type Mode string

const (
	ModeNone       Mode = ""                 // no way on this system; Plan.Why says why
	ModeResolved   Mode = "systemd-resolved" // settings of the link, over D-Bus
	ModeFile       Mode = "resolv.conf"      // the bare file
	ModeResolvconf Mode = "resolvconf"       // openresolv, which writes that file
	ModeEtcDir     Mode = "/etc/resolver"    // macOS: a file for each zone
	ModeNRPT       Mode = "NRPT"             // Windows: name resolution policy table
)

// World is what there is to know of a system before anything is changed.
type World struct {
	OS string // as runtime.GOOS

	Target   string // where /etc/resolv.conf points, if it is a symlink
	Content  string // what is read there
	Missing  bool   // there is no such file, or its target is gone
	ReadOnly bool   // nobody can write the file or its directory

	Living     Mode // how other sessions were told of; what is above was before them
	Resolved   bool // systemd-resolved owns its name on the system bus
	Answers    bool // and its stub answers in this network namespace
	Openresolv bool // openresolv writes the file, of what it is told only
}

// Plan is what Detect decides.
type Plan struct {
	Mode Mode
	Why  string // in a few words, for people

	// Manager is who writes /etc/resolv.conf here, if that can be seen.
	Manager string
}

// stubs are where systemd-resolved listens for programs that read resolv.conf.
var stubs = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 53}), netip.AddrFrom4([4]byte{127, 0, 0, 54})}

// Detect decides how to tell the system. systemd-resolved counts only if it is
// what programs really ask: resolv.conf leads to its stub and nowhere else, and
// the stub answers here (a container may share the bus or the file of its host).
func Detect(w World) Plan {
	switch w.OS {
	case "linux":
		return detectLinux(w)
	case "darwin":
		return Plan{Mode: ModeEtcDir, Why: "macOS"}
	case "windows":
		return Plan{Mode: ModeNRPT, Why: "Windows"}
	}
	return Plan{Why: "no way known on " + w.OS}
}

func detectLinux(w World) Plan {
	stub := leadsToStub(w.Content)
	if w.Living != "" { // they could not ask each other otherwise
		return Plan{Mode: w.Living, Why: "as the session before", Manager: manager(w)}
	}
	if stub && w.Resolved && w.Answers {
		return Plan{Mode: ModeResolved, Why: "systemd-resolved answers", Manager: "systemd-resolved"}
	}
	if w.Openresolv {
		return Plan{Mode: ModeResolvconf, Why: "openresolv writes resolv.conf", Manager: "resolvconf"}
	}
	p := Plan{Mode: ModeFile, Why: whyFile(stub, w), Manager: manager(w)}
	if w.ReadOnly {
		return Plan{Why: "/etc/resolv.conf is read-only (by its mount, or chattr +i) and " + p.Why, Manager: p.Manager}
	}
	return p
}

func leadsToStub(content string) bool {
	servers := parseConf([]byte(content)).Servers
	for _, a := range servers {
		if !slices.Contains(stubs, a) {
			return false
		}
	}
	return len(servers) > 0
}

func whyFile(stub bool, w World) string {
	switch {
	case w.Missing:
		return "there is no resolv.conf"
	case stub && !w.Resolved:
		return "systemd-resolved is named in it but not on the bus"
	case stub:
		return "systemd-resolved is named in it but does not answer here"
	case w.Resolved:
		return "systemd-resolved runs but is not what resolv.conf names"
	}
	return "no resolver with per-link settings"
}

// manager guesses from the target and from the marks that the usual writers
// leave in the file.
func manager(w World) string {
	for _, m := range []struct{ name, target, mark string }{
		{"systemd-resolved", "systemd/resolve/", "man:systemd-resolved"},
		{"NetworkManager", "NetworkManager/", "NetworkManager"},
		{"resolvconf", "resolvconf/", "resolvconf"},
		{"netconfig", "netconfig/", "netconfig"},
		{"connman", "connman/", "Connection Manager"},
		{"WSL", "wsl/", "WSL"},
		{"Docker", "", "Docker Engine"},
	} {
		if m.target != "" && strings.Contains(w.Target, m.target) || commentHas(w.Content, m.mark) {
			return m.name
		}
	}
	return ""
}

func commentHas(content, mark string) bool {
	for line := range strings.Lines(content) {
		if strings.HasPrefix(line, "#") && strings.Contains(line, mark) {
			return true
		}
	}
	return false
}

// etcResolver renders the files of ModeEtcDir by name: one for each zone, and
// one that only carries the search list.
func etcResolver(s Settings) map[string]string {
	files := map[string]string{}
	for _, zone := range routes(s) {
		files[zone] = fmt.Sprintf("%s\nnameserver %s\n", mark(s.Link), s.Server)
	}
	if len(s.Search) > 0 {
		files["search.culvert"] = fmt.Sprintf("%s\nsearch %s\n", mark(s.Link), strings.Join(s.Search, " "))
	}
	return files
}

// nrpt renders the namespaces of the one rule of ModeNRPT: a leading dot means
// the zone and all below it.
func nrpt(s Settings) []string {
	var names []string
	for _, zone := range routes(s) {
		names = append(names, "."+zone, zone)
	}
	return names
}

// routes is every domain that goes to our server, in lower case, each once,
// without the last dot.
func routes(s Settings) []string {
	var out []string
	for _, name := range append(slices.Clone(s.Search), s.Zones...) {
		name = strings.ToLower(strings.TrimSuffix(name, "."))
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}
