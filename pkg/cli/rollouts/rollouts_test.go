package rollouts

import (
	"bytes"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/release"
)

func TestBar(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		want        string
	}{
		{0, 0, ""}, {0, 1000, "[------------------------]   0% of 1.0 KB"}, {6 << 20, 12 << 20, "[############------------]  50% of 12.6 MB"}, {5, 5, "[########################] 100% of 5 B"},
	} {
		if got := bar(c.done, c.total); got != c.want {
			t.Errorf("%d of %d is %q, want %q", c.done, c.total, got, c.want)
		}
	}
}

// What hosts say cannot break a table, or a terminal.
func TestTables(t *testing.T) {
	var out bytes.Buffer
	if err := printReport(&out, []deploy.Row{
		{Host: "web-1", Role: "web", Release: "new", Before: "old", State: deploy.Deployed},
		{Host: "web-2", Release: "old", Before: "old", State: deploy.Restored, Phase: "health", Error: "no\nway \x1b[2J", Output: "one\n\x1b]0;x\atwo\n"},
		{Host: "web-3", State: deploy.Unreachable, Error: "refused"},
	}); err != nil {
		t.Fatal(err)
	}
	want := `HOST    ROLE   RELEASE   STATE         WHY
web-1   web    new       deployed      was old
web-2   -      old       restored      health: no way  [2J
web-3   -      -         unreachable   refused

web-2 said last:
  one
  ]0;x two
`
	if out.String() != want {
		t.Errorf("%q, want\n%q", out.String(), want)
	}
	out.Reset()
	if err := printReleases(&out, []deploy.Listed{{ID: "b", Commit: "04c66f5aaaa", Who: "ci", When: time.Unix(0, 0), Hosts: []deploy.ListedHost{
		{Host: "web-1", State: release.StateGood, Current: true}, {Host: "web-2", State: release.StateFailed}, {Host: "web-3", State: release.StateGood, Current: true},
	}}, {ID: "aa", Hosts: []deploy.ListedHost{{Host: "web-1", State: release.StateFailed, Error: release.GoneBack}}}, {ID: "a", Hosts: []deploy.ListedHost{{Host: "web-2", State: release.StateFailed + "\t\x1b[2J", Current: true}}}}); err != nil {
		t.Fatal(err)
	}
	want = `RELEASE   COMMIT    WHEN                  WHO   HOSTS
b         04c66f5   1970-01-01 00:00:00   ci    live: web-1 web-3; failed: web-2
aa        -         -                     -     gone back from: web-1
a         -         -                     -     live, failed [2J: web-2
`
	if out.String() != want {
		t.Errorf("%q, want\n%q", out.String(), want)
	}
}
