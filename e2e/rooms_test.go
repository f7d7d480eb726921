package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The rooms that talk to Kubernetes bring tests of their own for a real API
// server, which only the laptop reaches. They run in its network namespace and
// in this machine's file system, for they build and load an image.
func TestRoomsOnTheCluster(t *testing.T) {
	for _, room := range []string{"pkg/kube", "pkg/kube/heal"} {
		t.Run(room, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "room.test")
			build := exec.Command("go", "test", "-c", "-o", program, "./"+room)
			build.Dir = root
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			run := exec.Command("nsenter", "--net=/run/netns/culvert-laptop", program, "-test.v", "-test.run", "TestReal|TestLive", "-test.timeout", "10m")
			run.Dir = filepath.Join(root, room)
			run.Env = append(os.Environ(), "CULVERT_E2E_KUBECONFIG="+kubeconfig, "CULVERT_E2E_RESTART="+clusterBin+" restart-apiserver")
			out, err := run.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if text := string(out); strings.Contains(text, "--- SKIP") || !strings.Contains(text, "--- PASS") {
				t.Errorf("tests were skipped:\n%s", text)
			}
		})
	}
}
