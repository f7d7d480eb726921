package session

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// A course is what the verbs share: steps up, what runs beside them, a stay, and
// the way down, which undoes what was done.
type course struct {
	id       string
	since    time.Time
	but      string // what stays, said at the end: ", but for ..."
	reporter Reporter
	log      *slog.Logger

	undo undo

	// What runs beside the steps has two contexts: gctx ends when one of these
	// fails, and with it the stay; life ends when all is undone, because undoing
	// needs them, the wire above all.
	group sync.WaitGroup
	life  context.Context
	end   context.CancelFunc
	gctx  context.Context
	fail  context.CancelCauseFunc

	asked   chan struct{} // closed by leave
	leaving sync.Once
	over    chan struct{} // closed when all is undone
	result  error         // of the way down; after over

	wmu    sync.Mutex
	warned []string
}

type step struct {
	name string
	do   func(ctx context.Context) (result string, err error) // without a result there was nothing to do
}

func newCourse(reporter Reporter, log *slog.Logger) course {
	id := make([]byte, 4)
	rand.Read(id) // never fails
	return course{
		id: hex.EncodeToString(id), since: time.Now(), reporter: reporter, log: log,
		asked: make(chan struct{}), over: make(chan struct{}),
	}
}

// run takes the steps and stays until ctx ends, somebody asks to leave or
// something cannot go on.
func (c *course) run(ctx context.Context, steps []step) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	c.life, c.end = context.WithCancel(context.WithoutCancel(ctx))
	c.gctx, c.fail = context.WithCancelCause(c.life)
	c.group.Go(func() {
		select {
		case <-c.asked:
			stop()
		case <-c.life.Done():
		}
	})
	err := c.up(ctx, steps)
	if err == nil {
		err = c.stay(ctx)
	}
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, c.down(ctx))
}

// leave asks run to end; it does not wait.
func (c *course) leave() { c.leaving.Do(func() { close(c.asked) }) }

// up takes the steps. What runs beside them and fails ends them.
func (c *course) up(ctx context.Context, steps []step) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(c.gctx, func() { stop(context.Cause(c.gctx)) })()
	for _, s := range steps {
		c.reporter.Begin(s.name)
		result, err := s.do(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		c.reporter.Done(result)
	}
	return nil
}

// stay waits until somebody wants to stop or something cannot go on.
func (c *course) stay(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-c.gctx.Done():
		return context.Cause(c.gctx)
	}
}

// down undoes what was done and ends what runs.
func (c *course) down(ctx context.Context) error {
	changed := len(c.undo.steps) > 0
	if changed {
		c.reporter.Begin("putting everything back")
	}
	c.result = c.undo.run(ctx)
	close(c.over)
	c.end()
	c.group.Wait()
	if changed && c.result == nil {
		c.reporter.Done("this machine and the cluster are as before" + c.but)
	}
	return c.result
}

// background runs what lives as long as the session. That it ends with ctx is
// no error; that it ends otherwise ends the session.
func (c *course) background(what string, run func(ctx context.Context) error) {
	c.group.Go(func() {
		err := run(c.life)
		if c.life.Err() != nil {
			return
		}
		if err == nil {
			err = net.ErrClosed
		}
		c.fail(fmt.Errorf("%s: %w", what, err))
	})
}

// alongside runs what is ended before the undo is over; stop ends it and waits.
func (c *course) alongside(run func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(c.life)
	ended := make(chan struct{})
	c.group.Go(func() {
		defer close(ended)
		run(ctx)
	})
	return func() { cancel(); <-ended }
}

// preflight asks for the rights and warns of what is less good without some.
func (c *course) preflight(ctx context.Context, k *kube.Cluster, needs ...kube.Need) (*kube.Rights, error) {
	rights, err := k.Preflight(ctx, needs...)
	if err == nil {
		err = rights.Err()
	}
	if err != nil {
		return nil, err
	}
	c.warnAll(rights.Notices)
	return rights, nil
}

func (c *course) warnAll(lines []string) {
	for _, line := range lines {
		c.warn(line)
	}
}

// warn says a line once.
func (c *course) warn(line string) {
	c.wmu.Lock()
	known := slices.Contains(c.warned, line)
	if !known {
		c.warned = append(c.warned, line)
	}
	c.wmu.Unlock()
	if !known {
		c.reporter.Warn(line)
	}
}

// warnings are the lines said by warn.
func (c *course) warnings() []string {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return append([]string{}, c.warned...)
}
