package release

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// logOf makes a log of words: "+a" ships a, "a" activates it and finds it good, "!a" fails, "a<b" goes
// back from b to a, "-a" prunes it.
func logOf(words string) []record {
	var log []record
	for _, w := range strings.Fields(words) {
		to, from, back := strings.Cut(w, "<")
		id := strings.TrimLeft(to, "+!-")
		add := func(event, op string) { log = append(log, record{Event: event, Release: id, Op: op, Error: "why"}) }
		switch {
		case back:
			add(eventGood, opRollback)
			id = from
			add(eventLeft, "")
		case w[0] == '+':
			add(eventShipped, "")
		case w[0] == '!':
			add(eventShipped, "")
			add(eventRestored, opDeploy)
		case w[0] == '-':
			add(eventPruned, "")
		default:
			add(eventShipped, "")
			add(eventGood, opDeploy)
		}
	}
	return log
}

// The rules of capistrano and deployer, and what their users have suffered from: see
// TUNNEL.md, 17 and 18.
func TestRollbackTargetAndPrune(t *testing.T) {
	for _, c := range []struct {
		name, log, current string
		keep               int
		target, pruned     string
	}{
		{"nothing", "", "", 1, "", ""},
		{"one", "a", "a", 1, "", ""},
		{"two", "a b", "b", 1, "a", ""},
		{"keep counts the current", "a b c d", "d", 2, "c", "a b"},
		{"the target stays whatever keep is", "a b c d", "d", 1, "c", "a b"},
		{"names say nothing", "z y x", "x", 1, "y", "z"},
		{"six failures between do not push the good ones out", "a b !c !d !e !f !g !h i", "i", 2, "b", "a c d e f g h"},
		{"a failed one is no target", "a !b !c d", "d", 5, "a", "b c"},
		{"shipped only is no target", "a +b c", "c", 5, "a", "b"},
		{"what is newer than the current stays", "a b !c +d", "b", 5, "a", ""},
		{"rolled back: not to where we came from", "a b c b<c", "b", 5, "a", ""},
		{"pruned, and shipped again: as new as that", "a b -a a", "a", 5, "b", ""},
		{"rolled back twice", "a b c b<c a<b", "a", 5, "", ""},
		{"rolled back, then a new one", "a b c b<c d", "d", 5, "b", "c"},
		{"rolled back and the live one is old", "a b c d a<d", "a", 1, "", "b"},
		{"deployed again after that", "a b a<b b", "b", 5, "a", ""},
		{"pruned ones are gone", "a b c -a", "c", 5, "b", ""},
		{"the current is not of ours", "a b", "", 5, "b", ""},
		{"all failed", "!a !b", "", 5, "", ""},
	} {
		all := history(logOf(c.log))
		for i := range all {
			all[i].Current = all[i].ID == c.current
		}
		got := ""
		if to := target(all); to != nil {
			got = to.ID
		}
		if got != c.target {
			t.Errorf("%s: target %q, not %q", c.name, got, c.target)
		}
		pruned := prunable(all, c.keep, "")
		slices.Sort(pruned)
		if got := strings.Join(pruned, " "); got != c.pruned {
			t.Errorf("%s: %q are pruned, not %q", c.name, got, c.pruned)
		}
	}
	all := history(logOf("a b c d e"))
	all[4].Current = true
	if got := prunable(all, 1, "b"); slices.Contains(got, "b") {
		t.Errorf("%v are pruned, and b was to be spared", got)
	}
	unknown := append([]Release{{ID: "by-hand", State: StateUnknown}}, all...)
	if got := prunable(unknown, 1, ""); slices.Contains(got, "by-hand") {
		t.Errorf("%v are pruned, of which one is not ours", got)
	}
	if to := target(unknown[:1]); to != nil {
		t.Errorf("%v is not ours to go to", to)
	}
}

// 5000 releases, as capistrano has it.
func TestPruneMany(t *testing.T) {
	var words []string
	for i := range 5000 {
		words = append(words, fmt.Sprintf("r%d", i))
	}
	all := history(logOf(strings.Join(words, " ")))
	all[4999].Current = true
	if n := len(prunable(all, 5, "")); n != 4995 {
		t.Errorf("%d are pruned", n)
	}
}

func FuzzLog(f *testing.F) {
	for _, words := range []string{"a b !c a<b", "+a -a a"} {
		var text strings.Builder
		for _, r := range logOf(words) {
			line, _ := json.Marshal(r)
			text.Write(append(line, '\n'))
		}
		f.Add([]byte(text.String()))
	}
	f.Add([]byte("{\n\x00"))
	f.Fuzz(func(t *testing.T, text []byte) {
		all := history(parseLog(text))
		for i := range all {
			all[i].Current = i == len(text)%len(all)
		}
		to, gone := target(all), prunable(all, 1, "")
		for _, r := range all {
			if pruned := slices.Contains(gone, r.ID); pruned && (r.Current || to != nil && r.ID == to.ID || r.State == StateUnknown) {
				t.Errorf("%+v is pruned", r)
			}
			if CheckID(r.ID) != nil {
				t.Errorf("a release called %q", r.ID)
			}
		}
	})
}
