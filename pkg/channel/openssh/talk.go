package openssh

import (
	"bytes"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"
)

// A talk is what ssh says on its standard error. Until the wire is open it is for a
// person: at once, as with "touch your key", unless it turns out to be ssh's last word.
type talk struct {
	say func(line string)
	log *slog.Logger

	mu      sync.Mutex
	part    []byte   // of a line
	held    []string // not told yet
	all     []string // the last of them
	settled bool     // it is for the log only
	tell    *time.Timer
}

const (
	holdFor = 300 * time.Millisecond // a last word is followed by the end
	keepAll = 50
)

func newTalk(cfg Config) *talk {
	t := &talk{say: cfg.Say, log: cfg.Log}
	if t.say == nil {
		t.say = func(string) {}
	}
	t.tell = time.AfterFunc(time.Hour, t.flush)
	return t
}

func (t *talk) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.part = append(t.part, p...)
	for {
		line, rest, whole := bytes.Cut(t.part, []byte("\n"))
		if !whole {
			return len(p), nil
		}
		t.part = bytes.Clone(rest)
		t.add(strings.TrimRight(string(line), "\r "))
	}
}

// add notes a line; mu is held.
func (t *talk) add(line string) {
	if line == "" {
		return
	}
	t.all = append(t.all, line)
	t.all = t.all[max(0, len(t.all)-keepAll):]
	if t.settled {
		t.log.Debug("ssh", "text", line)
		return
	}
	t.held = append(t.held, line)
	t.tell.Reset(holdFor)
}

// flush tells what is held.
func (t *talk) flush() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, line := range t.held {
		t.say(line)
	}
	t.held = nil
}

// settle tells what is held, and no more from now on.
func (t *talk) settle() {
	t.tell.Stop()
	t.flush()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.settled, t.all = true, nil
}

// Of ssh(1): what trying again does not change. A jump host says it, too, and then it
// is not the last word.
var refusal = regexp.MustCompile(`Permission denied \(|Host key verification failed|Too many authentication failures|Bad configuration option|Bad owner or permissions`)

func (t *talk) refused() bool { return t.telling() >= 0 }

// telling is the place of the line that says it, in all, -1 without one.
func (t *talk) telling() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := len(t.all) - 1; i >= 0; i-- {
		if refusal.MatchString(t.all[i]) {
			return i
		}
	}
	return -1
}

// last is ssh's last word, "" without one.
func (t *talk) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) == 0 {
		return ""
	}
	return words(t.all[len(t.all)-1])
}

// conclude is the line that tells most, which is not told again.
func (t *talk) conclude() string {
	i := t.telling()
	t.mu.Lock()
	defer t.mu.Unlock()
	if i < 0 {
		i = len(t.all) - 1
	}
	for n, line := range t.held {
		if line == t.all[i] {
			t.held = append(t.held[:n:n], t.held[n+1:]...)
			break
		}
	}
	return words(t.all[i])
}

func words(line string) string {
	return strings.TrimSuffix(strings.TrimPrefix(line, "ssh: "), ".")
}
