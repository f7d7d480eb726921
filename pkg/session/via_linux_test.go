package session

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/culvert-dev/culvert/pkg/tun"
)

// TestViaC19: what this machine connects to on the way, the first jump host, is led past
// the tunnel, and known before a route is set.
func TestViaC19(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Skip("no ssh here: ", err)
	}
	dir := t.TempDir()
	config := "Host far\n\tHostName 10.66.0.9\n\tProxyJump hop,10.66.0.6\nHost six\n\tHostName fd00:66::5\nHost hop\n\tHostName 10.66.0.5\n\tProxyJump first\nHost first\n\tHostName 10.66.0.4\n"
	for name, text := range map[string]string{"config": config, "ssh": fmt.Sprintf("#!/bin/sh\nexec %s -F %s/config \"$@\"\n", ssh, dir)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for destination, first := range map[string]string{"far": "10.66.0.4", "hop": "10.66.0.4", "first": "10.66.0.4", "me@10.66.0.77": "10.66.0.77", "six": "fd00:66::5"} {
		v := NewVia(ViaConfig{Destination: destination, Ranges: []netip.Prefix{pfx("10.66.0.0/24"), pfx("fd00:66::/64")}, Reporter: silent{}, Log: slog.New(slog.DiscardHandler)})
		if _, err := v.findRoutes(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, a := range []string{"10.66.0.4", "10.66.0.5", "10.66.0.6", "10.66.0.9", "10.66.0.77", "fd00:66::5"} {
			a := netip.MustParseAddr(a)
			if led := tun.Contains(prefixes(v.routes), a); led != (a.String() != first && (a.Is4() || tun.HasIPv6())) {
				t.Errorf("%s: %v is led into the tunnel: %v", destination, a, led)
			}
		}
	}
}
