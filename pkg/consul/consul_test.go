package consul

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for what takes a moment on a quiet machine.
const patience = 20 * time.Second

// soon is for what never comes.
const soon = 3 * time.Second

func TestRoll(t *testing.T) {
	for _, test := range []struct {
		name    string
		restart func(w *standIn, i Instance, n int) error
		start   string
		drain   bool
		dropped []string // "node id" that is gone afterwards
	}{
		{name: "the same id starts again", start: "start", drain: true, restart: func(w *standIn, i Instance, n int) error {
			w.register(i.Node, i.ID, fmt.Sprint("later ", n), true)
			return nil
		}},
		{name: "it is registered anew", drain: true, restart: func(w *standIn, i Instance, _ int) error {
			w.deregister(i.Node, i.ID)
			w.register(i.Node, i.ID, "", true)
			return nil
		}},
		{name: "another id, and the old one leaves", start: "start", restart: func(w *standIn, i Instance, n int) error {
			w.deregister(i.Node, i.ID)
			w.register(i.Node, fmt.Sprint("pod-", n), "", true)
			return nil
		}},
		{name: "another id, and the old one is dead", drain: true, dropped: []string{"n1 a", "n2 b", "n2 c"}, restart: func(w *standIn, i Instance, n int) error {
			w.sick(i.Node, i.ID)
			w.register(i.Node, fmt.Sprint("pod-", n), "", true)
			return nil
		}},
		{name: "the same id on another node", dropped: []string{"n1 a", "n2 b", "n2 c"}, restart: func(w *standIn, i Instance, _ int) error {
			w.register("n3", i.ID, "", true)
			return nil
		}},
		{name: "it takes its time", start: "start", drain: true, restart: func(w *standIn, i Instance, n int) error {
			w.register(i.Node, i.ID, fmt.Sprint("later ", n), false)
			w.register(i.Node, i.ID, fmt.Sprint("later ", n), true)
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newStandIn(t, "n1", "n2", "n3")
			w.register("n1", "a", "1", true)
			w.register("n2", "b", "1", true)
			w.register("n2", "c", "1", true)
			r, n := w.registry(test.start), 0
			gated := 0
			err := r.Roll(t.Context(), RollConfig{
				Service: "shop", Drain: test.drain, Within: patience, Say: func(line string) { t.Log(line) },
				Restart: func(ctx context.Context, i Instance) error {
					n++
					all, err := r.Instances(ctx, "shop")
					passing := slices.DeleteFunc(all, func(i Instance) bool { return !i.Passing() })
					if want := map[bool]int{true: 2, false: 3}[test.drain]; err != nil || len(passing) != want {
						t.Errorf("%v, and while %s is restarted there pass %v", err, i, passing)
					}
					return test.restart(w, i, n)
				},
				Gate: func(_ context.Context, i Instance) error {
					gated++
					if gated%2 == 1 {
						return errors.New("503")
					}
					return nil
				},
			})
			all, lerr := r.Instances(t.Context(), "shop")
			if err != nil || lerr != nil || n != 3 || gated != 6 || len(all) != 3 || slices.ContainsFunc(all, func(i Instance) bool { return !i.Passing() }) {
				t.Errorf("%v, %v: %d restarted, gate asked %d times, %+v", err, lerr, n, gated, all)
			}
			for _, gone := range test.dropped {
				if node, id, _ := strings.Cut(gone, " "); w.has(node, id) {
					t.Errorf("%s is still there", gone)
				}
			}
			if strings.Contains(w.asked(), "/v1/catalog") {
				t.Errorf("the catalog was changed past an agent:\n%s", w.asked())
			}
		})
	}
}

// What is not a new instance, or not a healthy one, stops it at the first.
func TestRollStops(t *testing.T) {
	for _, test := range []struct {
		name    string
		restart func(w *standIn, i Instance) error
		gate    error
		says    string
		drained bool // a is left so
	}{
		{name: "it never comes back", says: "no new instance is registered in its place", restart: func(w *standIn, i Instance) error {
			w.deregister(i.Node, i.ID)
			return nil
		}},
		{name: "the old one goes on answering", says: "no new instance is registered in its place", restart: func(*standIn, Instance) error { return nil }},
		{name: "it is never healthy", says: "a on n1 is new, but http is critical: connection refused", restart: func(w *standIn, i Instance) error {
			w.register(i.Node, i.ID, "2", false)
			return nil
		}},
		{name: "the gate says no", gate: errors.New("it answers 503"), says: "a on n1 is new, but it answers 503", restart: func(w *standIn, i Instance) error {
			w.register(i.Node, i.ID, "2", true)
			return nil
		}},
		{name: "the old one does not end", says: "d on n1 is there, but a on n1 has not ended", restart: func(w *standIn, i Instance) error {
			w.register(i.Node, "d", "2", true)
			return nil
		}},
		{name: "it cannot be restarted", says: "no such unit", restart: func(*standIn, Instance) error { return errors.New("no such unit") }},
		{name: "its agent dies", says: "does not answer", drained: true, restart: func(w *standIn, i Instance) error {
			w.register(i.Node, i.ID, "2", true)
			w.die("n1")
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newStandIn(t, "n2", "n1")
			w.register("n1", "a", "1", true)
			w.register("n2", "b", "1", true)
			r := w.registry("start")
			n := 0
			err := r.Roll(t.Context(), RollConfig{
				Service: "shop", Drain: true, Within: soon,
				Restart: func(_ context.Context, i Instance) error { n++; return test.restart(w, i) },
				Gate:    func(context.Context, Instance) error { return test.gate },
			})
			if err == nil || !strings.Contains(err.Error(), test.says) || n != 1 {
				t.Errorf("%v, %d restarted", err, n)
			}
			if !test.drained {
				all, err := r.Instances(t.Context(), "shop")
				if err != nil || slices.ContainsFunc(all, func(i Instance) bool { return i.Drained }) {
					t.Errorf("%v: left drained: %+v", err, all)
				}
			}
		})
	}
}

// Maintenance that somebody else wants stays; that of a run which was killed does not.
func TestRollAndMaintenance(t *testing.T) {
	for reason, ours := range map[string]bool{"disk is replaced": false, ourReason: true} {
		w := newStandIn(t, "n1")
		w.register("n1", "a", "1", true)
		r := w.registry("start")
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		all, err := r.Instances(ctx, "shop")
		if err == nil {
			err = r.Drain(ctx, all[0], true, reason)
		}
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		err = r.Roll(ctx, RollConfig{Service: "shop", Drain: true, Within: patience, Restart: func(_ context.Context, i Instance) error {
			n++
			w.register(i.Node, i.ID, "2", true)
			return nil
		}})
		all, lerr := r.Instances(ctx, "shop")
		if lerr != nil || all[0].Passing() != ours || (err == nil) != ours || (n == 1) != ours || !ours && !strings.Contains(err.Error(), "in maintenance: "+reason+", which is somebody else's") {
			t.Errorf("%s: %v, %v, %d restarted, %+v", reason, err, lerr, n, all)
		}
	}
}

// What the registry does not say is not taken for good.
func TestNothingIsTolerated(t *testing.T) {
	roll := func(r *Registry) error {
		return r.Roll(t.Context(), RollConfig{Service: "shop", Within: soon, Restart: func(context.Context, Instance) error {
			t.Error("something was restarted")
			return nil
		}})
	}
	w := newStandIn(t, "n1")
	if err := roll(w.registry("")); !errors.Is(err, ErrNoInstance) {
		t.Errorf("no instance: %v", err)
	}
	w.register("n1", "a", "1", true)
	w.deny = "/v1/health"
	if err := roll(w.registry("")); !errors.Is(err, ErrForbidden) {
		t.Errorf("no right: %v", err)
	}
	w.die("n1")
	if err := roll(w.registry("")); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no consul: %v", err)
	}
}

// A duplicate is removed where it is owned: from the catalog alone it would come back.
func TestDuplicates(t *testing.T) {
	w := newStandIn(t, "n1", "n2", "n3")
	w.register("n1", "a", "2", true)
	w.register("n2", "a", "1", true)
	w.register("n3", "a", "1", false)
	w.register("n3", "b", "1", true)
	r := w.registry("")
	all, err := r.Instances(t.Context(), "shop")
	if err != nil || len(all) != 4 {
		t.Fatalf("%+v, %v", all, err)
	}
	if others := Duplicates(all, all[0]); len(others) != 2 || others[0].Node != "n2" || others[1].Node != "n3" {
		t.Errorf("%+v", others)
	}

	// The stand-in is as Consul is: what is taken from the catalog comes back.
	if _, err := r.client.Catalog().Deregister(&api.CatalogDeregistration{Node: "n2", ServiceID: "a"}, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := r.until(ctx, "shop", func(all []Instance) (string, bool) { return "", len(all) == 4 }); err != nil {
		t.Fatalf("it did not come back: %v", err)
	}

	dropped, err := r.DropDuplicates(ctx, all[0])
	if err != nil || len(dropped) != 2 || w.has("n2", "a") || w.has("n3", "a") || !w.has("n1", "a") || !w.has("n3", "b") {
		t.Errorf("%+v, %v", dropped, err)
	}
	for _, want := range []string{"n2 /v1/agent/service/deregister/a", "n3 /v1/agent/service/deregister/a"} {
		if !strings.Contains(w.asked(), want) {
			t.Errorf("not asked: %s\n%s", want, w.asked())
		}
	}
	if _, err := r.DropDuplicates(ctx, Instance{ID: "a", Node: "n2", Service: "shop"}); !errors.Is(err, ErrNoInstance) || !w.has("n1", "a") {
		t.Errorf("the last one: %v", err)
	}
}

// Of a dead node nobody puts it back; of one that only does not answer somebody might.
func TestDeregisterOfTheDead(t *testing.T) {
	w := newStandIn(t, "n1", "n2")
	w.register("n2", "a", "1", true)
	r := w.registry("")
	list := func() Instance {
		all, err := r.Instances(t.Context(), "shop")
		if err != nil || len(all) != 1 {
			t.Fatalf("%+v, %v", all, err)
		}
		return all[0]
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	silent := list()
	w.die("n2")
	if err := r.Deregister(ctx, silent); !errors.Is(err, ErrUnreachable) || !w.has("n2", "a") {
		t.Errorf("of one that is not known to be dead: %v", err)
	}
	if err := r.Deregister(ctx, list()); err != nil || w.has("n2", "a") {
		t.Errorf("of a dead one: %v", err)
	}
}

func TestDrain(t *testing.T) {
	w := newStandIn(t, "n1", "n2")
	w.register("n2", "a", "1", true)
	r := w.registry("")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, on := range []bool{true, true, false} {
		all, err := r.Instances(ctx, "shop")
		if err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		if err := r.Drain(ctx, all[0], on, "release 7"); err != nil {
			t.Error(err)
		}
		all, err = r.Instances(ctx, "shop")
		if err != nil || all[0].Drained != on || on && all[0].Reason != "release 7" || all[0].Passing() == on || !all[0].Healthy {
			t.Errorf("%+v, %v", all, err)
		}
	}
	if err := r.Drain(ctx, Instance{ID: "z", Service: "shop", Node: "n2", Agent: w.agents["n2"].server.URL}, true, ""); !errors.Is(err, ErrNoInstance) {
		t.Error(err)
	}
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
