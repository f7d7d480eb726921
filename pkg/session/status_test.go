package session

import (
	"context"
	"log/slog"
	"os"
	"reflect"
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
	if _, err := askStatus(context.Background(), "@"+statusPrefix+"test-t1"); err == nil {
		t.Error("an ended session still answers")
	}
}

func TestParseUnixTable(t *testing.T) {
	table := []byte(`Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 18403 @culvert/ab12
0000000000000000: 00000003 00000000 00000000 0001 03 18404 @culvert/ab12
0000000000000000: 00000002 00000000 00010000 0001 01 18405 /run/culvert/x
0000000000000000: 00000002 00000000 00010000 0001 01 18406
`)
	if got, want := parseUnixTable(table), []string{"@culvert/ab12"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
