package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A RollConfig says how the instances of a service are restarted, one by one.
type RollConfig struct {
	Service string

	// Restart ends an instance, so that a new one comes. That it has done so is not
	// believed, but looked for.
	Restart func(ctx context.Context, i Instance) error

	// Gate, if set, is asked of each new instance whose checks pass, again and again
	// until it says nil or the time is over.
	Gate func(ctx context.Context, i Instance) error

	Drain  bool          // in maintenance mode before its end
	Pause  time.Duration // between the drain and the end, for what is under way
	Within time.Duration // for each instance; 0 is 2 minutes
	Say    func(string)  // may be nil
}

const rollLimit = 2 * time.Minute

// ourReason is that of instances which Roll has drained.
const ourReason = "culvert: restart"

// Roll restarts all instances one by one. The next one's turn comes when a new one is
// there in place of the last: of another id, or another start of the same one; when its
// checks pass by its agent's word and by the registry's, the gate is passed, and nothing
// of the old one is left. The last is waited for like all. What does not come back ends
// it with an error, and those whose turn has not come stay as they are.
//
// What somebody else has in maintenance is restarted, too, and its other checks have to pass.
// It stays in maintenance; what comes in its place by another id does not.
func (r *Registry) Roll(ctx context.Context, cfg RollConfig) error {
	cfg.Within = cmp.Or(cfg.Within, rollLimit)
	if cfg.Say == nil {
		cfg.Say = func(string) {}
	}
	all, err := r.Instances(ctx, cfg.Service)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return fmt.Errorf("restart %s: %w", cfg.Service, r.noneSeen())
	}
	turns := inTurn(all)
	for n, i := range turns {
		t := &turn{r: r, cfg: cfg, old: i, known: all, words: fmt.Sprintf("%d of %d: ", n+1, len(turns))}
		err := t.take(ctx)
		if err != nil {
			return fmt.Errorf("restart %s: %d of %d, %s: %w", cfg.Service, n+1, len(turns), i, err)
		}
		all = append(all, t.now)
	}
	return nil
}

// noneSeen is the error of an empty list. Who asks without a token is not told that
// something is hidden.
func (r *Registry) noneSeen() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.denied {
		return fmt.Errorf("%w that may be seen: %w", ErrNoInstance, ErrForbidden)
	}
	return ErrNoInstance
}

// inTurn puts first what does not work anyway, and of an id that is registered twice
// keeps one: the other goes when that has a new instance.
func inTurn(all []Instance) (turns []Instance) {
	for _, i := range all {
		at := slices.IndexFunc(turns, func(o Instance) bool { return o.ID == i.ID })
		switch {
		case at < 0:
			turns = append(turns, i)
		case i.rank() > turns[at].rank():
			turns[at] = i
		}
	}
	slices.SortStableFunc(turns, func(a, b Instance) int {
		switch {
		case a.Healthy == b.Healthy:
			return 0
		case b.Healthy:
			return -1
		}
		return 1
	})
	return turns
}

// rank is how much of an instance works: what clients are led to before what they are kept from.
func (i Instance) rank() int {
	switch {
	case i.Passing():
		return 2
	case i.Healthy:
		return 1
	}
	return 0
}

// A turn is one instance's.
type turn struct {
	r     *Registry
	cfg   RollConfig
	old   Instance
	known []Instance // before, and those that came since
	now   Instance   // in its place
	words string
	aside Instance // the last start of the old one that was in maintenance

	changed []change // known registrations that are of another start now
}

// A change is when a registration was first seen to be of this start.
type change struct {
	to Instance
	at time.Time
}

func (t *turn) say(format string, args ...any) { t.cfg.Say(t.words + fmt.Sprintf(format, args...)) }

func (t *turn) take(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.Within+t.cfg.Pause)
	defer cancel()
	if err := t.still(ctx); err != nil {
		return err
	}
	drain := t.cfg.Drain && !t.old.kept()
	if drain || t.old.Drained {
		defer func() {
			if err != nil {
				err = errors.Join(err, t.leadBack(ctx))
			}
		}()
	}
	if drain {
		t.say("%s is drained", t.old)
		if err := t.r.Drain(ctx, t.old, true, ourReason); err != nil {
			return err
		}
		if err := pause(ctx, t.cfg.Pause); err != nil {
			return err
		}
	}
	t.say("%s ends", t.old)
	if err := t.cfg.Restart(ctx, t.old); err != nil {
		return err
	}
	if err := t.await(ctx); err != nil {
		return err
	}
	return t.settle(ctx)
}

// still looks at the old one again: it may be long since it was listed.
func (t *turn) still(ctx context.Context) error {
	all, err := t.r.Instances(ctx, t.cfg.Service)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, t.old.same)
	if at < 0 {
		return fmt.Errorf("%w: it left before its turn came", ErrNoInstance)
	}
	t.old, t.aside = all[at], all[at]
	for _, i := range all { // what came meanwhile is not what will come for this one
		if !slices.ContainsFunc(t.known, i.is) {
			t.known = append(t.known, i)
		}
	}
	return nil
}

// leadBack leads clients to the old one again, if it still is there, by its checks; or has it in
// maintenance again, where others had it so.
func (t *turn) leadBack(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callLimit)
	defer cancel()
	all, err := t.r.Instances(ctx, t.cfg.Service)
	if err != nil {
		return fmt.Errorf("its maintenance may not be as before: %w", err)
	}
	switch at := slices.IndexFunc(all, t.old.same); {
	case at < 0 && t.old.others():
		return fmt.Errorf("%s was in maintenance (%q), and will not be when it is registered again", t.old, t.old.Reason)
	case at >= 0 && all[at].ours():
		return t.r.maintain(ctx, t.old, false, "")
	}
	return t.setAside(ctx, all)
}

// setAside has the old one in maintenance again, where others had it so, when it is first seen to be
// registered anew: maintenance outlives a start, but not that. Where the same start was in it and is
// no more, its owner has ended it.
func (t *turn) setAside(ctx context.Context, all []Instance) error {
	at := slices.IndexFunc(all, t.old.same)
	if at < 0 || !t.old.others() {
		return nil
	}
	switch i := all[at]; {
	case i.Drained:
		t.aside = i
	case i.is(t.aside):
		t.old.Drained = false
	default:
		if err := t.r.Drain(ctx, i, true, t.old.Reason); err != nil {
			return err
		}
		t.aside = i
	}
	return nil
}

// ours tells of one that Roll has drained, this one or one that was killed.
func (i Instance) ours() bool { return i.Drained && i.Reason == ourReason }

// others tells of one that somebody else has in maintenance.
func (i Instance) others() bool { return i.Drained && !i.ours() }

// kept tells of one that others keep clients from, by it or by its node.
func (i Instance) kept() bool { return i.others() || i.NodeDrained }

// is tells of two views of the same start of the same registration. Without a word for
// the start it is the registration's making that counts, and where it leads: a program
// that ends without a word and starts again elsewhere only changes it.
func (i Instance) is(o Instance) bool {
	return i.same(o) && i.Start == o.Start && (i.Start != "" || i.created == o.created && i.Address == o.Address && i.Port == o.Port)
}

// await waits for the new instance.
func (t *turn) await(ctx context.Context) error {
	return t.until(ctx, func(all []Instance) (string, bool) { return t.find(ctx, all) })
}

// until is the registry's, and says what is waited for.
func (t *turn) until(ctx context.Context, ok func([]Instance) (lacks string, done bool)) error {
	var said string
	return t.r.until(ctx, t.cfg.Service, func(all []Instance) (string, bool) {
		if err := t.setAside(ctx, all); err != nil {
			return err.Error(), false
		}
		lacks, done := ok(all)
		if !done && lacks != said {
			t.say("%s", lacks)
			said = lacks
		}
		return lacks, done
	})
}

// find takes the first new one that is well.
func (t *turn) find(ctx context.Context, all []Instance) (lacks string, found bool) {
	lacks = "no new instance is registered in its place"
	for _, i := range all {
		if slices.ContainsFunc(t.known, i.is) || slices.ContainsFunc(t.known, func(k Instance) bool { return t.another(k, i) }) {
			continue
		}
		if !i.Healthy {
			lacks = fmt.Sprintf("%s is new, but %s", i, cmp.Or(i.Trouble, "does not pass"))
			continue
		}
		says, err := t.judgedBefore(ctx, i)
		if err == nil && says == "" {
			says, err = t.r.healthyAtAgent(ctx, i)
		}
		if err != nil {
			says = err.Error()
		}
		if says == "" && t.cfg.Gate != nil {
			if err := t.cfg.Gate(ctx, i); err != nil {
				says = err.Error()
			}
		}
		if says == "" {
			t.now = i
			return "", true
		}
		lacks = fmt.Sprintf("%s is new, but %s", i, says)
	}
	return lacks, false
}

// another tells of one that was well beside the old one, and has started again: it is in its own
// place. An id of who had died before may be given to the new one.
func (t *turn) another(k, i Instance) bool { return k.same(i) && k.ID != t.old.ID && k.Healthy }

// judgedBefore says so of a registration that was only changed, until its agent must have
// checked it again: what its checks say is carried over, and of the start before.
func (t *turn) judgedBefore(ctx context.Context, i Instance) (lacks string, err error) {
	carried := func(k Instance) bool { return k.same(i) && k.created == i.created }
	if !slices.ContainsFunc(t.known, carried) {
		return "", nil
	}
	at := slices.IndexFunc(t.changed, func(c change) bool { return c.to.same(i) })
	if at < 0 {
		at, t.changed = len(t.changed), append(t.changed, change{})
	}
	if !t.changed[at].to.is(i) {
		t.changed[at] = change{to: i, at: time.Now()}
	}
	round, err := t.r.round(ctx, i)
	if err != nil || time.Since(t.changed[at].at) >= round {
		return "", err
	}
	return fmt.Sprintf("its checks, which take up to %v, may have passed on the one before", round), nil
}

// settle leads clients to the new one and removes what is left of the old, so that the
// registry has the one in the place of the other.
func (t *turn) settle(ctx context.Context) error {
	if t.now.ours() { // maintenance belongs to the id, and outlives a start
		if err := t.r.Drain(ctx, t.now, false, ""); err != nil {
			return err
		}
	}
	dropped, err := t.r.DropDuplicates(ctx, t.now)
	for _, i := range dropped {
		t.say("%s is deregistered: %s has its id", i, t.now)
	}
	if err != nil {
		return err
	}
	if !t.now.same(t.old) {
		if err := t.leave(ctx); err != nil {
			return err
		}
	}
	err = t.until(ctx, func(all []Instance) (string, bool) {
		at := slices.IndexFunc(all, t.now.same)
		if at < 0 {
			return t.now.String() + " has left again", false
		}
		t.now = all[at]
		return fmt.Sprintf("%s is %s", t.now, t.now.words()), t.now.Healthy && !t.now.ours()
	})
	if err != nil {
		return err
	}
	switch {
	case t.now.Drained:
		t.say("%s is well, and stays in maintenance (%q)", t.now, t.now.Reason)
	case t.now.NodeDrained:
		t.say("%s is well, and its node stays in maintenance (%q)", t.now, t.now.NodeReason)
	default:
		t.say("%s passes", t.now)
	}
	return nil
}

// leave waits until the old registration is gone, or removes it once it is dead: one
// that still passes has not ended, and the new one is not in its place.
func (t *turn) leave(ctx context.Context) error {
	var dead bool
	err := t.until(ctx, func(all []Instance) (string, bool) {
		at := slices.IndexFunc(all, t.old.is)
		if at < 0 {
			return "", true
		}
		dead = !all[at].Healthy
		return fmt.Sprintf("%s is there, but %s has not ended", t.now, t.old), dead
	})
	if err != nil || !dead {
		return err
	}
	t.say("%s is deregistered: it has ended", t.old)
	return t.r.Deregister(ctx, t.old)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
