package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Ctrl-C as soon as each step of the way up has begun, and a little later.
func TestInterruptAtEveryStep(t *testing.T) {
	steps := stepsOfConnect(t)
	if len(steps) < 10 {
		t.Fatalf("only %d steps seen: %q", len(steps), steps)
	}
	apart(t) // the other half need not wait for all of them
	for _, step := range steps {
		for _, later := range []time.Duration{0, 40 * time.Millisecond} {
			t.Run(fmt.Sprintf("%s+%v", step, later), func(t *testing.T) {
				check := noTrace(t)
				s := start(t, "connect", "-n", namespace, "-v")
				eventually(t, patience, step, func() error {
					if !strings.Contains(s.talk.String(), "… "+step+"\n") && s.alive() {
						return errors.New(s.talk.String())
					}
					return nil
				})
				time.Sleep(later)
				s.stop()
				check(20 * time.Second)
			})
		}
	}
}

// stepsOfConnect are the steps in the words that culvert itself says.
func stepsOfConnect(t *testing.T) []string {
	s := connect(t, "-v")
	s.stop()
	var steps []string
	for _, line := range strings.Split(s.talk.String(), "\n") {
		if name, ok := strings.CutPrefix(line, "… "); ok && !strings.Contains(name, ":") && !strings.HasPrefix(name, "putting") {
			steps = append(steps, name)
		}
	}
	return steps
}

func kill9(t *testing.T, pid int) {
	t.Helper()
	laptop(t, "kill", "-9", strconv.Itoa(pid))
}

const sessionLabel = "culvert.dev/session"

// The dead are sessions whose laptop was killed. What they left in the cluster
// is not looked at by other tests: it goes when it goes.
var dead struct {
	sync.Mutex
	sessions []string
}

func isDead(session string) bool {
	dead.Lock()
	defer dead.Unlock()
	return slices.Contains(dead.sessions, session)
}

// goesByItself wants all else as before at once, by check, and that what bears
// the session's label is gone soon after the grace time, and not before its
// laptop was silent for so long. Other tests run meanwhile.
func goesByItself(t *testing.T, session string, check func(time.Duration), killed time.Time, grace time.Duration) {
	t.Helper()
	dead.Lock()
	dead.sessions = append(dead.sessions, session)
	dead.Unlock()
	check(5 * time.Second)
	ended := make(chan error, 1)
	go func() { ended <- goneBetween(session, killed.Add(grace/2), killed.Add(grace+time.Minute)) }()
	apart(t)
	t.Parallel()
	if err := <-ended; err != nil {
		t.Errorf("session %s, killed, grace %v: %v", session, grace, err)
	}
}

// goneBetween looks at a session's objects until there are none, from where no
// other test cuts the network.
func goneBetween(session string, early, late time.Time) error {
	time.Sleep(time.Until(early))
	for first := true; ; first = false {
		left, err := on("router", "kubectl", "get", kinds, "-A", "-l", sessionLabel+"="+session, "-o", "name").Output()
		switch gone := err == nil && len(left) == 0; {
		case gone && first:
			return errors.New("gone too soon")
		case gone:
			return nil
		case time.Now().After(late):
			return fmt.Errorf("left: %s (%v)", left, err)
		}
		time.Sleep(time.Second)
	}
}

// theSession is the one that lives, by what is in the cluster.
func theSession(t *testing.T) string {
	t.Helper()
	all := strings.Fields(kubectl(t, "get", "lease", "-n", namespace, "-l", sessionLabel, "-o", `jsonpath={.items[*].metadata.labels.culvert\.dev/session}`))
	living := slices.DeleteFunc(all, isDead)
	if len(living) != 1 {
		t.Fatalf("sessions %q, want 1", living)
	}
	return living[0]
}

// The laptop is as before at once; the cluster when the shadow's patience ends.
func TestKillCulvert(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	st := theStatus(t)
	kill9(t, st.PID)
	killed := time.Now()
	s.wait(10 * time.Second)
	goesByItself(t, st.Session, check, killed, time.Minute)
}

// In the middle of the way up, too.
func TestKillCulvertWhileItConnects(t *testing.T) {
	check := noTrace(t)
	s := start(t, "connect", "-n", namespace, "-v", "--grace=15s")
	eventually(t, patience, "the pod is waited for", func() error {
		if !strings.Contains(s.talk.String(), "… waiting for the shadow pod") {
			return errors.New(s.talk.String())
		}
		return nil
	})
	session := theSession(t)
	laptop(t, "sh", "-c", "kill -9 $(pgrep -f '[c]ulvert connect')")
	killed := time.Now()
	s.wait(10 * time.Second)
	goesByItself(t, session, check, killed, 15*time.Second)
}

// The child of root is killed: the session ends, and says why.
func TestKillPrivilegedChild(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	laptop(t, "sh", "-c", "kill -9 $(pgrep -f '[c]ulvert privileged')")
	if code := s.wait(patience); code != 1 {
		t.Errorf("ended with %d, want 1", code)
	}
	if !strings.Contains(s.talk.String(), "culvert: error: privileged child") {
		t.Errorf("said:\n%s", s.talk.String())
	}
	check(30 * time.Second)
}

func reachable(host string) func() error {
	return func() error {
		out, talk, err := try("curl", "-sS", "--max-time", "3", "http://"+host+"/")
		if err != nil {
			return fmt.Errorf("%w: %s", err, talk)
		}
		if !strings.Contains(out, `"pod"`) {
			return errors.New(out)
		}
		return nil
	}
}

// The pod is replaced; the session goes on over a new wire.
func TestKillShadowPod(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	before := theStatus(t)
	kubectl(t, "delete", "pod", "-n", namespace, before.Shadow.Pod, "--now")
	eventually(t, patience, "the wire is open again", func() error {
		if st := theStatus(t); st.Wire.Reopened == 0 || !st.Wire.Up || st.Shadow.Pod == before.Shadow.Pod {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	eventually(t, 10*time.Second, "web answers", reachable("web.shop"))
	s.stop()
	check(30 * time.Second)
}

// Everything of the session is removed under its feet, as by a hasty admin or
// by its own shadow after a long sleep: it makes another.
func TestSessionIsRemoved(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	kubectl(t, "delete", "lease", "-n", namespace, "culvert-"+theStatus(t).Session)
	eventually(t, patience, "the wire is open again", func() error {
		if st := theStatus(t); st.Wire.Reopened == 0 || !st.Wire.Up {
			return fmt.Errorf("%+v", st.Wire)
		}
		return nil
	})
	eventually(t, 10*time.Second, "web answers", reachable("web.shop"))
	s.stop()
	check(30 * time.Second)
}

func cluster(t *testing.T, args ...string) {
	t.Helper()
	if out, err := clusterCommand(args...).CombinedOutput(); err != nil {
		t.Fatalf("cluster %v: %v\n%s", args, err, out)
	}
}

// After a short cut another wire is open at once, if the first is not heard before
// that; after a long one there is a new shadow, too, if that one gave up.
func TestNetworkCut(t *testing.T) {
	for _, cut := range []time.Duration{7 * time.Second, 60 * time.Second} {
		t.Run(cut.String(), func(t *testing.T) {
			check := noTrace(t)
			s := connect(t, "--grace=30s")
			t.Cleanup(func() { cluster(t, "heal", laptopHost) })
			cluster(t, "cut", laptopHost)
			time.Sleep(cut)
			if out := laptop(t, "ip", "route"); !strings.Contains(out, "culvert0") {
				t.Errorf("the routes went with the network:\n%s", out)
			}
			cluster(t, "heal", laptopHost)
			healed, limit := time.Now(), patience
			if cut < 10*time.Second {
				limit = backAgain
			}
			eventually(t, limit, "web answers again", reachable("web.shop"))
			t.Logf("web answers %v after a cut of %v: %+v", tenths(time.Since(healed)), cut, theStatus(t).Wire)
			s.stop()
			check(30 * time.Second)
		})
	}
}

func TestAPIServerRestart(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	exclusively(t, func() {
		cluster(t, "restart-apiserver")
		eventually(t, patience, "web answers again", reachable("web.shop"))
		eventually(t, patience, "names are followed again", func() error {
			_, _, err := try("kubectl", "create", "service", "clusterip", "-n", namespace, "after-restart", "--tcp=80")
			return err
		})
	})
	t.Cleanup(func() { try("kubectl", "delete", "svc", "-n", namespace, "after-restart") })
	eventually(t, 30*time.Second, "a Service made afterwards resolves", func() error {
		_, _, err := try("getent", "hosts", "after-restart.shop")
		return err
	})
	kubectl(t, "delete", "svc", "-n", namespace, "after-restart")
	s.stop()
	check(60 * time.Second)
}
