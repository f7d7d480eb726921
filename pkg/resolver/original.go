package resolver

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// An origin is what is at resolv.conf without us: a file, a symlink with what is read
// through it, or nothing.
type origin struct {
	link string
	text []byte
}

func readOriginal(path string) (o origin, err error) {
	o.link, _ = os.Readlink(path)
	if o.text, err = os.ReadFile(path); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return o, err
}

// original is that of resolv.conf now, and while a session is in it.
func (p paths) original(led bool) (origin, error) {
	o, err := readOriginal(p.conf)
	if err != nil || !led && markOf(o.text) == "" {
		return o, err
	}
	kept, err := readOriginal(p.kept)
	if said, found := quotedIn(o.text); err == nil && kept.missing() && found {
		return said, nil
	}
	return kept, err
}

func (o origin) missing() bool { return o.link == "" && o.text == nil }

// same tells whether it is the same that would come back.
func (o origin) same(as origin) bool {
	if o.link != "" || o.missing() || as.missing() {
		return o.link == as.link && o.missing() == as.missing()
	}
	return as.link == "" && bytes.Equal(o.quote(), as.quote())
}

// conf is what a C library reads there.
func (o origin) conf() conf {
	c := parseConf(o.text)
	if len(c.Search) == 0 {
		c.Search = hostDomain()
	}
	return c
}

// Of the original our file has every line as a comment. So a copy of ours that somebody
// made and puts back says itself what was there then.
const (
	quoted     = "#:"
	quotedLink = "#>" // alone where there was nothing
)

func (o origin) quote() []byte {
	var b bytes.Buffer
	if o.link != "" || o.missing() {
		fmt.Fprintf(&b, "%s %s\n", quotedLink, o.link)
	}
	if o.text != nil {
		for line := range strings.SplitSeq(strings.TrimSuffix(string(o.text), "\n"), "\n") {
			fmt.Fprintf(&b, "%s %s\n", quoted, line)
		}
	}
	return b.Bytes()
}

// quotedIn reads what quote wrote. It is not there where somebody cut it out.
func quotedIn(text []byte) (o origin, found bool) {
	for line := range bytes.Lines(text) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		if rest, is := bytes.CutPrefix(line, []byte(quotedLink)); is {
			o.link, found = string(bytes.TrimSpace(rest)), true
		} else if rest, is := bytes.CutPrefix(line, []byte(quoted)); is {
			o.text, found = append(append(o.text, bytes.TrimPrefix(rest, []byte(" "))...), '\n'), true
		}
	}
	return o, found
}

// over renders what is to be in resolv.conf while the sessions of these links last, of
// which the first has settings s. Below the mark is what the sum in it is of.
func (o origin) over(s Settings, links []string) []byte {
	body := o.conf().with(s).render("# It goes when culvert ends. The original, " + origSuffix + " beside this file, comes back:\n" + string(o.quote()))
	return slices.Concat([]byte(mark(append(slices.Clone(links), sum(body))...)+"\n"), body)
}

func sum(body []byte) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE(body)) }

// ledBy is the link of the session that a text of ours is for, and whether somebody has
// edited it.
func ledBy(text []byte) (link string, edited bool) {
	id := strings.Fields(markOf(text))
	if len(id) < 2 {
		return "", false
	}
	_, body, _ := bytes.Cut(text, []byte("\n"))
	return id[0], id[len(id)-1] != sum(body)
}

// edited is the original as who edited ours meant it: with the servers and domains that
// were added, and other options. Who took our server out meant all of the original's, for
// which it stood.
func (c conf) edited(now conf, s Settings) conf {
	var before, after []netip.Addr
	seen := false
	for _, a := range now.Servers {
		switch {
		case a == s.Server:
			seen = true
		case seen:
			after = append(after, a)
		default:
			before = append(before, a)
		}
	}
	if seen || len(before) == 0 {
		before = slices.Concat(before, c.Servers, after)
	}
	search, known := slices.Clone(c.Search), slices.Concat(c.Search, s.Search, hostDomain())
	for _, name := range now.Search {
		if !slices.Contains(known, name) {
			search = append(search, name)
		}
	}
	return conf{Servers: before, Search: search, Other: now.Other}
}

// hostDomain is what C libraries search when the file names nothing.
func hostDomain() []string {
	host, _ := os.Hostname()
	if _, domain, found := strings.Cut(host, "."); found && CheckName(domain) == nil {
		return []string{domain}
	}
	return nil
}
