package kube

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"
)

func TestHolderRoundTrip(t *testing.T) {
	for _, h := range []Holder{
		{User: "jane", Host: "laptop", Machine: "0123456789abcdef", PID: 42, Start: 4711},
		{User: "jane", Host: "laptop", PID: 42},
		Self(),
	} {
		if got := parseHolder(h.String()); got != h {
			t.Errorf("%q: %+v", h.String(), got)
		}
	}
	for text, owner := range map[string]string{
		"jane@laptop": "jane@laptop", "": "@", "x": "x@", "a@b/zz/1/2": "a@b/zz/1/2", "a@b/ab/-1/2": "a@b/ab/-1/2",
	} {
		h := parseHolder(text)
		if h.Machine != "" || h.PID != 0 || h.Owner() != owner {
			t.Errorf("%q: %+v", text, h)
		}
	}
	if got := word("a b/c@d"); got != "a-b-c-d" {
		t.Error(got)
	}
}

func TestJudgeHere(t *testing.T) {
	self := Holder{User: "jane", Host: "laptop", Machine: "m1", PID: 10, Start: 100}
	runs := func(start uint64, err error) func(int) (uint64, error) {
		return func(int) (uint64, error) { return start, err }
	}
	gone := &os.PathError{Op: "open", Path: "/proc/7/stat", Err: fs.ErrNotExist}
	tests := []struct {
		name   string
		holder Holder
		start  func(int) (uint64, error)
		want   verdict
	}{
		{"runs", Holder{Machine: "m1", PID: 7, Start: 70}, runs(70, nil), living},
		{"ended", Holder{Machine: "m1", PID: 7, Start: 70}, runs(0, gone), dead},
		{"id taken over", Holder{Machine: "m1", PID: 7, Start: 70}, runs(71, nil), dead},
		{"not to be seen", Holder{Machine: "m1", PID: 7, Start: 70}, runs(0, errors.New("hidden")), unknown},
		{"no start known", Holder{Machine: "m1", PID: 7}, runs(70, nil), unknown},
		{"other machine, boot or container", Holder{Machine: "m2", PID: 7, Start: 70}, runs(0, gone), unknown},
		{"machine not known", Holder{PID: 7, Start: 70}, runs(0, gone), unknown},
		{"no process", Holder{Machine: "m1", Start: 70}, runs(0, gone), unknown},
		{"same user and host are not enough", Holder{User: "jane", Host: "laptop"}, runs(0, gone), unknown},
	}
	for _, test := range tests {
		if got := judgeHere(test.holder, self, test.start); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
	if got := judgeHere(Holder{PID: 7, Start: 70}, Holder{PID: 10, Start: 1}, runs(0, gone)); got != unknown {
		t.Errorf("two machines without an identity: %s", got)
	}
}

// The real system tells about real processes.
func TestProcessStart(t *testing.T) {
	if runtime.GOOS != "linux" && runtime.GOOS != "darwin" {
		t.Skip("start times are not known on " + runtime.GOOS)
	}
	self := Self()
	if got := judgeHere(self, self, processStart); got != living {
		t.Errorf("this process is %s", got)
	}
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	h := self
	h.PID = child.Process.Pid
	var err error
	if h.Start, err = processStart(h.PID); err != nil {
		t.Fatal(err)
	}
	if got := judgeHere(h, self, processStart); got != living {
		t.Errorf("the child is %s", got)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // it was killed
	if got := judgeHere(h, self, processStart); got != dead {
		t.Errorf("the killed child is %s", got)
	}
}

func TestWatched(t *testing.T) {
	start := time.Unix(1000, 0)
	w := watched{mark: "7", since: start, lasts: time.Minute}
	for _, test := range []struct {
		mark  string
		after time.Duration
		want  verdict
	}{
		{"7", 0, unknown}, {"7", 59 * time.Second, unknown}, {"7", time.Minute, dead},
		{"8", time.Second, living}, {"8", 2 * time.Minute, living},
	} {
		if got := w.see(test.mark, start.Add(test.after)); got != test.want {
			t.Errorf("%s after %v: %s, want %s", test.mark, test.after, got, test.want)
		}
	}
}
