package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// Two sessions on a bare resolv.conf: the last to come is asked, and asks the
// one before. Whichever ends first, and however, the other goes on.
func TestResolvConfTwoSessions(t *testing.T) {
	check := noTrace(t)
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		t.Run(fmt.Sprintf("ended in order %v", order), func(t *testing.T) {
			twoSessions(t, order)
			check(30 * time.Second)
		})
	}
	t.Run("two namespaces", func(t *testing.T) {
		first := connect(t, "-n", "shop")
		second := connect(t, "-n", "other")
		found(t, "web", "redis", "web.shop", "web.other", "intranet")
		if got := laptop(t, "sh", "-c", "getent ahostsv4 web | awk 'NR==1{print $1}'"); got != kubectl(t, "get", "svc", "-n", "other", "web", "-o", "jsonpath={.spec.clusterIP}") {
			t.Errorf("web is %s, not that of the last session", got)
		}
		if err := reachable("web.shop")(); err != nil {
			t.Error(err)
		}
		first.stop()
		if err := errors.Join(reachable("web.shop")(), lookUp("web.shop", "web.other", "intranet")); err != nil {
			t.Errorf("with the second alone: %v", err)
		}
		second.stop()
		check(30 * time.Second)
	})
	for killed, name := range []string{"the first is killed", "the second is killed"} {
		t.Run(name, func(t *testing.T) {
			first := connect(t, "-n", "shop", "--as=one", "--exclude=10.244.0.0/16,fd00:10:244::/56", shortGrace)
			one := theStatus(t)
			second := connect(t, "-n", "other", "--as=two.example", "--exclude=10.96.0.0/16,fd00:10:96::/112", shortGrace)
			both, pids, ids := []*running{first, second}, []int{one.PID, 0}, []string{one.Session, ""}
			for _, st := range statuses(t) {
				if st.Session != one.Session {
					pids[1], ids[1] = st.PID, st.Session
				}
			}
			names := [][]string{{"web.one", "web.shop.one", "web.other.svc.one"}, {"web.two.example", "web.shop.two.example", "web.other.two.example"}}
			found(t, append(names[0], names[1]...)...)
			laptop(t, "sh", "-c", fmt.Sprintf("kill -9 $(pgrep -P %d) %[1]d", pids[killed]))
			at := time.Now()
			both[killed].wait(10 * time.Second)
			left := 1 - killed
			eventually(t, 5*time.Second, "the other is asked", func() error { return lookUp(append(names[left], "intranet.corp.example")...) })
			if err := lookUp(names[killed][0]); err == nil {
				t.Errorf("%s is found without its session", names[killed][0])
			}
			both[left].stop()
			goesByItself(t, ids[killed], check, at, 15*time.Second)
		})
	}
}

// lookUp asks as any program does.
func lookUp(names ...string) error {
	for _, name := range names {
		if out, talk, err := try("getent", "ahosts", name); err != nil {
			return fmt.Errorf("%s: %w %s %s", name, err, out, talk)
		}
	}
	return nil
}

func found(t *testing.T, names ...string) {
	t.Helper()
	if err := lookUp(names...); err != nil {
		t.Error(err)
	}
}

// What a DHCP client writes meanwhile is used at once, and is there afterwards.
func TestResolvConfB13Rewritten(t *testing.T) {
	for name, write := range map[string]string{
		"by rename": "cat >/etc/resolv.conf.dhcp; mv /etc/resolv.conf.dhcp /etc/resolv.conf",
		"in place":  "cat >/etc/resolv.conf",
		"anew":      "rm /etc/resolv.conf; cat >/etc/resolv.conf",
	} {
		t.Run(name, func(t *testing.T) {
			before := laptop(t, "cat", "/etc/resolv.conf") + "\n"
			check := noTrace(t)
			s := connect(t)
			hotel := strings.ReplaceAll(before, "search corp.example", "search hotel.example corp.example")
			rewrite := func(text string) { laptop(t, "sh", "-ec", "printf %s '"+text+"' | ("+write+")") }
			rewrite(hotel)
			eventually(t, 2*time.Second, "the cluster's names are found over theirs", func() error {
				conf := laptop(t, "cat", "/etc/resolv.conf")
				if !strings.HasPrefix(conf, "# written by culvert for") || !strings.Contains(conf, " hotel.example corp.example") {
					return errors.New(conf)
				}
				return lookUp("web.shop", "web", "intranet.corp.example", "intranet")
			})
			rewrite(strings.ReplaceAll(hotel, "172.31.0.1", "172.31.0.77")) // nobody answers there
			eventually(t, 5*time.Second, "names elsewhere are asked of theirs", func() error {
				if lookUp("www.example.com") == nil {
					return errors.New("of another")
				}
				return nil
			})
			found(t, "web.shop.svc.cluster.local") // that does not depend on it
			rewrite(before)
			s.stop()
			if got := laptop(t, "cat", "/etc/resolv.conf") + "\n"; got != before {
				t.Errorf("left %s", got)
			}
			check(30 * time.Second)
		})
	}
}

// Who writes at every turn is left to it, and the person is told.
func TestResolvConfB13Fight(t *testing.T) {
	before := laptop(t, "cat", "/etc/resolv.conf") + "\n"
	check := noTrace(t)
	s := connect(t)
	for range 6 {
		eventually(t, 5*time.Second, "ours is on top", func() error {
			if conf := laptop(t, "cat", "/etc/resolv.conf"); !strings.HasPrefix(conf, "# written by culvert for") {
				return errors.New(conf)
			}
			return nil
		})
		laptop(t, "sh", "-ec", "printf %s '"+before+"' >/etc/resolv.conf")
	}
	eventually(t, 5*time.Second, "it is said", func() error {
		if talk := s.talk.String(); !strings.Contains(talk, "again and again") {
			return errors.New(talk)
		}
		return nil
	})
	st := theStatus(t)
	if table := laptop(t, culvertBin, "status"); !st.DNS.Passed || !strings.Contains(table, "not found: something else writes") {
		t.Errorf("status: %+v\n%s", st.DNS, table)
	}
	if err := lookUp("intranet.corp.example"); err != nil {
		t.Error(err)
	}
	if got := laptop(t, "dig", "+short", "@"+st.DNS.Server, at("web")); got != serviceIP(t, "web") {
		t.Errorf("asked itself: %q", got)
	}
	s.stop()
	check(30 * time.Second)
}
