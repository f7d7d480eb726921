package deploy

import (
	"fmt"
	"regexp"
	"strings"
)

// An ignore is a list of patterns of gitignore(5): the last one that fits a path decides, and
// what is below a folder that is left out stays out. (The libraries there are for this get
// "?", "[!a]" or "folder/" wrong; the test asks git itself.)
type ignore []ignorePattern

type ignorePattern struct {
	path    *regexp.Regexp // of the whole path below the root
	keep    bool           // by !
	folders bool           // by a / at the end
}

// parseIgnore reads patterns, one an entry. Empty ones and comments are none.
func parseIgnore(patterns []string) (ignore, error) {
	var all ignore
	for _, text := range patterns {
		if text = trimBlanks(strings.TrimSuffix(text, "\r")); text == "" || text[0] == '#' {
			continue
		}
		var p ignorePattern
		body, keep := strings.CutPrefix(text, "!")
		p.keep = keep
		body, p.folders = strings.CutSuffix(body, "/")
		rooted := strings.Contains(body, "/")
		body = strings.TrimPrefix(body, "/")
		if body == "" {
			continue
		}
		if !rooted {
			body = "**/" + body
		}
		path, err := regexp.Compile("^(?s:" + globExpression(body) + ")$")
		if err != nil {
			return nil, fmt.Errorf("%q is no pattern of gitignore", text)
		}
		p.path = path
		all = append(all, p)
	}
	return all, nil
}

// trimBlanks takes blanks from the end, but one after a backslash.
func trimBlanks(text string) string {
	for strings.HasSuffix(text, " ") && !strings.HasSuffix(text, `\ `) {
		text = text[:len(text)-1]
	}
	return text
}

// out tells whether a path, with / between its parts, is left out. Its parents are not.
func (g ignore) out(path string, folder bool) bool {
	for i := len(g) - 1; i >= 0; i-- {
		if p := g[i]; (folder || !p.folders) && p.path.MatchString(path) {
			return !p.keep
		}
	}
	return false
}

// globExpression is a glob as a regular expression: ** is any number of parts.
func globExpression(glob string) string {
	var e strings.Builder
	for i := 0; i < len(glob); i++ {
		rest := glob[i:]
		start := i == 0 || glob[i-1] == '/'
		switch c := glob[i]; {
		case start && strings.HasPrefix(rest, "**/"):
			e.WriteString("(?:.*/)?")
			i += 2
		case start && rest == "**":
			e.WriteString(".+")
			i++
		case c == '*':
			e.WriteString("[^/]*")
		case c == '?':
			e.WriteString("[^/]")
		case c == '[':
			class, length := classExpression(rest)
			e.WriteString(class)
			i += length - 1
		case c == '\\' && len(rest) > 1:
			e.WriteString(regexp.QuoteMeta(rest[1:2]))
			i++
		default:
			e.WriteString(regexp.QuoteMeta(rest[:1]))
		}
	}
	return e.String()
}

// classExpression is [a-z] or [!a-z] at the start of a glob, and its length there. It
// never fits a /.
func classExpression(glob string) (expression string, length int) {
	i := 1
	not := ""
	if i < len(glob) && (glob[i] == '!' || glob[i] == '^') {
		not, i = "^/", i+1
	}
	begin := i
	var members strings.Builder
	for ; i < len(glob) && (glob[i] != ']' || i == begin); i++ {
		if colon := strings.Index(glob[i:], ":]"); strings.HasPrefix(glob[i:], "[:") && colon > 0 {
			members.WriteString(glob[i : i+colon+2])
			i += colon + 1
			continue
		}
		c := glob[i]
		if c == '\\' && i+1 < len(glob) {
			i++
			c = glob[i]
			members.WriteString(`\` + string(c))
			continue
		}
		if strings.IndexByte(`\[]^&~`, c) >= 0 {
			members.WriteByte('\\')
		}
		members.WriteByte(c)
	}
	if i >= len(glob) { // never closed: it fits nothing, as with git
		return `[^\x00-\x{10FFFF}]`, len(glob)
	}
	return "[" + not + members.String() + "]", i + 1
}
