package e2e

import (
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

// The API server is not reached any more from the moment the routes are set, as
// when they lead the wrong way: everything is undone, and the reason is told.
func TestAPIServerLost(t *testing.T) {
	// The first rule makes the table, which then stays.
	for _, do := range []string{"-A", "-D"} {
		laptop(t, "iptables", "-w", do, "OUTPUT", "-p", "tcp", "--dport", "6443", "-j", "DROP")
	}
	check := noTrace(t)
	inside(t, "TestAPIServerLostInside")
	check(30 * time.Second)
}

// TestAPIServerLostInside is the part of TestAPIServerLost that runs on the laptop.
func TestAPIServerLostInside(t *testing.T) {
	if os.Getenv(insideName) == "" {
		return // TestAPIServerLost runs it
	}
	cluster, err := kube.Load(kube.Config{Kubeconfig: kubeconfig, Namespace: namespace, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer cluster.Close()
	r := &breaker{t: t}
	defer r.firewall("-D")
	err = session.NewConnect(session.ConnectConfig{
		TunnelConfig: session.TunnelConfig{Cluster: cluster, FarEnd: session.FarEnd{Image: image, Grace: time.Minute}, Reporter: r, Log: slog.New(slog.DiscardHandler)},
		Stderr:       io.Discard,
	}).Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "with the routes set, the API server was not reached") {
		t.Errorf("connect ended with %v", err)
	}
	if r.took > 5*time.Second {
		t.Errorf("noticed after %v, want 3 s", r.took)
	}
}

// A breaker cuts the way to the API server for the step that sets routes.
type breaker struct {
	t    *testing.T
	cut  time.Time
	took time.Duration
}

func (b *breaker) firewall(do string) {
	if b.cut.IsZero() == (do == "-D") {
		return
	}
	if out, err := exec.Command("iptables", "-w", do, "OUTPUT", "-p", "tcp", "--dport", "6443", "-j", "DROP").CombinedOutput(); err != nil {
		b.t.Errorf("iptables %s: %v: %s", do, err, out)
	}
}

func (b *breaker) Begin(step string) {
	switch {
	case strings.HasPrefix(step, "setting routes"):
		b.firewall("-A")
		b.cut = time.Now()
	case strings.HasPrefix(step, "putting everything back") && !b.cut.IsZero():
		b.took = time.Since(b.cut)
		b.firewall("-D")
		b.cut = time.Time{}
	}
}

func (b *breaker) Asks()           {}
func (b *breaker) Progress(string) {}
func (b *breaker) Done(string)     {}
func (b *breaker) Say(string)      {}
func (b *breaker) Warn(string)     {}
