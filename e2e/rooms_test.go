package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Tests that restart the API server, or change which addresses it gives.
const restarting = "^(TestRealWatchOutlivesTheServer|TestRealSecondServiceCIDR)$"

// The rooms that talk to Kubernetes bring tests of their own for a real API
// server. They run in the network namespace of the router, which is outside of
// the cluster too and lets the laptop be, and in this machine's file system, for
// they build and load an image.
func TestRoomsOnTheCluster(t *testing.T) {
	dir := t.TempDir()
	for _, room := range []string{"pkg/kube", "pkg/kube/heal"} {
		build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, room+".test"), "./"+room)
		build.Dir = root
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	run := func(t *testing.T, room string, args ...string) {
		t.Helper()
		program := append([]string{"--net=/run/netns/culvert-router", filepath.Join(dir, room+".test"), "-test.v", "-test.timeout=10m"}, args...)
		c := exec.Command("nsenter", program...)
		c.Dir = filepath.Join(root, room)
		c.Env = append(os.Environ(), "CULVERT_E2E_KUBECONFIG="+kubeconfig, "CULVERT_E2E_RESTART="+clusterBin+" restart-apiserver")
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if text := string(out); strings.Contains(text, "--- SKIP") || !strings.Contains(text, "--- PASS") {
			t.Errorf("tests were skipped:\n%s", text)
		}
	}
	t.Run("restart", func(t *testing.T) {
		exclusively(t, func() { run(t, "pkg/kube", "-test.run="+restarting) })
	})
	apart(t)
	t.Parallel() // from here on nobody else is disturbed, nor is this by others' load
	for _, room := range []string{"pkg/kube", "pkg/kube/heal"} {
		t.Run(room, func(t *testing.T) { run(t, room, "-test.run=TestReal|TestLive", "-test.skip="+restarting) })
	}
}
