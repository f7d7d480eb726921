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

	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/kube"
)

// A course is what the verbs share: steps up, what runs beside them, a stay, and
// the way down, which undoes what was done.
type course struct {
	id       string
	since    time.Time
	restored string       // said at the end: what is as before
	but      string       // and what stays: ", but for ..."
	isUp     func() error // called between the way up and the stay; may be nil
	lend     func() *loan // what a later verb may use of this one; may be nil, and so may that
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
	undoing chan struct{} // closed when that begins
	over    chan struct{} // closed when all is undone
	result  error         // of the way down; after over

	wmu     sync.Mutex
	warned  []string
	refused error // why the API server does not accept the credentials any more
}

type step struct {
	name string
	do   func(ctx context.Context) (result string, err error) // without a result there was nothing to do
}

func newCourse(reporter Reporter, log *slog.Logger) course {
	id := make([]byte, 4)
	rand.Read(id) // never fails
	return course{
		id: hex.EncodeToString(id), since: time.Now(), restored: "this machine and the cluster are", reporter: reporter, log: log,
		asked: make(chan struct{}), undoing: make(chan struct{}), over: make(chan struct{}),
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
	if err == nil && c.isUp != nil {
		err = c.isUp()
	}
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
	close(c.undoing)
	c.result = c.undo.run(ctx)
	close(c.over)
	c.end()
	c.group.Wait()
	if changed && c.result == nil {
		c.reporter.Done(c.restored + " as before" + c.but)
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

// ask is a connection to a nameserver that no socket leads to.
func (c *course) ask(names *dns.Server, network string) net.Conn {
	near, far := net.Pipe()
	c.group.Go(func() { names.Serve(c.life, far, network == "tcp") })
	return near
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
	c.background("credentials", func(ctx context.Context) error {
		return k.Refused(ctx, func(err error) { c.credentials(k, err) })
	})
	return rights, nil
}

// credentials tells of those that are not accepted any more, and nil that they are again.
func (c *course) credentials(k *kube.Cluster, err error) {
	c.wmu.Lock()
	c.refused = err
	c.wmu.Unlock()
	if err == nil {
		c.reporter.Say("the API server accepts the credentials again")
		return
	}
	what := "end this session and begin another with credentials that are valid"
	if k.Plugin != "" {
		what = "log in again, if this machine is not just offline"
	}
	c.reporter.Warn(fmt.Sprintf("%v: what is open goes on, but what changes in the cluster is not seen, and a wire that is lost stays so; %s", err, what))
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
	all := append([]string{}, c.warned...)
	if c.refused != nil {
		all = append(all, c.refused.Error())
	}
	return all
}
