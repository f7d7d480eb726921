package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/release"
)

// Config says what is rolled out, and to whom.
type Config struct {
	App      string
	Env      string
	Settings Settings // complete, as File.Env has them
	Hosts    []Host   // those of the settings that are meant
	Who      string   // what the hosts' logs are to say
	Wait     time.Duration

	// Dial reaches a host's "culvert apply". An error of what it returns may tell more, see
	// Wire.
	Dial func(ctx context.Context, h Host) (io.ReadWriteCloser, error)

	// Bring, if set, is asked when a host has not answered: whether it has what it lacked now,
	// and is to be dialled again.
	Bring func(ctx context.Context, h Host, why error, tell func(string)) (bool, error)

	// Tell, if set, is told how it goes, one event after the other.
	Tell func(Event)

	// Hurry, once closed, has what hosts are at left to them: they end it by themselves.
	Hurry <-chan struct{}

	Now func() time.Time // nil: time.Now
}

// An Event tells how a host, or "" all of them, goes on.
type Event struct {
	Host string
	release.Event
	Done, Total int64 // bytes, of KindProgress
}

// KindProgress is of how much was shipped.
const KindProgress = "progress"

// A Wire is a connection that knows more of its end than that it ended.
type Wire interface {
	io.ReadWriteCloser
	// Why waits for the end, and says why it came; nil for no particular reason.
	Why() error
}

// What became of a host.
const (
	Deployed    = "deployed"    // it runs what was wanted
	RolledBack  = "rolled-back" // likewise, by Rollback
	Restarted   = "restarted"   // likewise, by Restart
	Unchanged   = "unchanged"   // as before
	Restored    = "restored"    // it failed, and is as it was before
	Reverted    = "reverted"    // it did not fail, and is as it was before: others have
	Broken      = "broken"      // it failed, and neither release works
	Failed      = "failed"      // it refused, before anything was changed
	Untouched   = "untouched"   // its turn has not come
	Unreachable = "unreachable" // nothing is known of it
	Unknown     = "unknown"     // the connection was lost while it was at it: it ends that by itself
)

// A Row is what became of one host.
type Row struct {
	Host    string `json:"host"`
	Role    string `json:"role,omitempty"`
	Release string `json:"release,omitempty"` // that it runs now
	Before  string `json:"before,omitempty"`  // that it ran before
	Next    string `json:"next,omitempty"`    // that it would go back to
	State   string `json:"state"`
	Phase   string `json:"phase,omitempty"` // that failed
	Error   string `json:"error,omitempty"`
	Output  string `json:"output,omitempty"` // of what failed, its end
}

// A Report is what became of all.
type Report struct {
	App     string    `json:"app"`
	Env     string    `json:"env,omitempty"`
	Action  string    `json:"action"`
	Release string    `json:"release,omitempty"`
	Commit  string    `json:"commit,omitempty"`
	Who     string    `json:"who,omitempty"`
	Began   time.Time `json:"began"`
	Ended   time.Time `json:"ended"`
	Done    bool      `json:"done"`
	Error   string    `json:"error,omitempty"`
	Hosts   []Row     `json:"hosts"`
}

// ErrBroken is a host on which neither the new release works nor the one before.
var ErrBroken = errors.New("neither the new release works nor the one before")

// ErrStopped is a rollout that was told to stop, and has, between two batches.
var ErrStopped = errors.New("stopped between batches; the same line goes on")

// An interruption is the end of a context, in words for a row.
type interruption struct{}

func (interruption) Error() string { return "interrupted" }
func (interruption) Unwrap() error { return context.Canceled }

// A Rollout is wires to all hosts, over which something is done to them.
type Rollout struct {
	cfg     Config
	members []*member
	began   time.Time
	mu      sync.Mutex // of Tell
}

// A member is one host.
type member struct {
	Host
	wire     *client
	under    io.ReadWriteCloser
	host     *release.Host
	row      Row
	want     string // the release that it is to run; "" where that does not change
	switched bool   // and not finished
}

const (
	atOnce  = 32               // hosts that are asked, or sent to, at the same time
	toHello = 60 * time.Second // within which a host that can be reached has answered
)

// Open asks all hosts who they are, which changes nothing. The rollout is to be closed also where
// there is an error, which is of hosts that cannot be reached or refuse.
func Open(ctx context.Context, cfg Config) (*Rollout, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &Rollout{cfg: cfg, began: cfg.Now()}
	for _, h := range cfg.Hosts {
		r.members = append(r.members, &member{Host: h, row: Row{Host: h.Name, Role: h.Role, State: Untouched}})
	}
	return r, r.each(ctx, r.members, r.open)
}

// Close hangs up. Nobody is waiting for a host any more: who can be left is not waited for.
func (r *Rollout) Close() error {
	return r.each(context.Background(), r.members, func(_ context.Context, m *member) error {
		if l, ok := m.under.(interface{ Leave() }); ok {
			l.Leave()
		}
		m.hangUp()
		return nil
	})
}

func (m *member) hangUp() {
	if m.wire != nil {
		_ = m.wire.Close()
	}
	if w, ok := m.under.(Wire); ok {
		_ = w.Why()
	}
}

func (r *Rollout) open(ctx context.Context, m *member) error {
	err := r.hello(ctx, m)
	if err != nil && r.cfg.Bring != nil && ctx.Err() == nil {
		brought, failed := r.cfg.Bring(ctx, m.Host, err, func(text string) { r.note(m, text) })
		if failed != nil {
			return m.fail(Unreachable, "", failed)
		}
		if brought {
			err = r.hello(ctx, m)
		}
	}
	if err != nil {
		return m.fail(Unreachable, "", err)
	}
	m.row.Release, m.row.Before = m.host.Current, m.host.Current
	return nil
}

func (r *Rollout) hello(ctx context.Context, m *member) (err error) {
	m.hangUp() // of a try before
	ctx, cancel := context.WithTimeoutCause(ctx, toHello, fmt.Errorf("no answer within %v", toHello))
	defer cancel()
	if m.under, err = r.cfg.Dial(ctx, m.Host); err != nil {
		return err
	}
	m.wire = newClient(m.under)
	m.host, err = m.wire.Hello(ctx, release.Hello{App: r.cfg.App, To: r.cfg.Settings.To, Who: r.cfg.Who, Config: r.cfg.Settings.forHost()})
	if err != nil {
		err = m.because(err)
	}
	return err
}

// because is an error of the wire, in the words of who knows.
func (m *member) because(err error) error {
	var theirs *release.Error
	if errors.As(err, &theirs) || errors.Is(err, context.Canceled) || errors.Is(err, release.ErrStranger) {
		return err
	}
	_ = m.wire.Close()
	if w, ok := m.under.(Wire); ok {
		if why := w.Why(); why != nil {
			return why
		}
	}
	return err
}

// fail notes what became of a host. A refusal is no lack of reach, and who was interrupted has
// learnt nothing of the host.
func (m *member) fail(state, phase string, err error) error {
	if errors.Is(err, context.Canceled) {
		err = interruption{}
		if state == Unreachable || state == Failed {
			state = Untouched
		}
	}
	var theirs *release.Error
	if errors.As(err, &theirs) && state == Unreachable {
		state = Failed
	}
	m.row.State, m.row.Phase, m.row.Error = state, phase, err.Error()
	if phase != "" {
		err = fmt.Errorf("%s: %w", phase, err)
	}
	return fmt.Errorf("%s: %w", m.Name, err)
}

// each does something to hosts at the same time, and waits for all.
func (r *Rollout) each(ctx context.Context, members []*member, do func(context.Context, *member) error) error {
	var g errgroup.Group
	g.SetLimit(atOnce)
	errs := make([]error, len(members))
	for i, m := range members {
		g.Go(func() error {
			errs[i] = do(ctx, m)
			return nil
		})
	}
	_ = g.Wait()
	return errors.Join(errs...)
}

// tell has all that is told tame: hosts have a word in most of it.
func (r *Rollout) tell(e Event) {
	if r.cfg.Tell == nil {
		return
	}
	tameAll(&e.Phase, &e.Text)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cfg.Tell(e)
}

// note tells people something of one host.
func (r *Rollout) note(m *member, text string) {
	r.tell(Event{Host: m.Name, Event: release.Event{Kind: "note", Text: text}})
}

// events are those of one host.
func (r *Rollout) events(m *member) func(release.Event) {
	return func(e release.Event) { r.tell(Event{Host: m.Name, Event: e}) }
}

// check refuses hosts that would refuse: what is no deploy is refused by their policy, and where
// nothing was deployed.
func (r *Rollout) check(deploy bool) error {
	return r.each(context.Background(), r.members, func(_ context.Context, m *member) error {
		for _, p := range m.host.Problems {
			if !deploy && p.Code != release.Refused {
				continue
			}
			return m.fail(Failed, "", &release.Error{Code: p.Code, Text: p.Text, Hint: p.Hint})
		}
		if !deploy && m.host.Current == "" && len(m.host.Releases) == 0 {
			return m.fail(Failed, "", &release.Error{Code: release.None, Text: "nothing was deployed to " + m.host.To})
		}
		return nil
	})
}

// lock takes all hosts, and looks again what is there where somebody may just have left. Who waits
// does so in one order, so that two never wait for each other; who does not may have a release
// offered at once to those that do not run it.
func (r *Rollout) lock(ctx context.Context, id string, ahead *release.Offer) error {
	take := func(ctx context.Context, m *member) (err error) {
		var locked release.Locked
		l := release.Lock{Wait: r.cfg.Wait, Release: id}
		if ahead != nil && l.Wait == 0 && !m.runs(ahead.ID) {
			locked, err = m.wire.LockFor(ctx, l, *ahead, r.events(m))
		} else {
			locked, err = m.wire.Lock(ctx, l, r.events(m))
		}
		if err != nil {
			return m.fail(Failed, "lock", m.because(err))
		}
		if r.cfg.Wait > 0 || locked.Current != m.host.Current || locked.Repaired != "" {
			if m.host.Releases, err = m.wire.List(ctx); err != nil {
				return m.fail(Failed, "lock", m.because(err))
			}
		}
		m.host.Current = locked.Current
		m.row.Release, m.row.Before = locked.Current, locked.Current
		if locked.Repaired != "" {
			r.note(m, locked.Repaired)
		}
		return nil
	}
	if r.cfg.Wait == 0 {
		return r.each(ctx, r.members, take)
	}
	for _, m := range slices.SortedFunc(slices.Values(r.members), func(a, b *member) int { return cmp.Compare(a.Name, b.Name) }) {
		if err := take(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// find is the release of the host with an id.
func (m *member) find(id string) (release.Release, bool) {
	i := slices.IndexFunc(m.host.Releases, func(r release.Release) bool { return r.ID == id })
	if i < 0 {
		return release.Release{}, false
	}
	return m.host.Releases[i], true
}

// runs tells whether a host runs a release that has passed its gate there.
func (m *member) runs(id string) bool {
	have, ok := m.find(id)
	return ok && m.host.Current == id && have.State == release.StateGood
}

// choose is the id of this tree of this commit: that of the last try, else one that no host has.
// What is no id is not let near the other hosts. Asked again it is the same, if hosts have not
// changed; who has waited for others comes after them.
func (r *Rollout) choose(tree *Tree, commit string) string {
	id, taken := "", map[string]bool{}
	for _, m := range r.members {
		for _, have := range m.host.Releases {
			if release.CheckID(have.ID) != nil {
				continue
			}
			if taken[have.ID] = true; have.Tree == tree.Hash && have.Commit == commit && have.ID > id {
				id = have.ID
			}
		}
	}
	now := r.began
	if r.cfg.Wait > 0 {
		now = r.cfg.Now()
	}
	for ; id == "" || taken[id] && !r.same(id, tree); now = now.Add(time.Second) {
		id = NewID(now, cmp.Or(commit, tree.Hash.String()))
	}
	return id
}

// same tells whether a release, wherever it is, is of this tree.
func (r *Rollout) same(id string, tree *Tree) bool {
	return !slices.ContainsFunc(r.members, func(m *member) bool {
		have, ok := m.find(id)
		return ok && have.Tree != tree.Hash
	})
}

// Deploy ships a tree to all hosts, and then switches them, batch by batch. With a plan it is
// that one, or nothing. The report is there whatever the error. When ctx ends the batch under
// way is finished, and no other begun.
func (r *Rollout) Deploy(ctx context.Context, tree *Tree, plan *Plan) (*Report, error) {
	report := &Report{Action: "deploy", Release: plan.Release, Commit: plan.Commit}
	return report, r.report(report, r.deploy(ctx, tree, plan, report))
}

func (r *Rollout) deploy(ctx context.Context, tree *Tree, plan *Plan, report *Report) error {
	if err := r.check(true); err != nil {
		return err
	}
	if plan.Binding {
		if err := r.held(plan); err != nil {
			return err
		}
	}
	id := plan.Release
	ahead := &release.Offer{ID: id, Commit: plan.Commit, Entries: tree.Manifest}
	if slices.ContainsFunc(r.members, func(m *member) bool { return m.host.Holder != nil || m.host.Interrupted != "" }) {
		ahead = nil // not every lock may come, or soon: who has given his is to be let go of at once
	}
	if err := r.lock(ctx, id, ahead); err != nil {
		return err
	}
	if !plan.Binding {
		id = r.choose(tree, plan.Commit)
		report.Release = id
	} else if err := r.held(plan); err != nil {
		return err
	} else if !r.same(id, tree) {
		return fmt.Errorf("a host has another release %s than was planned: plan again", id)
	}
	var todo []*member
	for _, m := range r.members {
		if m.want = id; m.runs(id) {
			m.row.State = Unchanged
		} else {
			todo = append(todo, m)
		}
	}
	if err := r.ship(ctx, todo, tree, id, plan.Commit); err != nil {
		return err
	}
	return r.roll(ctx, r.cfg.Settings.Batch, r.activate)
}

// held refuses a plan that was made of something else.
func (r *Rollout) held(plan *Plan) error {
	return r.each(context.Background(), r.members, func(_ context.Context, m *member) error {
		for _, h := range plan.Hosts {
			if h.Host == m.Name && h.Current != m.host.Current && plan.Release != m.host.Current {
				return m.fail(Failed, "", fmt.Errorf("it ran %s when this was planned, and now runs %s: plan again", orNone(h.Current), orNone(m.host.Current)))
			}
		}
		return nil
	})
}

func orNone(id string) string {
	if id == "" {
		return "no release"
	}
	return id
}

// ship sends a tree to hosts that have asked for what they lack.
func (r *Rollout) ship(ctx context.Context, members []*member, tree *Tree, id, commit string) error {
	var total, sent atomic.Int64
	tell := func(n int) {
		r.tell(Event{Event: release.Event{Kind: KindProgress, Phase: release.PhaseShip}, Done: sent.Add(int64(n)), Total: total.Load()})
	}
	missing := make(map[*member][]release.Piece, len(members))
	var mu sync.Mutex
	err := r.each(ctx, members, func(ctx context.Context, m *member) error {
		lacks, err := m.wire.Offer(ctx, release.Offer{ID: id, Commit: commit, Entries: tree.Manifest})
		if err != nil {
			return m.fail(Failed, release.PhaseShip, m.because(err))
		}
		total.Add(bytesOf(lacks))
		mu.Lock()
		defer mu.Unlock()
		missing[m] = lacks
		return nil
	})
	if err != nil {
		return err
	}
	return r.each(ctx, members, func(ctx context.Context, m *member) error {
		content := tree.content(missing[m], tell)
		defer content.Close()
		if err := m.wire.Ship(ctx, content); err != nil {
			return m.fail(Failed, release.PhaseShip, m.because(err))
		}
		return nil
	})
}

func bytesOf(pieces []release.Piece) (n int64) {
	for _, p := range pieces {
		n += p.Size
	}
	return n
}

// report completes a report.
func (r *Rollout) report(report *Report, err error) error {
	report.App, report.Env, report.Who, report.Began, report.Ended = r.cfg.App, r.cfg.Env, r.cfg.Who, r.began, r.cfg.Now()
	report.Hosts = nil
	for _, m := range r.members {
		report.Hosts = append(report.Hosts, m.row)
	}
	word := map[string]string{"rollback": RolledBack, "restart": Restarted}[report.Action]
	for i := range report.Hosts {
		if h := &report.Hosts[i]; h.State == Deployed && word != "" {
			h.State = word
		}
	}
	report.Done = err == nil
	if err != nil {
		report.Error = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return err
}

// Report is that of an action that has ended before anything was done to hosts.
func (r *Rollout) Report(action string, err error) *Report {
	report := &Report{Action: action}
	_ = r.report(report, err)
	return report
}
