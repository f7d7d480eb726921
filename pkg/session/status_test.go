package session

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// aCourse is one that only tells its status.
func aCourse(t *testing.T, session string) (c *course, stop func() error) {
	t.Helper()
	all := newCourse(nil, slog.New(slog.DiscardHandler))
	c = &all
	l, err := listenStatus(session)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	status := Status{Session: session, PID: os.Getpid(), Since: c.since}
	go func() { done <- c.serveStatus(ctx, l, func() Status { return status }) }()
	return c, func() error { cancel(); return <-done }
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
