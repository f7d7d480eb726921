package session

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// aCourse is one that only tells its status.
func aCourse(t *testing.T, session string) (c *course, stop func() error) {
	t.Helper()
	all := newCourse(nil, slog.New(slog.DiscardHandler))
	c = &all
	return c, telling(t, c, func() Status { return Status{Session: session, PID: os.Getpid(), Since: c.since} })
}

// telling has a course tell what its status is now.
func telling(t *testing.T, c *course, now func() Status) (stop func() error) {
	t.Helper()
	session := now().Session
	l, err := listenStatus(session)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.serveStatus(ctx, l, now) }()
	return func() error { cancel(); return <-done }
}

// Another session's device is not in the way of one to the same cluster, also while that
// session is too busy to answer; that of a run is in no network of this machine's.
func TestBeside(t *testing.T) {
	defer goleak.VerifyNone(t)
	const server = "https://203.0.113.7:6443"
	busy := make(chan struct{})
	close(busy)
	var mu sync.Mutex
	for kind, device := range map[string]string{KindConnect: "culvert7", "run": "culvert8"} {
		c, session := newCourse(nil, slog.New(slog.DiscardHandler)), "test-beside-"+kind
		stop := telling(t, &c, func() Status {
			mu.Lock()
			wait := busy
			mu.Unlock()
			<-wait
			return Status{Kind: kind, Session: session, Server: server, Namespace: "shop", Device: &DeviceStatus{Name: device}}
		})
		defer func() {
			if err := stop(); err != nil {
				t.Error(err)
			}
		}()
	}
	c := &Connect{tunnel: &tunnel{}, cfg: ConnectConfig{TunnelConfig: TunnelConfig{Cluster: &kube.Cluster{Server: server, Namespace: "mall"}}}}
	c.log = slog.New(slog.DiscardHandler)
	for _, when := range []string{"at first", "busy", "free again"} {
		if got := c.beside(t.Context()); !slices.Equal(got, []string{"culvert7"}) {
			t.Errorf("%s: %v", when, got)
		}
		mu.Lock()
		if when == "at first" {
			busy = make(chan struct{})
		} else if when == "busy" {
			close(busy)
		}
		mu.Unlock()
	}
}

func TestStatusOfRunningSessions(t *testing.T) {
	defer goleak.VerifyNone(t)
	c, stop := aCourse(t, "test-t1")
	all, err := Statuses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(all, func(s Status) bool { return s.Session == "test-t1" && s.Since.Equal(c.since) }) {
		t.Errorf("it is not among %+v", all)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if all, err := Statuses(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("an ended session still answers: %v, %v", all, err)
	}
}

// TestLeave: who asks a session to leave hears how it ended.
func TestLeave(t *testing.T) {
	defer goleak.VerifyNone(t)
	for name, result := range map[string]error{
		"test-well": nil, "test-badly": errors.New("the lamp is on"),
		"test-lingers": &kube.LingerError{Pod: "web-0", Err: errors.New("it goes on")},
	} {
		c, stop := aCourse(t, name)
		go func() {
			<-c.asked
			c.result = result
			close(c.over)
		}()
		all, err := Statuses(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		left, err := Leave(t.Context(), slices.DeleteFunc(all, func(s Status) bool { return s.Session != name }))
		if want := map[bool]int{true: 1}[result == nil]; len(left) != want {
			t.Errorf("%s: %d sessions left", name, len(left))
		}
		if (err == nil) != (result == nil) || result != nil && !(errors.Is(err, ErrLeft) && strings.Contains(err.Error(), result.Error())) {
			t.Errorf("%s: %v", name, err)
		}
		var lingers *kube.LingerError
		if errors.As(err, &lingers) != errors.As(result, new(*kube.LingerError)) || lingers != nil && lingers.Pod != "web-0" {
			t.Errorf("%s: %v", name, err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
}
