package resolver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// file is ModeFile and ModeResolvconf: an entry, and resolv.conf as the living
// entries want it.
type file struct {
	paths
	mode Mode
	log  *slog.Logger

	held   *os.File    // our entry, locked; nil while nothing is set
	fought []time.Time // when it was rewritten, as often as is not too often and once more
}

// Somebody who writes resolv.conf at every turn, as another VPN does that
// watches it, is left to it.
const (
	fightRounds = 5
	fightTime   = time.Minute
)

func (f *file) set(ctx context.Context, s Settings) error {
	unlock, err := f.transaction(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if f.held == nil && f.fighting() {
		return fmt.Errorf("%s is written again and again by somebody else", f.conf)
	}
	if err := f.enter(entry{f.mode, s}); err != nil {
		return err
	}
	_, err = f.settle()
	return err
}

// enter writes our entry, locked before it can be seen.
func (f *file) enter(e entry) error {
	path := f.entryPath(e.Link)
	old, lives, err := readLocked(path)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case lives && f.held == nil:
		return fmt.Errorf("%s: %w", path, ErrBusy)
	case lives && bytes.Equal(old, e.render()):
		return nil
	}
	to, err := f.private()
	if err != nil {
		return err
	}
	_, err = to.Write(e.render())
	err = errors.Join(err, lock(to), to.Chmod(0o644))
	if err == nil {
		err = os.Rename(f.tmp, path)
	}
	if err != nil {
		return errors.Join(err, to.Close(), os.Remove(f.tmp))
	}
	f.letGo()
	f.held = to
	return nil
}

// letGo is how a session leaves, and how it is left when it is killed: what is
// not locked any more is tidied up by whoever settles next.
func (f *file) letGo() {
	if f.held != nil {
		f.held.Close()
	}
	f.held = nil
}

// follow settles what somebody else did.
func (f *file) follow(ctx context.Context) error {
	unlock, err := f.transaction(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if f.held == nil {
		return nil
	}
	rewritten, err := f.settle()
	if err != nil || !rewritten {
		return err
	}
	f.fought = append(f.fought[max(0, len(f.fought)-fightRounds):], time.Now())
	if !f.fighting() {
		f.log.Info("resolv.conf was rewritten: what it said is the original now")
		return nil
	}
	f.log.Warn("resolv.conf is written again and again by somebody else: left to them")
	f.letGo()
	_, err = f.settle()
	return err
}

func (f *file) fighting() bool {
	return len(f.fought) > fightRounds && time.Since(f.fought[0]) < fightTime
}

func (f *file) revert(ctx context.Context) error {
	f.letGo()
	unlock, err := f.transaction(ctx)
	if err == nil {
		defer unlock()
	} // without the lock it is still better to put it back than not to
	_, err = f.settle()
	return err
}

// settle makes resolv.conf what the living sessions want, and puts it back
// where there are none. Nothing else writes it: who begins or ends, who finds
// that a session died or that somebody rewrote the file, changes only what
// there is to settle. rewritten tells that the file was not ours.
func (p paths) settle() (rewritten bool, err error) {
	living, dead, err := p.entries()
	if err != nil {
		return false, err
	}
	switch {
	case len(living) == 0:
		err = errors.Join(p.unregister(dead), p.putBack())
	case living[0].mode == ModeResolvconf:
		err = p.register(living[0])
	default:
		rewritten, err = p.lead(living, false, false)
	}
	if err != nil {
		return rewritten, err
	}
	for _, path := range dead {
		err = errors.Join(err, os.Remove(path))
	}
	return rewritten, err
}

// lead has resolv.conf name the server of the last to come; those before it are
// asked by that one. What somebody else wrote there is the original from now on, also
// if it was written while we looked. since tells that it was written after what is kept,
// whatever their times say.
func (p paths) lead(living []entry, rewritten, since bool) (bool, error) {
	was, err := os.Lstat(p.conf) // nil if there is none
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rewritten, err
	}
	text, err := os.ReadFile(p.conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rewritten, err
	}
	theirs, err := p.keep(p.conf, text, since || p.since(p.conf))
	if rewritten = rewritten || theirs; err != nil {
		return rewritten, fmt.Errorf("keep the original: %w", err)
	}
	orig, err := readOriginal(p.kept)
	if err != nil {
		return rewritten, err
	}
	var links []string
	for _, e := range living {
		links = append(links, e.Link)
	}
	want := orig.over(living[0].Settings, links)
	if bytes.Equal(text, want) {
		return rewritten, nil
	}
	err = p.write(was, text, want)
	if errors.Is(err, errMeanwhile) {
		return p.lead(living, true, false)
	}
	if err != nil {
		return rewritten, err
	}
	// Up to here what is kept was touched, so that its time says nothing of who has put a
	// copy back meanwhile. What is not ours is heard of.
	p.elapse()
	now, err := os.ReadFile(p.conf)
	if err == nil && !since && markOf(now) != "" && !bytes.Equal(now, want) {
		return p.lead(living, true, true)
	}
	return rewritten, nil
}

// leftovers are the files that no living session answers for.
func (p paths) leftovers() ([]string, error) {
	living, dead, err := p.entries()
	if err != nil || len(living) > 0 {
		return dead, err
	}
	text, err := os.ReadFile(p.conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	_, err = os.Lstat(p.kept)
	switch {
	case markOf(text) != "":
		return append([]string{p.conf}, dead...), nil
	case err == nil:
		return append([]string{p.kept}, dead...), nil
	}
	return dead, nil
}

// restore undoes what dead sessions left.
func (p paths) restore(ctx context.Context) error {
	if left, err := p.leftovers(); len(left) == 0 || err != nil {
		return err // nothing to do needs no lock, nor rights
	}
	unlock, err := p.transaction(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = p.settle()
	return err
}

// transaction keeps other sessions out while files are moved. The wait is
// bounded, since any user could hold such a lock.
func (p paths) transaction(ctx context.Context) (unlock func() error, err error) {
	dir, err := os.Open(p.dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return dir.Close, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", p.dir, err), dir.Close())
		}
	}
}
