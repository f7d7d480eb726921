package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// The wire goes past the API server where there is such a way, comes back when that
// is lost, and nothing is left of it.
func TestEndpoint(t *testing.T) {
	for _, do := range []string{"-A", "-D"} { // the first rule makes the table, which then stays
		laptop(t, "iptables", "-w", do, "OUTPUT", "-p", "tcp", "--dport", "1", "-j", "DROP")
	}
	check := noTrace(t)
	s := connect(t, "--endpoint", "auto")
	endpoint := func() error {
		if w := theStatus(t).Wire; !w.Up || !strings.HasPrefix(w.Way, "endpoint ") {
			return fmt.Errorf("%+v", w)
		}
		return nil
	}
	eventually(t, 60*time.Second, "the wire goes past the API server", endpoint)
	if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web.shop: %s", page)
	}
	postMany(t)
	s.says("the wire goes past the API server now")
	_, port, _ := strings.Cut(theStatus(t).Wire.Way, ":")
	rule := []string{"OUTPUT", "-p", "tcp", "--dport", port, "-j", "DROP"}
	laptop(t, append([]string{"iptables", "-w", "-A"}, rule...)...)
	cut := time.Now()
	t.Cleanup(func() { _, _, _ = try(append([]string{"iptables", "-w", "-D"}, rule...)...) })
	if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web.shop: %s", page)
	}
	if took := time.Since(cut); took > 8*time.Second {
		t.Errorf("a request took %v when the direct way was lost", took)
	}
	if w := theStatus(t).Wire; w.Way != "pods/proxy" {
		t.Errorf("%+v", w)
	}
	laptop(t, append([]string{"iptables", "-w", "-D"}, rule...)...)
	eventually(t, 150*time.Second, "the wire goes past the API server again", endpoint)
	s.stop()
	check(30 * time.Second)
}
