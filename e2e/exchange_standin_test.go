package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// named waits until each name below db is answered by whom it should be: names
// of pods lag behind.
func named(t testing.TB, by map[string]string) {
	t.Helper()
	for host, want := range by {
		eventually(t, 60*time.Second, host+" is answered by "+want, func() error {
			o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "5", "-close", "http://"+host+":8080/")
			if o.By[want] != 5 {
				return fmt.Errorf("%+v", o)
			}
			return nil
		})
	}
}

// One pod of a StatefulSet: what comes by its name comes to the laptop, and each
// other pod keeps its own.
func TestStandIn(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	before := map[string]string{"db-0.db": "db-0", "db-1.db": "db-1", at("db-0.db") + ".svc.cluster.local": "db-0"}
	named(t, before)
	pods := podsOfApp(t, "db")
	began, p := time.Now(), startPoll(t, "http://db-0.db:8080/")

	s := exchange(t, "pod/db-0", "--to", "http=8080")
	named(t, map[string]string{"db-0.db": laptopName, "db-1.db": "db-1", at("db-0.db") + ".svc.cluster.local": laptopName})
	for _, host := range []string{"db-0.db", "db-1.db"} { // the Service's other port goes on
		if got := inPod(t, "kit", "dial", "tcp", host+":8081", "hello"); got != "hello" {
			t.Errorf("%s answered %q", host, got)
		}
	}
	if now := podsOfApp(t, "db"); now != pods {
		t.Errorf("pods %s, were %s", now, pods)
	}
	if said := strings.Join(talkOf(s.talk.String(), "! "), "\n"); !strings.Contains(said, "only these ports are reached meanwhile: 8080/tcp, 8081/tcp") {
		t.Errorf("nothing is said of other ports:\n%s", s.talk.String())
	}
	st := theExchange(t, "db")
	if st.Exchange.Target != "pod/db-0" || !strings.HasPrefix(st.Shadow.Pod, "culvert-") {
		t.Errorf("status: %+v", st)
	}
	t.Run("others cannot have another part of it", func(t *testing.T) {
		for _, target := range []string{"pod/db-1", "svc/db"} {
			refused(t, culvert(nil, "exchange", "-n", namespace, target, "--to", "http=18080"), 1, "pod/db-0", st.Owner)
		}
	})
	t.Run("joined, by header", func(t *testing.T) {
		laptopApp(t, "bob", 10000)
		bob := exchange(t, "pod/db-0", "--to", "http=18080", "--header", "x-dev: bob")
		o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "5", "-H", "x-dev: bob", "http://db-0.db:8080/")
		if o.By["bob"] != 5 {
			t.Errorf("%+v", o)
		}
		bob.stop()
	})
	address := kubectl(t, "get", "pod", "-n", namespace, st.Shadow.Pod, "-o", "jsonpath={.status.podIP}")
	leave(t, s, "svc/db")
	if o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "5", "-close", "http://"+address+":8080/"); o.By["db-0"] != 5 {
		t.Errorf("who has the router's address from DNS is answered so: %+v", o)
	}
	if !strings.Contains(s.talk.String(), "but for the router") {
		t.Errorf("nothing is said of the router that stays a while:\n%s", s.talk.String())
	}
	named(t, before)
	check(30 * time.Second)
	o := outageOf(p.after(began), began)
	t.Logf("by name: %v, slowest %v", o.by, o.slowest)
	if o.lost > 0 {
		t.Errorf("%d requests by name were lost: %v", o.lost, o.by)
	}
}

// The laptop dies: its pod is answered for by the original, and after the grace
// time all is as before.
func TestStandInDies(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	s := exchange(t, "pod/db-1", "--to", "http=8080", shortGrace)
	session := routerOf(t, "db")
	named(t, map[string]string{"db-0.db": "db-0", "db-1.db": laptopName})
	at := time.Now()
	kill9(t, theExchange(t, "db").PID)
	s.wait(10 * time.Second)
	named(t, map[string]string{"db-1.db": "db-1"})
	t.Logf("the original answers after %v", time.Since(at).Round(100*time.Millisecond))
	if err := nothingOf(session, deathGrace+restore); err != nil {
		t.Error(err)
	}
	named(t, map[string]string{"db-0.db": "db-0", "db-1.db": "db-1"})
	check(30 * time.Second)
}

// A pod with a name of its own, alone behind its Service; and pods without one.
func TestStandInOfOthers(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	s := exchange(t, "pod/solo", "--to", "8080")
	named(t, map[string]string{"named.sub": laptopName, "sub": laptopName})
	s.stop()
	pod, _, _ := strings.Cut(strings.TrimPrefix(podsOfApp(t, "web"), "pod/"), "\n")
	refused(t, culvert(nil, "exchange", "-n", namespace, "pod/"+pod, "--to", "8080"), 1, pod)
	check(30 * time.Second)
}
