package hub

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/ca"
)

// A file is taken when it is whole, and while it is wrong what was before holds.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenFile(path, ca.ParseRules); err == nil {
		t.Error("none is there")
	}
	write("- x")
	if _, err := OpenFile(path, ca.ParseRules); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a wrong one: %v", err)
	}
	write("")
	f, err := OpenFile(path, ca.ParseRules)
	if err != nil {
		t.Fatal(err)
	}
	good := f.Now()
	for n, step := range []struct {
		text    string
		changed bool
		wrong   string
		same    bool
	}{
		{"", false, "", true},
		{"- half", false, "", true},
		{"- {issuer: x}", false, "", true}, // another than the one before
		{"- {issuer: x}", false, "line 1", true},
		{"- {issuer: x}", false, "line 1", true},
		{"# good", false, "line 1", true},
		{"# good", true, "", false},
		{"# good", false, "", false},
	} {
		write(step.text)
		changed, err := f.read()
		if changed != step.changed || (err != nil) != (step.wrong != "") || err != nil && !strings.Contains(err.Error(), step.wrong) || (f.Now() == good) != step.same {
			t.Errorf("%d: %v, %v, %v", n, changed, err, f.Now() == good)
		}
	}
}
