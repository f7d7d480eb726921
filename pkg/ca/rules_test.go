package ca

import (
	"strings"
	"testing"
	"time"
)

func TestRules(t *testing.T) {
	r, err := ParseRules([]byte(strings.ReplaceAll(shop, "ISSUER", "https://gitlab.example")))
	if err != nil || len(r.all) != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	if r.all[0].For != 5*time.Minute || r.all[1].For != usualFor || r.all[0].Claims["ref_protected"] != "true" {
		t.Errorf("%+v", r.all)
	}
	for _, text := range []string{"", "# none\n", "[]", "---\n"} {
		if r, err := ParseRules([]byte(text)); err != nil || len(r.all) > 0 {
			t.Errorf("%q: %+v, %v", text, r, err)
		}
	}
}

func TestWrongRules(t *testing.T) {
	good := "- issuer: https://gitlab.example\n  audience: hub\n  claims: {ref: main}\n  principals: [ci]\n"
	for text, want := range map[string]string{
		good + "  foor: 10m\n":                                 "line 5: field foor not found",
		strings.Replace(good, "https", "http", 1):              "line 1: issuer \"http://gitlab.example\" is no https",
		strings.Replace(good, "hub", `""`, 1):                  "line 1: audience",
		strings.Replace(good, "{ref: main}", "{}", 1):          "line 1: claims are needed",
		strings.Replace(good, "main", `"[a-"`, 1):              "claim ref",
		strings.Replace(good, "main", `""`, 1):                 "claim ref",
		strings.Replace(good, "main", "[main]", 1):             "line 3: cannot unmarshal",
		strings.Replace(good, "[ci]", "[]", 1):                 "1 to 256 principals, not 0",
		strings.Replace(good, "[ci]", `["{ref}"]`, 1):          `"{ref}" is no principal`,
		strings.Replace(good, "[ci]", `["*"]`, 1):              `"*" is no principal`,
		good + "  for: 2h\n":                                   "at most 1h0m0s, not 2h",
		good + "  for: -2m\n":                                  "at most 1h0m0s, not -2m",
		good + "  for: soon\n":                                 "line 5",
		good + "  for: 10\n":                                   "line 5",
		good + "  command: \"a\\nb\"\n":                        "one line",
		good + "  extensions: [permit-all]\n":                  `extension "permit-all"`,
		good + good + "  audience: twice\n":                    "line 9",
		good + "\n\n" + strings.Replace(good, "[ci]", "[]", 1): "line 7: ",
		good + "---\n" + good:                                  "more than one document",
		"issuer: x":                                            "line 1",
		"- x":                                                  "line 1",
		"\t":                                                   "yaml",
	} {
		if r, err := ParseRules([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v, want %q", text, r, err, want)
		}
	}
}

func FuzzParseRules(f *testing.F) {
	f.Add(strings.ReplaceAll(shop, "ISSUER", "https://gitlab.example"))
	f.Add("- &a {issuer: https://a, audience: b, claims: {c: d}, principals: [e]}\n- *a\n- <<: *a\n  for: 1h\n")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRules([]byte(text))
		if err != nil {
			return
		}
		for _, one := range r.all {
			if one.Audience == "" || len(one.Claims) == 0 || len(one.Principals) == 0 || one.For > mostFor || one.For <= 0 {
				t.Errorf("%+v", one)
			}
			if _, err := choose(r.of(one.Issuer), claims{"aud": one.Audience}); err == nil {
				t.Errorf("a token that says nothing is worth %+v", one)
			}
		}
	})
}
