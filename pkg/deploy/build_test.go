package deploy

import (
	"strings"
	"testing"
)

// Who is no longer than hosts keep, and ends with a whole letter.
func TestWho(t *testing.T) {
	t.Setenv("GITLAB_CI", "true")
	t.Setenv("GITLAB_USER_LOGIN", "me")
	for url, want := range map[string]string{
		"https://gitlab/1":             "me https://gitlab/1",
		strings.Repeat("x", 300):       "me " + strings.Repeat("x", 253),
		"x" + strings.Repeat("é", 200): "me x" + strings.Repeat("é", 126),
		strings.Repeat("é", 200):       "me " + strings.Repeat("é", 126),
	} {
		t.Setenv("CI_JOB_URL", url)
		if got := Who(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
