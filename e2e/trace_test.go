package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"
)

// dumpLaptop is all that culvert may change on the laptop.
func dumpLaptop(t testing.TB) string {
	t.Helper()
	return laptop(t, "sh", "-c", `
		ip -d addr | sed 's/valid_lft .*//'; ip route show table all; ip -6 route show table all; ip rule; ip -6 rule
		ls -l --time-style=+ /etc/resolv.conf*; cat /etc/resolv.conf
		ss -Hlntu; ls -d /run/* "$TMPDIR"/*culvert* 2>/dev/null | grep -v '^/run/mount$\|^/run/wireguard$' # of mount(8), and of the other half's wg-quick
		 iptables-save | grep -v '^#'; ps -eo args= | grep -c '[c]ulvert connect\|[c]ulvert privileged'; true`)
}

const kinds = "all,cm,secret,sa,role,rolebinding,lease,networkpolicy,endpointslice,pdb,pvc,ingress"

// watched are the namespaces that are compared; tests with a namespace of their
// own look at that by themselves, and so does the other half of the tests.
var watched = map[string][]string{
	shop: {"default", "kube-public", "kube-system", shop, "other"},
	mall: {mall},
}[namespace]

// dumpCluster is every object of the watched namespaces, less what changes by itself
// and what belongs to the dead: see goesByItself.
func dumpCluster(t testing.TB) string {
	t.Helper()
	out := kubectl(t, "get", kinds, "-A", "-o", "json")
	var list struct{ Items []map[string]any }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, o := range list.Items {
		meta := o["metadata"].(map[string]any)
		for _, volatile := range []string{"resourceVersion", "managedFields"} {
			delete(meta, volatile)
		}
		labels, _ := meta["labels"].(map[string]any)
		if session, _ := labels[sessionLabel].(string); isDead(session) {
			continue
		}
		if ns, _ := meta["namespace"].(string); !slices.Contains(watched, ns) || o["kind"] == "Lease" && ns == "kube-system" {
			continue
		}
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%v/%v/%v %s", o["kind"], meta["namespace"], meta["name"], b))
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// difference is the lines of a and b that the other has not.
func difference(a, b string) string {
	var out []string
	has := func(s string) map[string]int {
		m := map[string]int{}
		for _, l := range strings.Split(s, "\n") {
			m[l]++
		}
		return m
	}
	inA, inB := has(a), has(b)
	for l, n := range inA {
		if inB[l] < n {
			out = append(out, "- "+l)
		}
	}
	for l, n := range inB {
		if inA[l] < n {
			out = append(out, "+ "+l)
		}
	}
	sort.Strings(out)
	return strings.Join(out, "\n")
}

// noTrace remembers the laptop and the cluster as they are, and returns a check
// that they are, within a while, as they were.
func noTrace(t testing.TB) (check func(within time.Duration)) {
	t.Helper()
	together(t)
	machine, cluster := dumpLaptop(t), dumpCluster(t)
	return func(within time.Duration) {
		t.Helper()
		eventually(t, within, "laptop and cluster as before", func() error {
			if d := difference(machine, dumpLaptop(t)); d != "" {
				return fmt.Errorf("the laptop changed:\n%s", d)
			}
			if d := difference(cluster, dumpCluster(t)); d != "" {
				return fmt.Errorf("the cluster changed:\n%s", d)
			}
			return nil
		})
	}
}
