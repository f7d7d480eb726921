package e2e

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

const (
	cycles     = 50
	insideName = "CULVERT_E2E_INSIDE"
)

// Fifty times in and out within one process, on the laptop, and nothing adds up:
// no goroutine, no descriptor, no route, no object.
func Test16Cycles(t *testing.T) {
	t.Parallel() // with the rooms' tests, which do without the laptop
	check := noTrace(t)
	apart(t) // the other half need not wait for all of them, and has restarted the API server long before
	inside(t, "Test16CyclesInside")
	check(30 * time.Second)
}

// inside runs a test of this package on the laptop.
func inside(t *testing.T, name string) {
	t.Helper()
	c := on(laptopHost, must(os.Executable()), "-test.run=^"+name+"$", "-test.v")
	c.Env = append(c.Env, insideName+"=1")
	if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+name) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// Test16CyclesInside is the part of Test16Cycles that runs on the laptop.
func Test16CyclesInside(t *testing.T) {
	if os.Getenv(insideName) == "" {
		return // Test16Cycles runs it
	}
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	cycle(t) // what is made once, and kept
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range cycles {
		cycle(t)
	}
	eventually(t, 10*time.Second, "goroutines and descriptors as after the first time", func() error {
		if g, f := runtime.NumGoroutine(), openFiles(t); g > goroutines || f > files {
			stacks := make([]byte, 1<<20)
			return fmt.Errorf("%d goroutines, were %d; %d descriptors, were %d\n%s", g, goroutines, f, files, stacks[:runtime.Stack(stacks, true)])
		}
		return nil
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// fetch reads a page over a connection of its own.
func fetch(t *testing.T, url string) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// cycle connects, reaches a Service by its name, and goes.
func cycle(t *testing.T) {
	t.Helper()
	cluster, err := kube.Load(kube.Config{Kubeconfig: kubeconfig, Namespace: namespace, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer cluster.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	up := make(chan struct{})
	ended := make(chan error, 1)
	connect := session.NewConnect(session.ConnectConfig{
		TunnelConfig: session.TunnelConfig{
			Cluster: cluster, FarEnd: session.FarEnd{Image: image, Grace: time.Minute},
			Reporter: &upReporter{up: up}, Log: slog.New(slog.DiscardHandler),
		},
		Stderr: os.Stderr,
	})
	go func() { ended <- connect.Run(ctx) }()
	select {
	case <-up:
	case err := <-ended:
		t.Fatalf("connect ended: %v", err)
	case <-time.After(patience):
		t.Error("not connected")
	}
	if page := fetch(t, "http://web.shop/"); !strings.Contains(page, `"pod"`) {
		t.Errorf("web.shop: %s", page)
	}
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// upReporter waits for the last step.
type upReporter struct{ up chan struct{} }

func (r *upReporter) Begin(string)    {}
func (r *upReporter) Asks()           {}
func (r *upReporter) Progress(string) {}
func (r *upReporter) Say(string)      {}
func (r *upReporter) Warn(string)     {}
func (r *upReporter) Done(result string) {
	if strings.HasPrefix(result, connectedLine) {
		close(r.up)
	}
}
