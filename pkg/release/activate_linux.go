package release

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/process"
)

// A run is an activation or a restart, from its first change to its last. It is on the disk
// before the first, for whoever comes after a kill -9.
type run struct {
	Run      string    `json:"run"` // as in the log
	Op       string    `json:"op"`
	Release  string    `json:"release"`
	Previous string    `json:"previous,omitempty"` // what current led to, "" for nothing
	Config   Config    `json:"config"`
	Since    time.Time `json:"since"`

	s        *session
	id       string // the release that its phases are about: Release, or what is put back
	switched int64  // when, in ticks since the machine was started
	drained  bool
	touched  bool // what runs may not be as it was
	ready    bool // it passed its gate
}

// A step is a phase that failed.
type step struct {
	phase  string
	err    error
	output string
}

func (f *step) Error() string { return f.phase + ": " + f.err.Error() }
func (f *step) Unwrap() error { return f.err }

// activate goes to what was shipped or chosen. If that fails the host is put back.
func (s *session) activate(ctx context.Context, a activation) (Result, error) {
	if s.next == nil {
		return Result{}, errorf(Misused, "activate before ship or rollback")
	}
	p := s.next
	s.next = nil
	if info, err := s.disk.Lstat(releaseDir(p.release)); err != nil || !info.IsDir() {
		return Result{}, errorf(None, "there is no release %s", p.release)
	}
	if info, err := s.disk.Lstat(currentLink); err == nil && info.Mode()&fs.ModeSymlink == 0 {
		return Result{}, s.inTheWay()
	}
	r, err := s.begin(p.op, p.release)
	if err != nil {
		return Result{}, err
	}
	result := r.forward(ctx)
	if result.State != StateActive {
		return result, nil
	}
	p.run, s.last = r, p
	if a.Finish {
		if _, err := r.good(); err != nil { // the deployer asks for it by itself then, and is told
			s.opts.Log.Warn("cannot mark as good", "err", err)
		} else {
			p.run, result.Finished = nil, true
		}
	}
	return result, nil
}

// begin writes down what is going to be done.
func (s *session) begin(op, id string) (*run, error) {
	now := time.Now().UTC()
	r := &run{Run: now.Format("20060102T150405.000000000"), Op: op, Release: id, Previous: s.linked(), Config: s.hello.Config, Since: now, s: s, id: id}
	err := s.disk.replace(runFile, func(w io.Writer) error { return json.NewEncoder(w).Encode(r) })
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", runFile, err)
	}
	return r, r.record(eventBegun, nil)
}

func (r *run) record(event string, why *step) error {
	line := record{Event: event, Op: r.Op, Run: r.Run, Release: r.Release, Previous: r.Previous}
	if why != nil {
		line.Phase, line.Error = why.phase, why.err.Error()
	}
	if event == eventGood {
		line.Up = &up{r.Config.Restart, r.Config.Health}
	}
	return r.s.record(line)
}

// asBefore is the run with the restart and the gate by which what is put back was good once; nil
// where these are not known, not allowed any more, or what was tried. Where nothing was restarted
// then, it is today's restart that ends what failed.
func (r *run) asBefore() *run {
	var up *up
	log, _ := r.s.records()
	for _, line := range log {
		if line.Event == eventGood && line.Release == r.id {
			up = line.Up
		}
	}
	if up == nil {
		return nil
	}
	then := *r
	then.Config.Restart, then.Config.Health = cmp.Or(up.Restart, r.Config.Restart), up.Health
	is, was := &then.Config, &r.Config
	if same(is.Restart, was.Restart) && same(is.Health, was.Health) || is.Check() != nil || len(r.s.opts.Policy.check(is)) > 0 {
		return nil
	}
	return &then
}

func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }

// over: nothing is left to be done after a kill.
func (r *run) over() error { return r.s.disk.unlink(runFile) }

// forward goes through the phases.
func (r *run) forward(ctx context.Context) Result {
	previous := r.s.idOf(r.Previous)
	if err := r.phases(ctx); err != nil {
		var f *step
		if !errors.As(err, &f) {
			f = &step{phase: PhaseSwitch, err: err}
		}
		return r.back(ctx, f)
	}
	return Result{State: StateActive, Release: r.Release, Previous: previous}
}

func (r *run) phases(ctx context.Context) error {
	hooks := r.Config.Hooks
	if r.Previous != "" { // else nothing is there that could be drained
		if err := r.do(ctx, PhaseDrain, r.Config.Drain != nil, r.drain); err != nil {
			return err
		}
	}
	if err := r.do(ctx, PhasePreRelease, r.Op != opRestart && hooks.PreRelease != "", func(ctx context.Context) (string, error) {
		r.touched = true
		return r.hook(ctx, PhasePreRelease, hooks.PreRelease)
	}); err != nil {
		return err
	}
	if err := r.do(ctx, PhaseSwitch, r.Op != opRestart, func(context.Context) (string, error) {
		r.touched = true
		return "", r.s.lead(path.Join(releasesDir, r.Release))
	}); err != nil {
		return err
	}
	r.touched, r.switched = true, ticks()
	if err := r.comeUp(ctx); err != nil {
		return err
	}
	r.ready = true
	if err := r.record(eventPassed, nil); err != nil {
		return err
	}
	return r.afterGate(ctx)
}

// comeUp restarts what runs, and waits until it is of the release.
func (r *run) comeUp(ctx context.Context) error {
	if err := r.do(ctx, PhaseRestart, r.Config.Restart != nil, r.restart); err != nil {
		return err
	}
	gate := r.Config.Health != nil || r.Config.Restart != nil
	return r.do(ctx, PhaseHealth, gate, r.gate)
}

// afterGate is what is left when a release has passed.
func (r *run) afterGate(ctx context.Context) error {
	if err := r.do(ctx, PhaseUndrain, r.drained, r.undrain); err != nil {
		return err
	}
	hook := r.Config.Hooks.PostRelease
	return r.do(ctx, PhasePostRelease, r.Op != opRestart && hook != "", func(ctx context.Context) (string, error) {
		return r.hook(ctx, PhasePostRelease, hook)
	})
}

// do does one phase, if there is something to do.
func (r *run) do(ctx context.Context, phase string, there bool, what func(context.Context) (output string, err error)) error {
	if !there {
		return nil
	}
	if ctx.Err() != nil {
		return &step{phase: phase, err: context.Cause(ctx)}
	}
	r.s.wire.tell(Event{Kind: "phase", Phase: phase})
	if output, err := what(ctx); err != nil {
		if len(err.Error()) > maxText {
			err = errors.New(shorten(err.Error()))
		}
		return &step{phase, err, output}
	}
	return nil
}

// back puts the host into the state that it had, as far as something was done.
func (r *run) back(ctx context.Context, why *step) Result {
	ctx = context.WithoutCancel(ctx)
	r.s.wire.tell(Event{Kind: "phase", Phase: PhaseRestore, Text: why.Error()})
	result := Result{State: StateRestored, Phase: why.phase, Error: why.err.Error(), Output: why.output}
	err := errors.Join(r.record(eventLeaving, why), r.restore(ctx)) // a full disk keeps nobody from going back
	event := eventRestored
	if err != nil {
		event, result.State = eventBroken, StateBroken
		result.Error += "; and what was put back: " + err.Error()
	}
	if err := errors.Join(r.record(event, why), r.over()); err != nil {
		result.Error += "; " + err.Error()
	}
	result.Error = shorten(result.Error)
	result.Release, _ = r.s.current()
	result.Previous = r.s.idOf(r.Previous)
	return result
}

// restore goes on after a failure, to leave as little broken as can be.
func (r *run) restore(ctx context.Context) error {
	var errs []error
	if r.Op != opRestart && r.s.linked() != r.Previous {
		errs = append(errs, r.do(ctx, PhaseSwitch, true, func(context.Context) (string, error) { return "", r.s.lead(r.Previous) }))
	}
	r.switched, r.id = ticks(), r.s.idOf(r.Previous)
	if r.touched && r.Previous != "" {
		errs = append(errs, r.comeBack(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err // what is broken gets no requests
	}
	return r.do(ctx, PhaseUndrain, r.drained, r.undrain)
}

// lead makes current lead somewhere, at once; "" removes it. At no moment there is none.
func (s *session) lead(to string) error {
	if to == "" {
		if err := s.disk.unlink(currentLink); err != nil {
			return err
		}
		return s.disk.sync(".")
	}
	if s.linked() == to {
		return nil
	}
	if err := s.disk.unlink(nextLink); err != nil { // of somebody who was killed
		return err
	}
	if err := s.disk.symlink(to, nextLink); err != nil {
		return err
	}
	if err := s.disk.rename(nextLink, currentLink); err != nil {
		return err
	}
	return s.disk.sync(".")
}

// finish marks what was activated as good, and prunes.
func (s *session) finish() (Finished, error) {
	if s.last == nil || s.last.run == nil {
		return Finished{}, errorf(Misused, "finish before activate")
	}
	r := s.last.run
	s.last.run = nil
	return r.good()
}

func (r *run) good() (Finished, error) {
	s, previous := r.s, r.s.idOf(r.Previous)
	if err := r.record(eventGood, nil); err != nil {
		return Finished{}, err
	}
	if r.Op == opRollback && previous != "" && previous != r.Release {
		if err := s.leave(previous, r.Release); err != nil {
			return Finished{}, err
		}
	}
	if err := r.over(); err != nil {
		return Finished{}, err
	}
	gone, err := s.prune(previous)
	if err != nil { // the release is good all the same
		s.opts.Log.Warn("cannot prune", "err", err)
		s.note("", "old releases are not all gone: "+err.Error())
	}
	return Finished{Pruned: gone}, nil
}

// leave marks a release that was gone back from: it is not what another rollback goes to. Who
// goes forward again leaves nothing.
func (s *session) leave(id, to string) error {
	all, err := s.here()
	if err != nil {
		return err
	}
	at := func(id string) int { return slices.IndexFunc(all, func(r Release) bool { return r.ID == id }) }
	if at(id) < at(to) {
		return nil
	}
	return s.record(record{Event: eventLeft, Release: id})
}

// revert goes back to what was there before activate.
func (s *session) revert(ctx context.Context) (Result, error) {
	if s.last == nil {
		return Result{}, errorf(Misused, "revert before activate")
	}
	r := s.last.run
	if r == nil {
		return Result{}, errorf(Misused, "revert after finish")
	}
	s.last = nil
	why := &step{phase: "revert", err: errors.New("the deployer went back")}
	if r.Previous != "" {
		if err := r.do(ctx, PhaseDrain, r.Config.Drain != nil, r.drain); err != nil {
			s.note(PhaseDrain, err.Error())
		}
	}
	return r.back(ctx, why), nil
}

// restart restarts what is current.
func (s *session) restart(ctx context.Context) (Result, error) {
	if err := s.unfinished(); err != nil {
		return Result{}, err
	}
	id, link := s.current()
	if link == "" {
		return Result{}, s.nothing()
	}
	if s.hello.Config.Restart == nil {
		return Result{}, errorf(Misused, "nothing says how %s is restarted", s.hello.App)
	}
	r, err := s.begin(opRestart, id)
	if err != nil {
		return Result{}, err
	}
	result := r.forward(ctx)
	if result.State == StateActive {
		err = errors.Join(r.record(eventGood, nil), r.over())
	}
	return result, err
}

// conclude ends by itself what the deployer has left.
func (s *session) conclude() error {
	if s.last == nil || s.last.run == nil {
		return nil
	}
	_, err := s.finish()
	return err
}

// comeBack is comeUp of what is put back: as today's settings have it, and if these are not right for
// it, as it came up when it was good.
func (r *run) comeBack(ctx context.Context) error {
	err := r.comeUp(ctx)
	if err == nil {
		return nil
	}
	then := r.asBefore()
	if then == nil {
		return err
	}
	r.s.note(PhaseRestore, r.id+" does not come up by today's settings: by those that it was good by")
	if then.comeUp(ctx) != nil {
		return err
	}
	return nil
}

// repair ends what a killed apply has begun. What had passed its gate is good; else the release
// before is put back, for nobody knows how far it came.
func (s *session) repair(ctx context.Context) (done string, err error) {
	r, passed, err := s.interrupted()
	if err != nil || r == nil {
		return "", errors.Join(err, s.disk.unlink(runFile))
	}
	s.wire.tell(Event{Kind: "phase", Phase: PhaseRepair, Text: "the deploy of " + r.Release + " was interrupted"})
	if refused := s.opts.Policy.check(&r.Config); len(refused) > 0 {
		return "", &Error{Code: Refused, Text: "the deploy of " + r.Release + " was interrupted, and " + refused[0].Text}
	}
	r.drained, r.touched = r.Config.Drain != nil && r.Previous != "", true
	if passed && s.linked() == path.Join(releasesDir, r.Release) {
		if err := r.afterGate(ctx); err != nil {
			s.note(PhaseRepair, err.Error())
		}
		_, err := r.good()
		return "release " + r.Release + " had passed its gate, and is good", err
	}
	result := r.back(ctx, &step{phase: PhaseRepair, err: errors.New("its apply was killed")})
	done = "release " + r.Release + " was not finished; "
	switch {
	case result.State == StateBroken:
		done += result.Error
	case result.Release == "":
		done += "there was none before"
	default:
		done += result.Release + " is current again"
	}
	return done, nil
}

// interrupted is what a killed apply had begun, nil for nothing, and whether it had passed its gate.
func (s *session) interrupted() (r *run, passed bool, err error) {
	if s.disk == nil {
		return nil, false, nil
	}
	f, err := s.disk.own(runFile, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxMessage)) // no longer than the hello that it is from
	if err != nil {
		return nil, false, err
	}
	r = &run{s: s}
	if err := json.Unmarshal(text, r); err != nil || CheckID(r.Release) != nil && r.Op != opRestart {
		return nil, false, fmt.Errorf("read %s: %w", runFile, err)
	}
	log, err := s.records()
	begun := false
	for _, line := range log {
		if line.Run == r.Run {
			begun = begun || line.Event == eventBegun
			passed = line.Event == eventPassed || passed && line.Event != eventLeaving
			if line.ends() {
				return nil, false, err
			}
		}
	}
	if !begun {
		return nil, false, err
	}
	r.id = r.Release
	return r, passed, err
}

func (s *session) inTheWay() error {
	to := s.hello.To
	return &Error{Code: Failed, Text: path.Join(to, currentLink) + " is not a link", Hint: adopt(to)}
}

// adopted is the release that was made by a hint, of what was there before.
const adopted = releasesDir + "/before"

// adopt makes a release of a folder that is in current's place.
func adopt(to string) string {
	return fmt.Sprintf("cd %s && mkdir -p releases && mv -T current %[2]s && ln -s %[2]s current", process.Quote(to), adopted)
}

// adoptAll makes a release of all that is in the app's folder, but for what is mounted there.
func adoptAll(to string) string {
	return fmt.Sprintf("cd %s && mkdir -p %[2]s && find . -mindepth 1 -maxdepth 1 ! -name releases ! -name shared ! -name lost+found ! -exec mountpoint -q {} \\; -exec mv -t %[2]s {} + && ln -s %[2]s current", process.Quote(to), adopted)
}

// choose is what activate would go back to.
func (s *session) choose(q rollback) (Choice, error) {
	all, err := s.here()
	if err != nil {
		return Choice{}, err
	}
	all = slices.DeleteFunc(all, func(r Release) bool { return r.State == StateIncoming })
	if err := s.unfinished(); err != nil {
		return Choice{}, err
	}
	current, _ := s.current()
	to := target(all)
	if q.Release != "" {
		i := slices.IndexFunc(all, func(r Release) bool { return r.ID == q.Release })
		if i < 0 {
			return Choice{}, errorf(None, "there is no release %q here", q.Release)
		}
		to = &all[i]
	}
	if to == nil {
		return Choice{}, errorf(None, "there is no good release before %s to go back to", currentName(current))
	}
	if s.lock != nil {
		s.next, s.last = &plan{op: opRollback, release: to.ID}, nil
	}
	return Choice{Release: *to, Current: current}, nil
}

// unfinished refuses to begin something new before what was activated has been decided on.
func (s *session) unfinished() error {
	if s.last != nil && s.last.run != nil {
		return errorf(Misused, "release %s is neither finished nor reverted", s.last.release)
	}
	return nil
}

func currentName(id string) string {
	if id == "" {
		return "the current one"
	}
	return id
}
