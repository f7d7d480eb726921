package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// A borrower is a forward beside a connect, and what it leads to.
type borrower struct {
	*running
	address string
}

// share starts both, and looks that the shadow of the first is that of both.
func share(t *testing.T, args ...string) (host *running, session status, g borrower) {
	t.Helper()
	host = connect(t, args...)
	session = theStatus(t)
	g = borrower{running: start(t, "forward", "-n", namespace, "svc/multi", ":80")}
	g.says("✓ shadow shared with session " + session.Session)
	g.says(forwardingLine)
	_, rest, _ := strings.Cut(g.talk.String(), "forwarding ")
	g.address, _, _ = strings.Cut(rest, " ")
	if of := g.lender(); of != session.Session {
		t.Errorf("the shadow is of session %q", of)
	}
	if err := g.answers(); err != nil {
		t.Error(err)
	}
	return host, session, g
}

// lender is whose shadow it uses, "" for its own.
func (g borrower) lender() string {
	g.t.Helper()
	var sessions []struct {
		Kind   string
		Shadow struct{ Of string }
	}
	out := laptop(g.t, culvertBin, "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &sessions); err != nil {
		g.t.Fatalf("%v in %s", err, out)
	}
	for _, s := range sessions {
		if s.Kind == "forward" {
			return s.Shadow.Of
		}
	}
	g.t.Fatalf("no forward: %s", out)
	return ""
}

func (g borrower) answers() error {
	page, talk, err := try("curl", "-sS", "--max-time", "5", "http://"+g.address+"/form")
	if err != nil || !strings.Contains(page, `"pod":"echo-`) {
		return fmt.Errorf("%s%s%w", page, talk, err)
	}
	return nil
}

// A later verb uses the shadow of a connect to the same namespace. That is the connect's:
// it stays when the later one leaves, and goes with the connect, after which the later one
// has its own.
func TestShare(t *testing.T) {
	check := noTrace(t)
	host, session, first := share(t)
	first.stop()
	if err := reachable("web.other")(); err != nil {
		t.Errorf("when the later one has left: %v", err)
	}
	second := borrower{running: start(t, "forward", "-n", namespace, "svc/multi", first.address[strings.LastIndex(first.address, ":"):][1:]+":80"), address: first.address}
	second.says(forwardingLine)
	host.stop()
	eventually(t, 20*time.Second, "it answers when the connect has left", second.answers)
	if of := second.lender(); of != "" {
		t.Errorf("the shadow is of session %q still", of)
	}
	second.says("the shadow of session " + session.Session + " is gone, making one")
	second.stop()
	check(30 * time.Second)
}

// Who is killed takes nothing from whom it lent to; what it has left goes after that.
func TestShareKilled(t *testing.T) {
	check := noTrace(t)
	host, session, g := share(t, "--grace=15s")
	kill9(t, session.PID)
	host.wait(10 * time.Second)
	time.Sleep(20 * time.Second) // more than the grace time
	if err := g.answers(); err != nil {
		t.Error(err)
	}
	g.stop()
	goesByItself(t, session.Session, check, time.Now(), 15*time.Second)
}
