package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/release"
)

// An act is what is done to one host in its turn.
type act func(context.Context, *member) (release.Result, error)

// roll does something to all hosts whose turn it is yet, in batches. What a batch has begun is
// not cut off by ctx: the host would go on anyway.
func (r *Rollout) roll(ctx context.Context, steps []Step, do act) error {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	if r.cfg.Hurry != nil {
		go func() {
			select {
			case <-r.cfg.Hurry:
				cancel()
			case <-work.Done():
			}
		}()
	}
	defer r.answer(ctx)()
	err := r.rollBatches(ctx, work, steps, do)
	if err != nil && !errors.Is(err, ErrStopped) && work.Err() == nil && r.cfg.Settings.OnFail == RollbackAll {
		err = errors.Join(err, r.revert(work))
	}
	return errors.Join(err, r.finish(work, r.members))
}

// answer tells a person who interrupts that this was heard: a batch may take minutes.
func (r *Rollout) answer(ctx context.Context) (stop func()) {
	if ctx.Err() != nil {
		return func() {}
	}
	under := "batch"
	if r.cfg.Settings.Pause > 0 {
		under = "host"
	}
	told := make(chan struct{})
	forget := context.AfterFunc(ctx, func() {
		defer close(told)
		r.tell(Event{Event: release.Event{Kind: "note", Text: "interrupted: the " + under + " under way ends first, and no other begins; a second Ctrl-C leaves hosts to themselves"}})
	})
	return func() {
		if !forget() {
			<-told
		}
	}
}

func (r *Rollout) rollBatches(ctx, work context.Context, steps []Step, do act) error {
	for i, batch := range r.batches(steps) {
		if ctx.Err() != nil {
			return r.stopped()
		}
		one := func(_ context.Context, m *member) error { return r.turn(work, m, do) }
		var err error
		if r.cfg.Settings.Pause == 0 {
			err = r.each(work, batch, one)
		} else {
			err = r.oneByOne(ctx, batch, i == 0, one)
		}
		if err != nil {
			return err
		}
		if r.cfg.Settings.OnFail != RollbackAll {
			if err := r.finish(work, batch); err != nil {
				return err
			}
		}
	}
	return nil
}

// batches are the hosts whose turn it is yet, cut as if it were the turn of all: who goes on
// does not begin with one host again.
func (r *Rollout) batches(steps []Step) [][]*member {
	var hosts []Host
	for _, m := range r.members {
		hosts = append(hosts, m.Host)
	}
	var all [][]*member
	for _, cut := range batches(hosts, steps) {
		var batch []*member
		for _, h := range cut {
			i := slices.IndexFunc(r.members, func(m *member) bool { return m.Host == h })
			if m := r.members[i]; m.row.State == Untouched {
				batch = append(batch, m)
			}
		}
		if len(batch) > 0 {
			all = append(all, batch)
		}
	}
	return all
}

// oneByOne leaves a pause before each host but the first of all.
func (r *Rollout) oneByOne(ctx context.Context, batch []*member, first bool, do func(context.Context, *member) error) error {
	for i, m := range batch {
		if i > 0 || !first {
			pause := time.NewTimer(time.Duration(r.cfg.Settings.Pause))
			select {
			case <-pause.C:
			case <-ctx.Done():
				pause.Stop()
				return r.stopped()
			}
		}
		if err := do(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

func (r *Rollout) stopped() error {
	done := 0
	for _, m := range r.members {
		if m.row.State == Deployed || m.row.State == Unchanged {
			done++
		}
	}
	return fmt.Errorf("%d of %d hosts are done: %w", done, len(r.members), ErrStopped)
}

// activate has a host that nobody will revert mark the release as good by itself.
func (r *Rollout) activate(ctx context.Context, m *member) (release.Result, error) {
	if r.cfg.Settings.OnFail != RollbackAll {
		return m.wire.ActivateForGood(ctx, r.events(m))
	}
	return m.wire.Activate(ctx, r.events(m))
}

// turn is one host's.
func (r *Rollout) turn(ctx context.Context, m *member, do act) error {
	if err := ctx.Err(); err != nil {
		return m.fail(Untouched, "", err)
	}
	result, err := do(ctx, m)
	var theirs *release.Error
	switch {
	case errors.As(err, &theirs):
		return m.fail(Failed, "", err)
	case err != nil:
		return r.settle(ctx, m, m.because(err))
	}
	return m.conclude(result)
}

// conclude is how a host's turn ended, as it says.
func (m *member) conclude(result release.Result) error {
	m.row.Release, m.row.Output = result.Release, result.Output
	why := errors.New(result.Error)
	switch result.State {
	case release.StateActive:
		m.row.State, m.switched = Deployed, m.want != "" && !result.Finished // a restart is good as it is
		m.row.Output = ""
		return nil
	case release.StateRestored:
		return m.fail(Restored, result.Phase, why)
	case release.StateBroken:
		return m.fail(Broken, result.Phase, fmt.Errorf("%w: %w", ErrBroken, why))
	}
	return m.fail(Unknown, result.Phase, fmt.Errorf("it says it is %q: %w", result.State, why))
}

// settle asks a host again whose wire was lost while it was at it: it has gone on by itself,
// and tells how that ended once it lets the lock go.
func (r *Rollout) settle(ctx context.Context, m *member, lost error) error {
	if ctx.Err() != nil {
		r.note(m, "is left to itself: it ends what it has begun, and culvert releases tells how")
		return m.fail(Unknown, "", lost)
	}
	longest := time.Duration(r.cfg.Settings.Timeout) + toHello
	ctx, cancel := context.WithTimeoutCause(ctx, longest, lost)
	defer cancel()
	r.note(m, "the connection was lost ("+lost.Error()+"); the host ends this by itself, and is asked how")
	before := m.row.Before
	err := r.reopen(ctx, m)
	m.row.Before = before
	if err != nil {
		return m.fail(Unknown, "", lost)
	}
	m.row.Error = ""
	if err := r.look(ctx, m, longest); err != nil {
		return m.fail(Unknown, "", err)
	}
	if m.want == "" {
		return m.fail(Unknown, release.PhaseRestart, lost)
	}
	if m.runs(m.want) {
		m.row.State = Deployed // and marked as good by the host
		return nil
	}
	why := lost
	if have, ok := m.find(m.want); ok && have.Error != "" {
		why = fmt.Errorf("%w; %s", lost, have.Error)
	}
	return m.fail(Restored, "", why)
}

// reopen tries for a while.
func (r *Rollout) reopen(ctx context.Context, m *member) error {
	ctx, cancel := context.WithTimeout(ctx, toHello)
	defer cancel()
	for {
		err := r.open(ctx, m)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return err
		}
	}
}

// look waits until a host is at nothing, and sees what it has.
func (r *Rollout) look(ctx context.Context, m *member, wait time.Duration) error {
	locked, err := m.wire.Lock(ctx, release.Lock{Wait: wait}, r.events(m))
	if err != nil {
		return err
	}
	m.host.Current, m.row.Release = locked.Current, locked.Current
	m.host.Releases, err = m.wire.List(ctx)
	return err
}

// finish marks what hosts have switched to as good.
func (r *Rollout) finish(ctx context.Context, members []*member) error {
	return r.each(ctx, members, func(ctx context.Context, m *member) error {
		if !m.switched {
			return nil
		}
		m.switched = false
		err := m.wire.Finish(ctx)
		var theirs *release.Error
		if err == nil {
			return nil
		}
		if errors.As(err, &theirs) {
			return fmt.Errorf("%s: mark as good: %w", m.Name, err)
		}
		r.note(m, "the connection was lost; the host marks the release as good by itself")
		return nil
	})
}

// revert puts back those that have switched.
func (r *Rollout) revert(ctx context.Context) error {
	return r.each(ctx, r.members, func(ctx context.Context, m *member) error {
		if !m.switched {
			return nil
		}
		m.switched = false
		result, err := m.wire.Revert(ctx, r.events(m))
		if err != nil {
			return m.fail(Unknown, "revert", m.because(err))
		}
		if m.row.Release = result.Release; result.State == release.StateRestored {
			m.row.State = Reverted
			return nil
		}
		return m.conclude(result)
	})
}

// Rollback has each host go back to a release, or for "" to the newest that passed its gate
// before the one that it runs; in the same batches, and with the same gate.
func (r *Rollout) Rollback(ctx context.Context, id string) (*Report, error) {
	report := &Report{Action: "rollback", Release: id}
	return report, r.report(report, r.rollback(ctx, id))
}

func (r *Rollout) rollback(ctx context.Context, id string) error {
	if err := r.check(false); err != nil {
		return err
	}
	if err := r.lock(ctx, id, nil); err != nil {
		return err
	}
	err := r.each(ctx, r.members, func(ctx context.Context, m *member) error {
		if id != "" && m.runs(id) {
			m.row.State = Unchanged
			return nil
		}
		choice, err := m.wire.Rollback(ctx, id)
		if err != nil {
			return m.fail(Failed, "", m.because(err))
		}
		m.want = choice.Release.ID
		r.note(m, "goes back from "+orNone(choice.Current)+" to "+choice.Release.ID)
		return nil
	})
	if err != nil {
		return err
	}
	return r.roll(ctx, r.cfg.Settings.Batch, r.activate)
}

// Targets is what Rollback would have each host go to, without a change to any.
func (r *Rollout) Targets(ctx context.Context, id string) error {
	return r.each(ctx, r.members, func(ctx context.Context, m *member) error {
		choice, err := m.wire.Rollback(ctx, id)
		if err != nil {
			return m.fail(Failed, "", m.because(err))
		}
		m.row.Next = choice.Release.ID
		return nil
	})
}

// Restart restarts what hosts run, one by one.
func (r *Rollout) Restart(ctx context.Context) (*Report, error) {
	report := &Report{Action: "restart"}
	return report, r.report(report, r.restart(ctx))
}

func (r *Rollout) restart(ctx context.Context) error {
	if err := r.check(false); err != nil {
		return err
	}
	if err := r.lock(ctx, "", nil); err != nil {
		return err
	}
	var steps []Step
	for i := range r.members {
		steps = append(steps, Step{N: i + 1})
	}
	r.cfg.Settings.OnFail = Restore // there is nothing to go back to
	return r.roll(ctx, steps, func(ctx context.Context, m *member) (release.Result, error) {
		return m.wire.Restart(ctx, r.events(m))
	})
}

// Exec runs a command in what hosts run, on all at the same time. Its output comes as events.
func (r *Rollout) Exec(ctx context.Context, argv []string) error {
	return r.each(ctx, r.members, func(ctx context.Context, m *member) error {
		code, err := m.wire.Exec(ctx, argv, r.events(m))
		if err != nil {
			return m.fail(Failed, "", m.because(err))
		}
		if code != 0 {
			return m.fail(Failed, "", fmt.Errorf("exit status %d", code))
		}
		m.row.State = Unchanged
		return nil
	})
}

// Releases are those that hosts have, the newest first.
func (r *Rollout) Releases() []Listed {
	var all []Listed
	for _, m := range r.members {
		if m.host == nil {
			continue
		}
		for _, have := range m.host.Releases {
			i := slices.IndexFunc(all, func(l Listed) bool { return l.ID == have.ID })
			if i < 0 {
				i, all = len(all), append(all, Listed{ID: have.ID, Commit: have.Commit, Who: have.Who, When: have.When})
			}
			all[i].Hosts = append(all[i].Hosts, ListedHost{Host: m.Name, State: have.State, Current: have.Current, Error: have.Error, When: have.When})
			if have.When.After(all[i].When) {
				all[i].When = have.When
			}
		}
	}
	slices.SortStableFunc(all, func(a, b Listed) int { return cmp.Compare(b.ID, a.ID) })
	return all
}

// A Listed is a release, and how it is on each host that knows of it.
type Listed struct {
	ID     string       `json:"id"`
	Commit string       `json:"commit,omitempty"`
	Who    string       `json:"who,omitempty"`
	When   time.Time    `json:"when,omitzero"` // of the last change on any host
	Hosts  []ListedHost `json:"hosts"`
}

// A ListedHost is how a release is on a host.
type ListedHost struct {
	Host    string    `json:"host"`
	State   string    `json:"state"` // as release has it
	Current bool      `json:"current,omitempty"`
	Error   string    `json:"error,omitempty"`
	When    time.Time `json:"when,omitzero"`
}
