package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/release"
)

// A yard is hosts, each a folder and the host's side of a deploy for it.
type yard struct {
	t        *testing.T
	dir      string
	settings Settings
	hosts    []Host
	wait     time.Duration
	now      func() time.Time

	mu     sync.Mutex
	down   map[string]bool
	wires  map[string]net.Conn // the last of each host, our end
	events []Event
	tell   func(Event)

	through func(net.Conn) io.ReadWriteCloser // what our end goes through; nil: nothing

	serving sync.WaitGroup // the hosts' sides
}

// works is what fails where the page is not good, but for hosts whose name is in a file.
const works = `grep -q good "$CULVERT_TO/current/page" || grep -q "^$(basename "$CULVERT_TO")$" "$CULVERT_TO/../patient"`

// newYard has hosts where a release that does not work fails at once, when it is started.
func newYard(t *testing.T, hosts int, edit ...func(*Settings)) *yard {
	t.Helper()
	known := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, known) })
	y := &yard{t: t, dir: t.TempDir(), down: map[string]bool{}, wires: map[string]net.Conn{}}
	y.settings = Settings{Restart: "cmd " + works, Hooks: Hooks{PostRelease: `echo "$CULVERT_RELEASE" >> "$CULVERT_TO/switches"`}}
	for _, e := range edit {
		e(&y.settings)
	}
	for i := range hosts {
		h := Host{Name: fmt.Sprintf("h%d", i+1), Role: "web"}
		y.hosts = append(y.hosts, h)
		if err := os.Mkdir(filepath.Join(y.dir, h.Name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, y.dir, map[string]string{"patient": ""})
	return y
}

func (y *yard) dial(_ context.Context, h Host) (io.ReadWriteCloser, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.down[h.Name] {
		return nil, errors.New("no route to host")
	}
	ours, theirs := net.Pipe()
	y.wires[h.Name] = ours
	policy := &release.Policy{App: "shop", To: filepath.Join(y.dir, h.Name), Shared: []string{"*"}, Restart: []string{"*"}, Drain: []string{"*"}, Health: []string{"*"}, Hooks: []string{"*"}, Exec: []string{"*"}}
	y.serving.Go(func() { _ = release.Serve(context.Background(), theirs, release.Options{App: "shop", Policy: policy}) })
	if y.through != nil {
		return y.through(ours), nil
	}
	return ours, nil
}

func (y *yard) config() Config {
	return Config{Now: y.now, App: "shop", Env: "prod", Settings: y.settings.complete(), Hosts: y.hosts, Who: "me", Wait: y.wait, Dial: y.dial, Tell: func(e Event) {
		y.mu.Lock()
		y.events = append(y.events, e)
		tell := y.tell
		y.mu.Unlock()
		if tell != nil {
			tell(e)
		}
	}}
}

// tree is one that has a page.
func (y *yard) tree(page string) *Tree {
	y.t.Helper()
	dir := y.t.TempDir()
	write(y.t, dir, map[string]string{"page": page, "other": "the same in all"})
	return read(y.t, dir)
}

// open reaches all hosts; when the test is over all of them have come to their end.
func (y *yard) open(ctx context.Context) (*Rollout, error) {
	y.t.Helper()
	r, err := Open(ctx, y.config())
	y.t.Cleanup(func() {
		_ = r.Close()
		y.serving.Wait()
	})
	return r, err
}

func (y *yard) deploy(ctx context.Context, page, commit string) (*Report, error) {
	y.t.Helper()
	r, err := y.open(ctx)
	if err != nil {
		return r.Report("deploy", err), err
	}
	defer r.Close()
	tree := y.tree(page)
	return r.Deploy(ctx, tree, r.Draft(tree, commit))
}

func (y *yard) must(page, commit string) *Report {
	y.t.Helper()
	report, err := y.deploy(y.t.Context(), page, commit)
	if err != nil {
		y.t.Fatal(err)
	}
	return report
}

// pages are what hosts show now; - where there is none.
func (y *yard) pages() string {
	var all []string
	for _, h := range y.hosts {
		text, err := os.ReadFile(filepath.Join(y.dir, h.Name, "current", "page"))
		if err != nil {
			text = []byte("-")
		}
		all = append(all, string(text))
	}
	return strings.Join(all, " ")
}

func states(report *Report) string {
	var all []string
	for _, h := range report.Hosts {
		all = append(all, h.State)
	}
	return strings.Join(all, " ")
}

// switches are how often a host has switched.
func (y *yard) switches(host string) int {
	text, _ := os.ReadFile(filepath.Join(y.dir, host, "switches"))
	return bytes.Count(text, []byte("\n"))
}

func (y *yard) is(what, got, want string) {
	y.t.Helper()
	if got != want {
		y.t.Errorf("%s: %s, want %s", what, got, want)
	}
}

func TestDeploy(t *testing.T) {
	y := newYard(t, 3)
	y.now = func() time.Time { return time.Date(2026, 11, 22, 10, 15, 0, 0, time.UTC) }
	report := y.must("good1", "04c66f5aaaa")
	y.is("states", states(report), "deployed deployed deployed")
	y.is("pages", y.pages(), "good1 good1 good1")
	if !strings.HasSuffix(report.Release, "-04c66f5") || !report.Done || report.Hosts[0].Release != report.Release {
		t.Errorf("%+v", report)
	}
	again := y.must("good1", "04c66f5aaaa")
	y.is("again", states(again), "unchanged unchanged unchanged")
	y.is("the id again", again.Release, report.Release)
	if n := y.switches("h1"); n != 1 {
		t.Errorf("%d switches", n)
	}
	second := y.must("good2", "04c66f5bbbb") // in the same second
	y.is("before", second.Hosts[2].Before, report.Release)
	y.is("ids", report.Release+" "+second.Release, "20261122-101500-04c66f5 20261122-101501-04c66f5")
	y.is("pages", y.pages(), "good2 good2 good2")
}

// One of five cannot be reached: nobody has anything, and it is said who.
func TestUnreachable(t *testing.T) {
	y := newYard(t, 5)
	y.must("good1", "1")
	y.down["h3"] = true
	report, err := y.deploy(t.Context(), "good2", "2")
	if err == nil || err.Error() != "h3: no route to host" {
		t.Error(err)
	}
	y.is("states", states(report), "untouched untouched unreachable untouched untouched")
	y.is("pages", y.pages(), "good1 good1 good1 good1 good1")
}

// One of five is lost while all are sent to: nobody switches. The next run sends the rest.
func TestLostWhileShipping(t *testing.T) {
	y := newYard(t, 5)
	y.must("good1", "1")
	y.tell = func(e Event) {
		if e.Kind == KindProgress {
			y.mu.Lock()
			defer y.mu.Unlock()
			y.wires["h4"].Close()
		}
	}
	report, err := y.deploy(t.Context(), "good2", "2")
	if err == nil || !strings.HasPrefix(err.Error(), "h4: ship: ") {
		t.Fatal(err)
	}
	y.is("states", states(report), "untouched untouched untouched failed untouched")
	y.is("pages", y.pages(), "good1 good1 good1 good1 good1")
	y.tell = nil
	again := y.must("good2", "2")
	y.is("id", again.Release, report.Release)
	y.is("pages", y.pages(), "good2 good2 good2 good2 good2")
}

// A bad release is on the first host alone, and that is put back.
func TestBadRelease(t *testing.T) {
	y := newYard(t, 5, func(s *Settings) {
		s.Restart, s.Health = "", &Health{Cmd: works, Within: Duration(5 * time.Second), Every: Duration(50 * time.Millisecond)}
	})
	good := y.must("good1", "1")
	report, err := y.deploy(t.Context(), "bad", "2")
	if err == nil || !strings.HasPrefix(err.Error(), "h1: health: ") || errors.Is(err, ErrBroken) {
		t.Error(err)
	}
	y.is("states", states(report), "restored untouched untouched untouched untouched")
	y.is("pages", y.pages(), "good1 good1 good1 good1 good1")
	for _, h := range report.Hosts {
		y.is(h.Host+" runs", h.Release, good.Release)
	}
}

// The third host is ill: those before it stay, or go back, as the file says; the same line goes
// on when it is well.
func TestOnFail(t *testing.T) {
	for _, c := range []struct{ onFail, states, pages, resumed string }{
		{Restore, "deployed deployed restored untouched untouched", "bad bad good1 good1 good1", "unchanged unchanged deployed deployed deployed"},
		{RollbackAll, "reverted reverted restored untouched untouched", "good1 good1 good1 good1 good1", "deployed deployed deployed deployed deployed"},
	} {
		t.Run(c.onFail, func(t *testing.T) {
			y := newYard(t, 5, func(s *Settings) { s.OnFail = c.onFail })
			y.must("good1", "1")
			write(t, y.dir, map[string]string{"patient": "h1\nh2\nh4\nh5\n"})
			report, err := y.deploy(t.Context(), "bad", "2")
			if err == nil || !strings.HasPrefix(err.Error(), "h3: restart: ") {
				t.Error(err)
			}
			y.is("states", states(report), c.states)
			y.is("pages", y.pages(), c.pages)
			write(t, y.dir, map[string]string{"patient": "h1\nh2\nh3\nh4\nh5\n"})
			again := y.must("bad", "2")
			y.is("states, resumed", states(again), c.resumed)
			y.is("id", again.Release, report.Release)
			y.is("pages", y.pages(), "bad bad bad bad bad")
		})
	}
}

// Of two deploys at once one fails, and says who is at it, or waits.
func TestTwoDeploys(t *testing.T) {
	y := newYard(t, 2, func(s *Settings) { s.Hooks.PreRelease = `read line < "$CULVERT_TO/../gate"` })
	gate := filepath.Join(y.dir, "gate")
	fifo(t, gate)
	inside := make(chan struct{})
	var once sync.Once
	y.tell = func(e Event) {
		if e.Phase == release.PhasePreRelease {
			once.Do(func() { close(inside) })
		}
	}
	first := make(chan error, 1)
	go func() {
		_, err := y.deploy(context.Background(), "good1", "1")
		first <- err
	}()
	<-inside
	_, err := y.deploy(t.Context(), "good2", "2")
	var held *release.Error
	if !errors.As(err, &held) || held.Code != release.Held || !strings.Contains(err.Error(), "me") {
		t.Errorf("the second: %v", err)
	}
	z := &yard{t: t, dir: y.dir, settings: y.settings, hosts: y.hosts, wait: time.Minute, down: y.down, wires: map[string]net.Conn{}}
	second := make(chan error, 1)
	go func() {
		_, err := z.deploy(context.Background(), "good3", "3")
		second <- err
	}()
	// Each host's hook, of both deploys, takes one line.
	f, err := os.OpenFile(gate, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, over := range []chan error{first, second} {
		for done := false; !done; {
			select {
			case err := <-over:
				if err != nil {
					t.Error(err)
				}
				done = true
			case <-time.After(20 * time.Millisecond):
				_, _ = io.WriteString(f, "go\n")
			}
		}
	}
	y.is("pages", y.pages(), "good3 good3")
}

// Ctrl-C lets the batch under way end, and begins no other; the same line goes on.
func TestInterrupted(t *testing.T) {
	y := newYard(t, 4)
	y.must("good1", "1")
	ctx, cancel := context.WithCancel(t.Context())
	var heard []string
	y.tell = func(e Event) {
		if e.Phase == release.PhaseSwitch {
			cancel()
		}
		if e.Host == "" && e.Kind == "note" {
			heard = append(heard, e.Text)
		}
	}
	report, err := y.deploy(ctx, "good2", "2")
	if len(heard) != 1 || !strings.HasPrefix(heard[0], "interrupted: the batch under way ends first") {
		t.Error(heard)
	}
	if !errors.Is(err, ErrStopped) || !strings.HasPrefix(err.Error(), "1 of 4 hosts are done") {
		t.Error(err)
	}
	y.is("states", states(report), "deployed untouched untouched untouched")
	y.is("pages", y.pages(), "good2 good1 good1 good1")
	y.tell = nil
	y.is("resumed", states(y.must("good2", "2")), "unchanged deployed deployed deployed")

	cancelled, cancel := context.WithCancel(t.Context())
	y.tell = func(e Event) { cancel() } // while shipping
	if report, err = y.deploy(cancelled, "good3", "3"); !errors.Is(err, context.Canceled) || strings.Contains(report.Error, "context") {
		t.Error(err)
	}
	y.is("states", states(report), "untouched untouched untouched untouched")
	y.is("pages", y.pages(), "good2 good2 good2 good2")
}

// The connection is lost while a host is at it: it goes on, and is asked.
func TestLostWhileSwitching(t *testing.T) {
	for page, want := range map[string]string{"good2": "deployed deployed", "bad": "restored untouched"} {
		t.Run(page, func(t *testing.T) {
			y := newYard(t, 2)
			y.must("good1", "1")
			var once sync.Once
			y.tell = func(e Event) {
				if e.Phase == release.PhaseSwitch {
					once.Do(func() {
						y.mu.Lock()
						defer y.mu.Unlock()
						y.wires["h1"].Close()
					})
				}
			}
			report, err := y.deploy(t.Context(), page, "2")
			if (err == nil) != (page == "good2") {
				t.Error(err)
			}
			y.is("states", states(report), want)
		})
	}
}

// A plan that was kept is deployed as it was made, or not at all.
func TestPlan(t *testing.T) {
	y := newYard(t, 3)
	y.must("good1", "1")
	planned := func(tree *Tree) *Plan {
		t.Helper()
		r, err := y.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		plan, err := r.Plan(t.Context(), tree, "2222222222")
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(plan)
		if err != nil {
			t.Fatal(err)
		}
		kept, err := ParsePlan(text)
		if err != nil {
			t.Fatal(err)
		}
		return kept
	}
	deploy := func(tree *Tree, plan *Plan) (*Report, error) {
		t.Helper()
		r, err := y.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		return r.Deploy(t.Context(), tree, plan)
	}
	tree := y.tree("good2")
	plan := planned(tree)
	y.is("batches", fmt.Sprint(plan.Batches), "[[h1] [h2] [h3]]")
	if plan.Files != 2 || plan.Hosts[1].Send != int64(len("good2")) || !strings.HasSuffix(plan.Release, "-2222222") || plan.Ready() != nil {
		t.Errorf("%+v", plan)
	}
	y.is("pages", y.pages(), "good1 good1 good1")
	s := y.settings.complete()
	if err := plan.Holds("shop", s, tree); err != nil {
		t.Error(err)
	}
	if err := plan.Holds("shop", s, y.tree("good22")); err == nil || !strings.Contains(err.Error(), "not what was planned: 2 files of 20 bytes then, 2 of 21 now") {
		t.Errorf("another tree: %v", err)
	}
	changed := s
	changed.Hooks.PreRelease = "rm -rf /"
	if err := plan.Holds("shop", changed, tree); err == nil || !strings.Contains(err.Error(), "has changed since the plan was made") {
		t.Errorf("another file: %v", err)
	}
	report, err := deploy(tree, plan)
	if err != nil {
		t.Fatal(err)
	}
	y.is("id", report.Release, plan.Release)
	y.is("pages", y.pages(), "good2 good2 good2")
	if again, err := deploy(tree, plan); err != nil || states(again) != "unchanged unchanged unchanged" {
		t.Errorf("the same plan again: %s, %v", states(again), err)
	}

	late := y.tree("good4")
	plan = planned(late)
	y.must("good3", "3")
	if report, err := deploy(late, plan); err == nil || !strings.Contains(err.Error(), "when this was planned, and now runs") {
		t.Errorf("hosts have moved on: %s, %v", states(report), err)
	}
	y.is("pages", y.pages(), "good3 good3 good3")
}

func TestRollback(t *testing.T) {
	y := newYard(t, 3)
	one, two := y.must("good1", "1"), y.must("good2", "2")
	if _, err := y.deploy(t.Context(), "bad", "3"); err == nil {
		t.Fatal("a bad release was deployed")
	}
	back := func(id string) (*Report, error) {
		r, err := y.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		return r.Rollback(t.Context(), id)
	}
	report, err := back("")
	if err != nil {
		t.Fatal(err)
	}
	y.is("states", states(report), "rolled-back rolled-back rolled-back")
	y.is("pages", y.pages(), "good1 good1 good1")
	if report, err := back(""); err == nil {
		t.Errorf("there is nothing before the first: %+v", report)
	}
	if _, err := back("20200101-000000-nothing"); err == nil {
		t.Error("went back to what there is not")
	}
	y.is("pages", y.pages(), "good1 good1 good1")
	if _, err := back(two.Release); err != nil {
		t.Error(err)
	}
	y.is("pages", y.pages(), "good2 good2 good2")
	report, err = back(two.Release)
	if err != nil || states(report) != "unchanged unchanged unchanged" {
		t.Errorf("back to what it runs: %s, %v", states(report), err)
	}

	r, err := y.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	listed := r.Releases()
	var ids []string
	for _, l := range listed {
		ids = append(ids, l.ID)
		if len(l.Hosts) != 3 || l.Who != "me" {
			t.Errorf("%+v", l)
		}
		for _, h := range l.Hosts {
			if h.Current != (l.ID == two.Release) {
				t.Errorf("%s on %s: %+v", l.ID, h.Host, h)
			}
		}
	}
	if !slices.Contains(ids, one.Release) || !slices.Contains(ids, two.Release) || !slices.IsSortedFunc(ids, func(a, b string) int { return strings.Compare(b, a) }) {
		t.Errorf("%v", ids)
	}
}

// Hosts are restarted one by one, and the first that fails is the last.
func TestRestart(t *testing.T) {
	y := newYard(t, 3, func(s *Settings) {
		s.Restart = `cmd echo "$(basename "$CULVERT_TO")" >> "$CULVERT_TO/../restarts"; ` + works
	})
	y.must("good1", "1")
	write(t, y.dir, map[string]string{"restarts": ""})
	restart := func() (*Report, error) {
		r, err := y.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		return r.Restart(t.Context())
	}
	report, err := restart()
	if err != nil {
		t.Fatal(err)
	}
	y.is("states", states(report), "restarted restarted restarted")
	text, _ := os.ReadFile(filepath.Join(y.dir, "restarts"))
	y.is("order", string(text), "h1\nh2\nh3\n")
	write(t, filepath.Join(y.dir, "h2", "current"), map[string]string{"page": "ill"})
	report, err = restart()
	if err == nil || !strings.HasPrefix(err.Error(), "h2: ") {
		t.Error(err)
	}
	if got := states(report); !strings.HasPrefix(got, "restarted ") || !strings.HasSuffix(got, " untouched") {
		t.Errorf("%s: %v", got, err)
	}
}

func TestPause(t *testing.T) {
	y := newYard(t, 3, func(s *Settings) {
		s.Pause, s.Batch = Duration(10*time.Millisecond), Batch{{N: 100, Percent: true}}
	})
	y.must("good1", "1")
	var order []string
	for _, e := range y.events {
		if e.Phase == release.PhaseSwitch || e.Phase == release.PhasePostRelease {
			order = append(order, e.Host+" "+e.Phase)
		}
	}
	y.is("one after the other", strings.Join(order, ", "), "h1 switch, h1 post_release, h2 switch, h2 post_release, h3 switch, h3 post_release")
}

func TestExec(t *testing.T) {
	y := newYard(t, 2)
	y.must("good1", "1")
	r, err := y.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Exec(t.Context(), []string{"sh", "-c", "cat page; echo; basename $PWD"}); err != nil {
		t.Error(err)
	}
	said := map[string]string{}
	for _, e := range y.events {
		if e.Kind == "output" && e.Phase == release.PhaseExec {
			said[e.Host] += e.Text + ";"
		}
	}
	if !strings.HasPrefix(said["h1"], "good1;") || said["h1"] != said["h2"] {
		t.Errorf("%q", said)
	}
	if err := r.Exec(t.Context(), []string{"false"}); err == nil || err.Error() != "h1: exit status 1\nh2: exit status 1" {
		t.Error(err)
	}
}

func fifo(t *testing.T, path string) {
	t.Helper()
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
}
