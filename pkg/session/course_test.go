package session

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"go.uber.org/goleak"
)

type silent struct{}

func (silent) Begin(string)    {}
func (silent) Asks()           {}
func (silent) Progress(string) {}
func (silent) Done(string)     {}
func (silent) Say(string)      {}
func (silent) Warn(string)     {}

// TestUndoHasWhatRuns: something that runs beside the steps fails; what the undo
// needs, as the wire, still runs, and ends after it.
func TestUndoHasWhatRuns(t *testing.T) {
	defer goleak.VerifyNone(t)
	c := newCourse(silent{}, slog.New(slog.DiscardHandler))
	broken := errors.New("broken")
	ran := make(chan error, 1)
	err := c.run(t.Context(), []step{
		{"wire", func(context.Context) (string, error) {
			c.background("wire", func(ctx context.Context) error { <-ctx.Done(); ran <- ctx.Err(); return nil })
			c.undo.add("leave", func(context.Context) error {
				select {
				case <-ran:
					return errors.New("the wire was gone first")
				default:
					return nil
				}
			})
			return "", nil
		}},
		{"rest", func(ctx context.Context) (string, error) {
			c.background("rest", func(context.Context) error { return broken })
			<-ctx.Done()
			return "", ctx.Err()
		}},
	})
	if !errors.Is(err, broken) || errors.Is(err, ErrLeft) {
		t.Error(err)
	}
	if len(ran) != 1 {
		t.Error("the wire still runs")
	}
}

// TestAskedToLeave: it is no error.
func TestAskedToLeave(t *testing.T) {
	defer goleak.VerifyNone(t)
	c := newCourse(silent{}, slog.New(slog.DiscardHandler))
	undone := false
	err := c.run(t.Context(), []step{{"one", func(context.Context) (string, error) {
		c.undo.add("one", func(context.Context) error { undone = true; return nil })
		c.leave()
		return "", nil
	}}})
	if err != nil || !undone {
		t.Errorf("%v, undone %v", err, undone)
	}
}
