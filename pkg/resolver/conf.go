package resolver

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// What C libraries hold: glibc before 2.26 reads 6 search domains of 256
// characters together, musl passes over a line that is longer than 255.
const (
	confServers    = 3
	confSearch     = 6
	confSearchSize = 255 - len("search ") - 1
)

// conf is a resolv.conf as a resolver reads it; see resolv.conf(5).
type conf struct {
	Servers []netip.Addr
	Search  []string // of the last search or domain line
	Other   []string // options, sortlist: kept as they are
}

// parseConf reads as C libraries do: what is not understood is passed over, a
// keyword begins its line, the last of search and domain counts.
func parseConf(text []byte) conf {
	c := parseWhole(text)
	c.Servers = c.Servers[:min(len(c.Servers), confServers)]
	return c
}

// parseWhole keeps all servers. systemd-resolved lists what it asks itself in
// such a file, without a bound.
func parseWhole(text []byte) conf {
	var c conf
	for line := range bytes.Lines(text) {
		word := strings.Fields(string(line))
		if len(word) < 2 || line[0] == ' ' || line[0] == '\t' || bytes.IndexByte(line, 0) >= 0 {
			continue
		}
		switch word[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(word[1]); err == nil {
				c.Servers = append(c.Servers, a)
			}
		case "search":
			c.Search = word[1:]
		case "domain":
			c.Search = word[1:2]
		case "options", "sortlist":
			c.Other = append(c.Other, strings.Join(word, " "))
		}
	}
	return c
}

// with returns c as it is to be while s is set. Only our own server is named:
// with a second one a C library would take its NXDOMAIN when ours says that it
// cannot know (SERVFAIL), and musl asks all at once and takes the first answer.
func (c conf) with(s Settings) conf {
	return conf{Servers: []netip.Addr{s.Server}, Search: joinSearch(s.Search, c.Search), Other: c.Other}
}

// joinSearch puts ours before theirs, each domain once, within what every C
// library holds. Where the original alone was beyond that, this system's
// library evidently holds more, and nothing is cut.
func joinSearch(ours, theirs []string) []string {
	var out []string
	for _, name := range append(slices.Clone(ours), theirs...) {
		same := func(o string) bool {
			return strings.EqualFold(strings.TrimSuffix(o, "."), strings.TrimSuffix(name, "."))
		}
		if !slices.ContainsFunc(out, same) {
			out = append(out, name)
		}
	}
	if !fits(theirs) {
		return out
	}
	for len(out) > 1 && !fits(out) {
		out = out[:len(out)-1]
	}
	return out
}

func fits(search []string) bool {
	return len(search) <= confSearch && len(strings.Join(search, " ")) <= confSearchSize
}

// render writes c below comments.
func (c conf) render(head string) []byte { return append([]byte(head), c.text()...) }

func (c conf) text() []byte {
	var b bytes.Buffer
	for _, a := range c.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	if len(c.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.Search, " "))
	}
	for _, line := range c.Other {
		fmt.Fprintf(&b, "%s\n", line)
	}
	return b.Bytes()
}

// markPrefix begins every file that is ours.
const markPrefix = "# written by culvert for "

func mark(id ...string) string { return markPrefix + strings.Join(id, " ") }

// markOf returns whose text is, or "" if it is not ours. It is the first line
// that counts, whole.
func markOf(text []byte) string {
	line, _, found := bytes.Cut(text, []byte("\n"))
	id, ours := bytes.CutPrefix(line, []byte(markPrefix))
	if !found || !ours {
		return ""
	}
	return string(id)
}
