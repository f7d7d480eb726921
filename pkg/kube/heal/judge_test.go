package heal

import (
	"encoding/json"
	"testing"
)

func TestJudge(t *testing.T) {
	type set = map[string]string
	web, api := set{"app": "web"}, set{"app": "api"}
	ours, theirs := set{Label: "x1"}, set{Label: "x2"}
	mark := func(session string, selector set) string {
		text, _ := json.Marshal(Mark{Session: session, Selector: selector})
		return string(text)
	}
	changed := func(ports string) string {
		text, _ := json.Marshal(Mark{Session: "x1", Selector: web, Ports: ports})
		return string(text)
	}
	const (
		test   = `{"op":"test","path":"/metadata/resourceVersion","value":"7"}`
		toWeb  = `{"op":"add","path":"/spec/selector","value":{"app":"web"}}`
		toAPI  = `{"op":"add","path":"/spec/selector","value":{"app":"api"}}`
		unmark = `{"op":"remove","path":"/metadata/annotations/culvert.dev~1exchange"}`
	)
	for _, tc := range []struct {
		name       string
		annotation string
		selector   set
		copy       set // that the judge has
		state      string
		patch      string
	}{
		{"as it was made", mark("x1", web), ours, web, Ours, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"its ports", changed("TCP/80=http"), ours, web, Ours, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"other ports", changed("TCP/80=8080"), ours, web, Changed, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"other ports, put back", changed("TCP/80=8080"), web, web, Mixed, "[" + test + "," + unmark + "]"},
		{"no copy", mark("x1", web), ours, nil, Ours, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"the annotation is newer than the copy", mark("x1", web), ours, api, Ours, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"their keys beside ours", mark("x1", web), set{Label: "x1", "app": "api"}, web, Mixed, "[" + test + "," + toAPI + "," + unmark + "]"},
		{"the original put back", mark("x1", web), web, web, Mixed, "[" + test + "," + unmark + "]"},
		{"another selector", mark("x1", web), api, web, Mixed, "[" + test + "," + unmark + "]"},
		{"the selector removed", mark("x1", web), nil, nil, Mixed, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"another session's selector", mark("x1", web), theirs, web, Mixed, "[" + test + "," + unmark + "]"},
		{"the annotation removed", "", ours, web, Ours, "[" + test + "," + toWeb + "]"},
		{"the annotation removed, their keys", "", set{Label: "x1", "app": "api"}, web, Mixed, "[" + test + "," + toAPI + "]"},
		{"the annotation spoilt", "{", ours, web, Ours, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"the annotation of another", mark("x2", api), ours, web, Ours, "[" + test + "," + toWeb + "]"},
		{"the annotation without a selector", mark("x1", nil), ours, web, Ours, "[" + test + "," + toWeb + "," + unmark + "]"},
		{"nothing known", "", ours, nil, Ours, "null"},
		{"put back", "", web, web, PutBack, "null"},
		{"made anew", "", api, web, PutBack, "null"},
		{"without selector", "", nil, web, PutBack, "null"},
		{"of another session", mark("x2", web), theirs, web, PutBack, "null"},
		{"somebody's spoilt annotation", "{", web, web, PutBack, "null"},
	} {
		before, _ := json.Marshal(tc.selector)
		state, patch := Judge(Live{"7", tc.annotation, tc.selector, "TCP/80=http"}, "x1", tc.copy)
		text, err := json.Marshal(patch)
		if err != nil || state != tc.state || string(text) != tc.patch {
			t.Errorf("%s: %q, %s, %v; want %q, %s", tc.name, state, text, err, tc.state, tc.patch)
		}
		if after, _ := json.Marshal(tc.selector); string(after) != string(before) {
			t.Errorf("%s: the selector judged is now %s", tc.name, after)
		}
	}
}
