package session

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestStatusOfRunningSessions(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithCancel(context.Background())
	want := Status{Session: "t1", PID: os.Getpid(), Since: time.Now().UTC().Truncate(time.Second)}
	l, err := listenStatus("test-" + want.Session)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- serveStatus(ctx, l, slog.New(slog.DiscardHandler), func() Status { return want }) }()
	all, err := Statuses(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var found bool
	for _, s := range all {
		found = found || s.Session == "t1" && s.Since.Equal(want.Since)
	}
	if !found {
		t.Errorf("%+v is not among %+v", want, all)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if all, err := Statuses(context.Background()); err != nil || len(all) > 0 {
		t.Errorf("an ended session still answers: %v, %v", all, err)
	}
}
