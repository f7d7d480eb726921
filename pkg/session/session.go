// Package session is what the verbs do: parts of other rooms put together, run,
// and undone. It decides the order and nothing else.
//
// A connect has a drawn line. Above it is all that can fail for free: the
// cluster is asked, rights are checked, routes are compared, root's child is
// started. Below it things change, and each change is followed at once by its
// undo, so that whatever ends the session, an error, Ctrl-C in the middle of a
// step or a lost child, undoes exactly what was done, last first.
package session

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A Reporter is told how far a verb is. Steps follow each other; lines may come
// at any time and from any goroutine.
type Reporter interface {
	Begin(step string)
	Asks()                  // the step under way may ask a person, on the terminal
	Progress(detail string) // what the step under way waits for
	Done(result string)     // "": there was nothing to do
	Say(line string)
	Warn(line string) // what works less well than it could
}

// ErrLeft marks what could not be put back: it is on every error of an undo.
var ErrLeft = errors.New("not everything could be put back")

// undoLimit is how long one undo may take: a pod's grace and an API server that
// is slow, but not for ever.
const undoLimit = 45 * time.Second

// undo is what has been changed and how to change it back.
type undo struct {
	steps []undoStep
}

type undoStep struct {
	what  string
	do    func(ctx context.Context) error
	limit time.Duration
}

// add remembers a step; it is called as soon as the change may have been made.
func (u *undo) add(what string, do func(ctx context.Context) error) {
	u.addFor(undoLimit, what, do)
}

// addFor is add for what may take another time.
func (u *undo) addFor(limit time.Duration, what string, do func(ctx context.Context) error) {
	u.steps = append(u.steps, undoStep{what, do, limit})
}

// run undoes all, last first, whatever fails on the way. It does not stop when
// ctx ends: that is mostly why it is called.
func (u *undo) run(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var left []error
	for len(u.steps) > 0 {
		s := u.steps[len(u.steps)-1]
		u.steps = u.steps[:len(u.steps)-1]
		if err := s.run(ctx); err != nil {
			left = append(left, fmt.Errorf("%s: %w: %w", s.what, ErrLeft, err))
		}
	}
	return errors.Join(left...)
}

func (s undoStep) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	return s.do(ctx)
}
