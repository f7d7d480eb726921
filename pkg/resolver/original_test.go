package resolver

import (
	"strings"
	"testing"
)

const original = "# by hand\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example\noptions ndots:2\n"

func TestQuote(t *testing.T) {
	for name, o := range map[string]origin{
		"nothing":          {},
		"empty":            {text: []byte{}},
		"a file":           {text: []byte("# by hand\n\nnameserver 10.0.0.2\n \tsearch a \n")},
		"no last newline":  {text: []byte("nameserver 10.0.0.2")},
		"quoted itself":    {text: []byte("#: x\n#> y\n")},
		"a symlink":        {link: "../run/x y", text: []byte("nameserver 10.0.0.2\n")},
		"a dangling one":   {link: "/run/x"},
		"carriage returns": {text: []byte("nameserver 10.0.0.2\r\n")},
	} {
		text := o.over(shop, []string{"culvert0"})
		got, found := quotedIn(text)
		if !found || !got.same(o) || !o.same(got) {
			t.Errorf("%s: %+v from\n%s", name, got, text)
		}
		if c := parseConf(text); len(c.Servers) != 1 || c.Servers[0] != shop.Server {
			t.Errorf("%s: a resolver reads %+v", name, c)
		}
		if link, edited := ledBy(text); link != "culvert0" || edited {
			t.Errorf("%s: led by %q, edited %v", name, link, edited)
		}
		if _, edited := ledBy(append(text, "# more\n"...)); !edited {
			t.Errorf("%s: an edit is not seen", name)
		}
	}
	if _, found := quotedIn([]byte("# written by culvert for culvert0\nnameserver 198.18.0.1\n")); found {
		t.Error("found a quote where there is none")
	}
	a, b := origin{link: "x", text: []byte("1")}, origin{link: "x", text: []byte("2")}
	if !a.same(b) || a.same(origin{text: []byte("1")}) || (origin{}).same(a) || (origin{text: []byte{}}).same(origin{}) {
		t.Error("same")
	}
}

func TestEdited(t *testing.T) {
	orig := parseConf([]byte(original))
	ours := string(orig.with(shop).text())
	for name, c := range map[string]struct{ now, want string }{
		"untouched":           {ours, original},
		"a server behind":     {ours + "nameserver 10.9.9.9\n", "nameserver 10.0.0.2\nnameserver 10.0.0.3\nnameserver 10.9.9.9\nsearch corp.example\noptions ndots:2\n"},
		"a server before":     {"nameserver 10.9.9.9\n" + ours, "nameserver 10.9.9.9\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example\noptions ndots:2\n"},
		"a server instead":    {strings.ReplaceAll(ours, "198.18.0.1", "10.9.9.9"), "nameserver 10.9.9.9\nsearch corp.example\noptions ndots:2\n"},
		"no server":           {"options ndots:2\n", original},
		"a domain more":       {strings.ReplaceAll(ours, "corp.example", "corp.example vpn.example"), "nameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example vpn.example\noptions ndots:2\n"},
		"search in its place": {ours + "search vpn.example\n", "nameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example vpn.example\noptions ndots:2\n"},
		"another option":      {strings.ReplaceAll(ours, "ndots:2", "ndots:5"), "nameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example\noptions ndots:5\n"},
	} {
		if got := orig.edited(parseWhole([]byte(c.now)), shop); !sameConf(got, parseWhole([]byte(c.want))) {
			t.Errorf("%s: got\n%s", name, got.text())
		}
	}
}
