package shadow

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/router"
)

// standsBefore starts a router that stands before a program of its own pod.
func standsBefore(t *testing.T, e *exchanged, original string) *stand {
	t.Helper()
	return startRouter(t, Config{
		Grace: long, Service: e, Redirect: &channel.Host{}, Heal: func(context.Context) error { e.note("healed"); return nil },
	}, original)
}

// A laptop ends the router: it puts back what it took, then lets what is open end,
// and then goes, without a wait for the grace time.
func TestEnd(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	e := &exchanged{state: heal.Ours}
	s := standsBefore(t, e, answering(t, "original", release))
	wire := s.open(time.Second)
	s.lead(wire, "ann", "tcp", answering(t, "laptop", nil))
	s.put(wire, whole("ann"), false)
	s.want("laptop")
	s.want("original", "User-Agent: kube-probe/1.34") // whose it is to answer
	var held *router.HeldError
	if _, err := End(t.Context(), wire, time.Second); !errors.As(err, &held) || len(e.was()) > 0 {
		t.Errorf("under a claim: %v, %v", err, e.was())
	}
	if last, _, err := DropClaim(t.Context(), wire, "ann"); !last || err != nil {
		t.Errorf("last %v, %v", last, err)
	}
	slow := make(chan string, 1)
	go func() { slow <- s.slowly() }()
	eventually(t, func() error {
		if n, err := Drain(t.Context(), wire, 0); n != 1 || err != nil {
			return errors.Join(errors.New("nothing is open"), err)
		}
		return nil
	})
	go func() {
		eventually(t, func() error {
			if len(e.was()) == 0 {
				return errors.New("not restored")
			}
			return nil
		})
		close(release)
	}()
	if open, err := End(t.Context(), wire, patience); open != 0 || err != nil {
		t.Errorf("open %d, %v", open, err)
	}
	if got := <-slow; got != "original" {
		t.Errorf("what was open: %q", got)
	}
	wire.Close()
	closed := time.Now()
	s.want("original") // who had begun to connect before
	s.end()
	if took := time.Since(closed); took < begun {
		t.Errorf("ended after %v", took)
	}
	if done := e.was(); !slices.Equal(done, []string{"restored", "healed"}) {
		t.Errorf("done: %v", done)
	}
}

// What cannot put back by itself is not ended by a laptop; what fails goes on.
func TestEndRefused(t *testing.T) {
	t.Parallel()
	bare := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	if _, err := End(t.Context(), bare.open(time.Second), 0); err == nil {
		t.Error("a router without rights ends")
	}
	bare.stop()
	bare.end()
	e := &exchanged{state: heal.Ours, fails: 1}
	s := standsBefore(t, e, answering(t, "original", nil))
	wire := s.open(time.Second)
	if _, err := End(t.Context(), wire, 0); err == nil {
		t.Error("what fails is no error")
	}
	s.want("original")
	if _, err := End(t.Context(), wire, 0); err != nil {
		t.Error(err)
	}
	s.end() // though the laptop does not hang up
}

func TestKeysThemselves(t *testing.T) {
	host, _ := keys(t)
	_, laptop := keys(t)
	if _, err := (Config{Keys: &Keys{host, laptop}, KeysDir: "/nowhere"}).keys(); err != nil {
		t.Error(err)
	}
	if err := New(Config{Listen: "127.0.0.1:0", Keys: &Keys{}}).Run(t.Context()); err == nil {
		t.Error("it runs without keys")
	}
}
