package cli

import (
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// localhost is what this machine has of it.
func TestLocalhost(t *testing.T) {
	resolvertest.InMachine(t, func(t *testing.T) {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for off, want := range map[string][]string{"0": {"127.0.0.1", "::1", "10.0.0.7"}, "1": {"127.0.0.1", "10.0.0.7"}} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte(off), 0); err != nil {
				t.Fatal(err)
			}
			if got, err := listenAddresses([]string{"localhost", "10.0.0.7"}); err != nil || !slices.Equal(got, want) {
				t.Errorf("disable_ipv6 %s: %v, %v, want %v", off, got, err, want)
			}
		}
	})
}
