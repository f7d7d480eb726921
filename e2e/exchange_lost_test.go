package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// standAside is until the original answers though its router is lost; the cluster
// needs most of a minute to notice a lost node.
const standAside = 20 * time.Second

// A router that nothing reaches, as when its node is lost, is left by the laptop,
// which comes back when the router does.
func TestExchangeRouterLost(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	s := exchange(t, "svc/app", "--to", "http=8080")
	p := startPoll(t, "http://"+serviceIP(t, "app")+"/")
	if err := p.steadily(laptopName, time.Now(), 20*time.Second); err != nil {
		t.Fatal(err)
	}
	heal := cutPod(t, theExchange(t, "app").Shadow.Pod)
	at := time.Now()
	eventually(t, standAside, "the original answers", func() error {
		if seen := summary(p.after(at)); seen["original"] == 0 {
			return fmt.Errorf("%v", seen)
		}
		return nil
	})
	t.Logf("the original answers after %v", time.Since(at).Round(100*time.Millisecond))
	s.says("the router does not answer")
	if err := p.steadily("original", time.Now(), 20*time.Second); err != nil { // who asked before waits for a while
		t.Error(err)
	}
	heal()
	if err := p.steadily(laptopName, time.Now(), 30*time.Second); err != nil {
		t.Error(err)
	}
	s.stop()
	check(30 * time.Second)
}

// cutPod lets nothing reach a pod, or leave it.
func cutPod(t testing.TB, pod string) (heal func()) {
	t.Helper()
	id := kubectl(t, "get", "pod", "-n", namespace, pod, "-o", "jsonpath={.spec.nodeName} {.status.containerStatuses[0].containerID}")
	node, container, _ := strings.Cut(id, " containerd://")
	pid, err := taskOf(node, container)
	if err != nil {
		t.Fatal(err)
	}
	inPod := func(rules string) {
		if out, err := on(node, "nsenter", "--target", pid, "--net", "--", "nft", rules).CombinedOutput(); err != nil {
			t.Errorf("nft: %v: %s", err, out)
		}
	}
	inPod("add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }; add chain inet cut out { type filter hook output priority 0; policy drop; }")
	heal = sync.OnceFunc(func() { inPod("delete table inet cut") })
	t.Cleanup(heal)
	return heal
}
