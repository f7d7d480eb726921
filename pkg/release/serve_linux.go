package release

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
)

// Serve answers a deployer until the wire is gone, and closes it. If ctx ends, what is being
// activated is put back first.
//
// The process should ignore SIGHUP and SIGPIPE: a wire that breaks must not end it before it
// has finished. Of standard input and output, Close has to close both.
func Serve(ctx context.Context, rw io.ReadWriteCloser, opts Options) (err error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s := &session{opts: opts, wire: newWire(rw, cmp.Or(opts.silence, silence))}
	defer func() {
		err = errors.Join(err, s.conclude())
		s.wire.close()
		s.release()
	}()
	for {
		select {
		case f, open := <-s.wire.frames:
			if !open {
				return s.wire.why()
			}
			if err := s.take(ctx, f); err != nil {
				return err
			}
		case <-s.wire.gone.Done():
			return s.wire.why()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// A session is one deployer's.
type session struct {
	opts Options
	wire *wire

	hello   *Hello // what was asked for, as it will be done
	as      *person
	nobody  error     // why it cannot be done as the policy's user
	refused []Problem // of it, by the policy
	disk    *disk     // nil until hello, and as long as there is no such folder
	lock    *os.File  // held; nil: not

	parts   parts
	shipped *arrival // what is offered
	swallow bool     // data that nobody wants any more
	next    *plan    // what activate will do
	last    *plan    // what it did, and finish has not marked
}

// A plan is where activate goes.
type plan struct {
	op      string
	release string
	run     *run // once it has begun
}

// take answers one frame. An error is the end of the session.
func (s *session) take(ctx context.Context, f frame) error {
	if f.kind == kindData {
		if !s.swallow {
			return errors.New("data that was not asked for")
		}
		s.swallow = len(f.payload) > 0
		return nil
	}
	m, err := unpack(f.kind, f.payload)
	if err != nil {
		return err
	}
	answer, err := s.answer(ctx, m)
	if err != nil {
		s.wire.say(message{Error: asError(err)})
		return nil
	}
	if answer == nil {
		return nil // to a part
	}
	text, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	s.wire.say(message{Answer: text})
	return nil
}

// asError is what a deployer gets to know.
func asError(err error) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case isFull(err):
		return &Error{Code: Space, Text: err.Error()}
	}
	return &Error{Code: Failed, Text: err.Error()}
}

func errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Text: fmt.Sprintf(format, args...)}
}

func (s *session) answer(ctx context.Context, m message) (any, error) {
	if m.Ask == "hello" {
		return with(m, s.greet)
	}
	if s.hello == nil {
		return nil, errorf(Misused, "%q before hello", m.Ask)
	}
	switch m.Ask {
	case "list":
		return with(m, func(struct{}) (listed, error) { return s.list() })
	case "rollback":
		return with(m, s.choose)
	case "exec":
		return with(m, func(c command) (exited, error) { return s.exec(ctx, c) })
	case "offer":
		return s.offerPart(m)
	case "lock":
		return with(m, func(l Lock) (Locked, error) { return s.acquire(ctx, l) })
	}
	if s.lock == nil {
		return nil, errorf(Misused, "%q without the lock", m.Ask)
	}
	switch m.Ask {
	case "ship":
		return with(m, func(struct{}) (struct{}, error) { return struct{}{}, s.ship(ctx) })
	case "activate":
		return with(m, func(a activation) (Result, error) { return s.activate(ctx, a) })
	case "finish":
		return with(m, func(struct{}) (Finished, error) { return s.finish() })
	case "revert":
		return with(m, func(struct{}) (Result, error) { return s.revert(ctx) })
	case "restart":
		return with(m, func(struct{}) (Result, error) { return s.restart(ctx) })
	}
	return nil, errorf(Misused, "this culvert does not know %q", m.Ask)
}

// with hands a request to what answers it.
func with[Q, A any](m message, do func(Q) (A, error)) (any, error) {
	var q Q
	if err := json.Unmarshal(m.With, &q); err != nil {
		return nil, errorf(Misused, "%s: %v", m.Ask, err)
	}
	return do(q)
}
