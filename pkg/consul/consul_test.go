package consul

import (
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", "4") // they mostly wait
	goleak.VerifyTestMain(m)
}

// Where an agent is asked: the asked one by the way that is known to lead there.
func TestAgentOf(t *testing.T) {
	r, err := New(Config{Address: "https://127.0.0.1:8501"})
	if err != nil {
		t.Fatal(err)
	}
	r.self = "n1"
	for node, want := range map[string]string{"n1": "", "n2": "https://10.0.0.2:8501"} {
		if got := r.agentOf(node, "10.0.0.2"); got != want {
			t.Errorf("%s: %q", node, got)
		}
	}
	t.Setenv("CONSUL_HTTP_ADDR", "10.1.1.1:8600")
	if r, err = New(Config{}); err != nil || r.agentOf("n2", "fd00::2") != "http://[fd00::2]:8600" {
		t.Errorf("%v, %s", err, r.agentOf("n2", "fd00::2"))
	}
}

// Each registration that is changed has its own time: another one's start does not begin
// it anew, of that node or of that id.
func TestJudgedBefore(t *testing.T) {
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"c1": {"ServiceID": "a", "Interval": "1h"}, "c2": {"ServiceID": "b", "Interval": "1h"}}`)
	}))
	defer agent.Close()
	r, err := New(Config{Address: agent.URL, Start: "start"})
	if err != nil {
		t.Fatal(err)
	}
	all := []Instance{{ID: "a", Node: "n1", Start: "1"}, {ID: "b", Node: "n1", Start: "1"}, {ID: "a", Node: "n2", Start: "1"}}
	tn := &turn{r: r, known: slices.Clone(all)}
	waits := func() (words string) {
		for _, i := range all {
			lacks, err := tn.judgedBefore(t.Context(), i)
			if err != nil {
				t.Fatal(err)
			}
			if lacks != "" {
				words += i.String() + ", "
			}
		}
		return words
	}
	for n := range all {
		all[n].Start = "2"
	}
	if got := waits(); got != "a on n1, b on n1, a on n2, " {
		t.Error("changed:", got)
	}
	for n := range tn.changed {
		tn.changed[n].at = tn.changed[n].at.Add(-2 * time.Hour)
	}
	if got := waits(); got != "" {
		t.Error("two hours later:", got)
	}
	all[1].Start = "3"
	for range 2 {
		if got := waits(); got != "b on n1, " {
			t.Error("one again:", got)
		}
	}
}

// One that was well beside the old one and starts again is not in its place.
func TestAnotherStarts(t *testing.T) {
	for was, want := range map[bool]string{true: "no new instance is registered in its place", false: "b on n1 is new, but page is critical"} {
		a, b := Instance{ID: "a", Node: "n1", Start: "1", Healthy: true}, Instance{ID: "b", Node: "n1", Start: "1", Healthy: was}
		tn := &turn{old: a, known: []Instance{a, b}}
		b.Start, b.Healthy, b.Trouble = "2", false, "page is critical"
		if lacks, found := tn.find(t.Context(), []Instance{a, b}); found || lacks != want {
			t.Errorf("%q, %v", lacks, found)
		}
	}
}
