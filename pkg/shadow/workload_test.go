package shadow

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// scaled is a workload beside its Service.
type scaled struct{ *exchanged }

func (s scaled) Restore(context.Context) error { s.note("refilled"); return nil }

// The workload is put back before the Service, so that there is somebody to lead to.
func TestWorkloadComesFirst(t *testing.T) {
	t.Parallel()
	e := &exchanged{state: heal.Ours, fails: 1}
	s := startRouter(t, Config{
		Grace: 300 * time.Millisecond, Service: e, Workload: scaled{e}, For: "ann",
		Heal: func(context.Context) error { e.note("healed"); return nil },
	}, "")
	s.end()
	done := e.was()
	first := len(done) > 0 && done[0] == "refilled"
	done = slices.DeleteFunc(done, func(what string) bool { return what == "refilled" }) // it is looked after twice
	if !first || !slices.Equal(done, []string{"failed", "restored", "healed"}) {
		t.Errorf("done: %v", done)
	}
}

// Who had it scaled down is gone, and others still hold the router: they get their
// original back.
func TestWorkloadIsNotKeptFromOthers(t *testing.T) {
	t.Parallel()
	const grace = 2 * time.Second
	e := &exchanged{state: heal.Ours}
	s := startRouter(t, Config{Grace: grace, Service: e, Workload: scaled{e}, For: "ann"}, "")
	wire := s.open(time.Second)
	s.put(wire, whole("ann"), false)
	bob := whole("bob")
	bob.Match.Path = "/bob"
	s.put(wire, bob, false)
	began := time.Now()
	for time.Since(began) < grace+lookEvery {
		for _, id := range []string{"ann", "bob"} {
			if _, err := GetClaim(t.Context(), wire, id); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(500 * time.Millisecond)
	}
	if done := e.was(); len(done) > 0 {
		t.Errorf("while she is there: %v", done)
	}
	gone := time.Now()
	eventually(t, func() error {
		if _, err := GetClaim(t.Context(), wire, "bob"); err != nil {
			return err
		}
		if len(e.was()) == 0 {
			return errors.New("not refilled")
		}
		return nil
	})
	if took := time.Since(gone); took < grace || took > 2*grace+2*lookEvery {
		t.Errorf("after %v", took)
	}
	s.stop()
	s.end()
}
