package router

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
)

func TestParseHeader(t *testing.T) {
	for _, test := range []struct {
		text string
		want Header
		like []string
		not  []string
	}{
		{"x-dev: mine", Header{"X-Dev", exact, "mine"}, []string{"mine"}, []string{"mine!", "Mine", ""}},
		{"X-Dev:mine*", Header{"X-Dev", prefix, "mine"}, []string{"mine", "mine!"}, []string{"min"}},
		{" x-dev : /^1|b$/ ", Header{"X-Dev", regex, "^1|b$"}, []string{"1bc", "b"}, []string{"c"}},
		{"x-dev: *", Header{"X-Dev", prefix, ""}, []string{"", "x"}, nil},
		{"x-time: 12:30", Header{"X-Time", exact, "12:30"}, []string{"12:30"}, nil},
		{"x-path: /", Header{"X-Path", exact, "/"}, []string{"/"}, []string{"a/b"}},
		{"host: web.shop", Header{"Host", exact, "web.shop"}, []string{"web.shop"}, []string{"web"}},
	} {
		h, err := ParseHeader(test.text)
		if err != nil || h != test.want {
			t.Errorf("%q: %+v, %v", test.text, h, err)
			continue
		}
		is, _ := h.test()
		asked := func(v string) *http.Request {
			return &http.Request{Host: v, Header: http.Header{h.Name: {"another", v}}, URL: &url.URL{}}
		}
		for _, v := range test.like {
			if !is(asked(v)) {
				t.Errorf("%q does not match %q", test.text, v)
			}
		}
		for _, v := range test.not {
			if is(asked(v)) {
				t.Errorf("%q matches %q", test.text, v)
			}
		}
		if is(&http.Request{Header: http.Header{}}) {
			t.Errorf("%q matches a request without it", test.text)
		}
	}
	for _, bad := range []string{"", "x-dev", ": a", "x dev: a", "x-dev:", "x-dev: /(/", "x-dev: a\nb", "x-dév: a"} {
		if h, err := ParseHeader(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, h)
		}
	}
}

func TestMatchString(t *testing.T) {
	for want, m := range map[string]Match{
		"everything":               {},
		"path /api":                {Path: "/api"},
		`path "/a, b"`:             {Path: "/a, b"},
		"X-A: 1, X-B: /2/, path /": {Headers: []Header{{"x-b", regex, "2"}, {"x-a", exact, "1"}, {"X-A", exact, "1"}}, Path: "/"},
		`X-A: exact "mine*"`:       {Headers: []Header{{"x-a", exact, "mine*"}}},
		`X-A: exact "1, X-B: 2"`:   {Headers: []Header{{"x-a", exact, "1, X-B: 2"}}},
		`X-A: exact ""`:            {Headers: []Header{{"x-a", exact, ""}}},
		`X-A: exact "exact \"2\""`: {Headers: []Header{{"x-a", exact, `exact "2"`}}},
		"X-A: */, X-A: mine*":      {Headers: []Header{{"x-a", prefix, "mine"}, {"x-a", exact, "*/"}}},
	} {
		if got := m.String(); got != want {
			t.Errorf("%+v is %s, want %s", m, got, want)
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	for _, s := range []string{"x-dev: mine", "x-dev: mine*", "x-dev: /re/", "x-dev: *", ": a", "a: //", "a: /*", "a:b, c: d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		h, err := ParseHeader(text)
		if err != nil {
			return
		}
		is, err := Match{Headers: []Header{h}}.test()
		if err != nil {
			t.Fatalf("%q was read, but cannot be used: %v", text, err)
		}
		is(&http.Request{Header: http.Header{h.Name: {h.Value}}})
		if back, err := ParseHeader(h.String()); !strings.Contains(h.String(), `"`) && (err != nil || back != h) {
			t.Fatalf("%q: %q is read as %q", text, h, back)
		}
	})
}

// FuzzMatchString: what has one string matches the same.
func FuzzMatchString(f *testing.F) {
	f.Add("x-a", exact, "1", prefix, "1*")
	f.Fuzz(func(t *testing.T, name, kind1, value1, kind2, value2 string) {
		a, b := Header{name, kind1, value1}, Header{name, kind2, value2}
		if _, err := a.test(); err != nil {
			return
		}
		if _, err := b.test(); err != nil {
			return
		}
		if (a.String() == b.String()) != (a == b) {
			t.Fatalf("%+v is %s, %+v is %s", a, a, b, b)
		}
	})
}
