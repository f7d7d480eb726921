package release

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

// A Client is the deployer's end of a wire. Its methods are called one after the other. The
// error is an *Error where it is the host's answer; any other means that the wire is of no
// more use, as does a context that has ended: then the wire is closed.
type Client struct {
	rw   io.ReadWriteCloser
	out  *frameWriter
	in   chan message // what the host says; closed at the end of the wire
	mu   sync.Mutex
	err  error // why the wire is gone
	gone chan struct{}
	all  sync.WaitGroup

	offer []Piece // what was missing of the last one
	ahead string  // the id of an offer that was sent with lock, and is not answered yet
}

// NewClient takes a wire over. Close gives it up.
func NewClient(rw io.ReadWriteCloser) *Client {
	c := &Client{rw: rw, out: newFrameWriter(rw), in: make(chan message), gone: make(chan struct{})}
	c.all.Go(c.read)
	c.all.Go(c.beat)
	return c
}

// Close closes the wire, and returns when nothing of the client is left. The host then
// ends by itself what has been begun.
func (c *Client) Close() error {
	c.fail(net.ErrClosed)
	c.all.Wait()
	return nil
}

// fail closes the wire. The first to do so says why.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.gone)
		c.rw.Close()
	}
}

func (c *Client) why() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// ErrStranger is of a wire whose other end is not Serve.
var ErrStranger = errors.New("what answers is not culvert apply, or its shell says something first")

// stranger is an error where the first words are none of ours: a shell that greets, or a forced
// command that is another.
func stranger(r *bufio.Reader) error {
	head, err := r.Peek(frameHead)
	if err != nil || kind(head[frameHead-1]) <= kindBeat {
		return nil // or torn, of which readFrame tells
	}
	said, _ := r.Peek(min(r.Buffered(), 80))
	return fmt.Errorf("%w: %q", ErrStranger, said)
}

func (c *Client) read() {
	defer close(c.in)
	quiet := time.AfterFunc(silence, func() { c.fail(errSilent) })
	defer quiet.Stop()
	r := bufio.NewReader(c.rw)
	if err := stranger(r); err != nil {
		c.fail(err)
		return
	}
	for {
		k, payload, err := readFrame(r)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF // it is we who end
			}
			c.fail(fmt.Errorf("the host hung up: %w", err))
			return
		}
		if k == kindBeat {
			quiet.Reset(silence)
			continue
		}
		m, err := unpack(k, payload)
		if k == kindData {
			err = errors.New("data from a host")
		}
		if err != nil {
			c.fail(err)
			return
		}
		quiet.Stop() // it may be a while before somebody wants the answer to what was sent ahead
		select {
		case c.in <- m:
		case <-c.gone:
			return
		}
		quiet.Reset(silence)
	}
}

var errSilent = fmt.Errorf("nothing was heard of the other end for %v", silence)

func (c *Client) beat() {
	every := time.NewTicker(beatEvery)
	defer every.Stop()
	for {
		select {
		case <-every.C:
			if err := c.out.frame(kindBeat, nil); err != nil {
				c.fail(err)
			}
		case <-c.gone:
			return
		}
	}
}

// until has the wire end with ctx: now, if that has ended, so that nothing is asked any more.
func (c *Client) until(ctx context.Context) (stop func() bool) {
	end := func() { c.fail(context.Cause(ctx)) }
	if ctx.Err() != nil {
		end()
	}
	return context.AfterFunc(ctx, end)
}

// asked sends a request and waits for its answer.
func asked[T any](ctx context.Context, c *Client, what string, with any, events func(Event)) (answer T, err error) {
	defer c.until(ctx)()
	if err := c.send(what, with); err != nil {
		return answer, err
	}
	err = c.answer(&answer, events)
	return answer, err
}

func (c *Client) send(what string, with any) error { return c.request(c.out.frame, what, with) }

// request has a request go its way.
func (c *Client) request(how func(kind, []byte) error, what string, with any) error {
	if err := c.drop(); err != nil {
		return err
	}
	text, err := json.Marshal(with)
	if err != nil {
		return err
	}
	k, payload, err := pack(message{Ask: what, With: text})
	if err != nil {
		return err
	}
	if err := how(k, payload); err != nil {
		c.fail(err)
		return c.why()
	}
	return nil
}

// drop takes the answer to what was sent ahead, which nobody has asked for after all.
func (c *Client) drop() error {
	if c.ahead == "" {
		return nil
	}
	c.ahead = ""
	var theirs *Error
	if err := c.answer(nil, nil); err != nil && !errors.As(err, &theirs) {
		return err
	}
	return nil
}

// answer waits for one.
func (c *Client) answer(answer any, events func(Event)) error {
	for m := range c.in {
		switch {
		case m.Event != nil:
			if events != nil {
				events(*m.Event)
			}
		case m.Error != nil:
			return m.Error
		case answer == nil:
			return nil
		default:
			if err := json.Unmarshal(m.Answer, answer); err != nil {
				c.fail(fmt.Errorf("read the host's answer: %w", err))
				return c.why()
			}
			return nil
		}
	}
	return c.why()
}

// Hello comes first. Version is set here. It changes nothing on the host.
func (c *Client) Hello(ctx context.Context, h Hello) (*Host, error) {
	h.Version = Version
	host, err := asked[Host](ctx, c, "hello", h, nil)
	return &host, err
}

// Lock takes the host for this deploy; an Error of Held names who has it. events, which
// may be nil as everywhere, tells of waiting and of what has to be repaired first.
func (c *Client) Lock(ctx context.Context, l Lock, events func(Event)) (Locked, error) {
	return asked[Locked](ctx, c, "lock", l, events)
}

// LockFor is Lock with an offer sent ahead, which Offer of the same ID then takes the answer
// to: the two are one round trip. A host that refuses the lock refuses the offer. What is too long
// for one message is not sent ahead.
func (c *Client) LockFor(ctx context.Context, l Lock, o Offer, events func(Event)) (locked Locked, err error) {
	if weight(o.Entries) >= partOf {
		return c.Lock(ctx, l, events)
	}
	defer c.until(ctx)()
	if err := c.request(c.out.ahead, "lock", l); err != nil {
		return locked, err
	}
	if err := c.send("offer", o); err != nil {
		return locked, err
	}
	c.ahead = o.ID
	err = c.answer(&locked, events)
	return locked, err
}

// weight is about how many bytes of JSON entries are.
func weight(entries []Entry) (n int) {
	for i := range entries {
		n += 200 + len(entries[i].Path) + len(entries[i].Target) + 100*len(entries[i].Chunks)
	}
	return n
}

// partOf is about how many bytes of a manifest are sent in one message. However much of it JSON
// has to escape, a message may be as long.
const partOf = 1 << 20

// Offer offers a release, whose ID, Commit, Plan and Entries are to be set, and returns the
// pieces that the host does not have, in the order in which Ship is to send them. None may
// mean that the release is there already; Ship is asked in any case.
func (c *Client) Offer(ctx context.Context, o Offer) (missing []Piece, err error) {
	defer c.until(ctx)()
	if c.ahead != "" && c.ahead == o.ID && !o.Plan {
		c.ahead = ""
	} else if err := c.sendOffer(o); err != nil {
		return nil, err
	}
	var answer offered
	if err := c.answer(&answer, nil); err != nil {
		return nil, err
	}
	for i, p := range Pieces(o.Entries) {
		if i/8 < len(answer.Missing) && answer.Missing[i/8]>>(i%8)&1 == 1 {
			missing = append(missing, p)
		}
	}
	if !o.Plan {
		c.offer = missing
	}
	return missing, nil
}

func (c *Client) sendOffer(o Offer) error {
	for rest := o.Entries; ; {
		n := 0
		for sum := 0; n < len(rest) && sum < partOf; n++ {
			sum += weight(rest[n : n+1])
		}
		part := o
		part.Entries, part.More = rest[:n], n < len(rest)
		rest = rest[n:]
		if err := c.send("offer", part); err != nil || !part.More {
			return err
		}
	}
}

// Ship sends what Offer said to be missing: from is all these pieces, one behind the other.
// When it returns the release is whole, verified and on the disk. An error of from is
// returned as it is; what has come until then stays for the next Offer.
func (c *Client) Ship(ctx context.Context, from io.Reader) error {
	defer c.until(ctx)()
	var bytes int64
	for _, p := range c.offer {
		bytes += p.Size
	}
	if err := c.request(c.out.ahead, "ship", struct{}{}); err != nil {
		return err
	}
	refused := make(chan error, 1) // the answer, which may come before all is sent
	over := make(chan struct{})
	c.all.Go(func() {
		defer close(over)
		refused <- c.answer(nil, nil)
	})
	sent := c.shipAll(io.LimitReader(from, bytes), over)
	if err := c.out.frame(kindData, nil); err != nil {
		c.fail(err)
	}
	answer := <-refused
	var theirs *Error
	if answer != nil && !(errors.As(answer, &theirs) && theirs.Code == Corrupt && sent != nil) {
		return answer
	}
	return sent
}

// shipAll compresses and sends until from ends, or the host has answered.
func (c *Client) shipAll(from io.Reader, over <-chan struct{}) error {
	z, err := zstd.NewWriter(&dataWriter{c, over}, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	_, err = io.Copy(struct{ io.Writer }{z}, from) // ReadFrom of zstd keeps back what came before an error
	if closed := z.Close(); err == nil {
		err = closed
	}
	if errors.Is(err, errAnswered) {
		return nil
	}
	return err
}

var errAnswered = errors.New("the host has answered")

// A dataWriter makes data frames.
type dataWriter struct {
	c    *Client
	over <-chan struct{}
}

func (d *dataWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		select {
		case <-d.over:
			return n, errAnswered
		default:
		}
		part := p[n:min(n+maxData, len(p))]
		if err := d.c.out.ahead(kindData, part); err != nil {
			d.c.fail(err)
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// Activate switches to what was shipped, or what Rollback chose. The error is only about
// the asking: what became of the host is the Result.
func (c *Client) Activate(ctx context.Context, events func(Event)) (Result, error) {
	return asked[Result](ctx, c, "activate", activation{}, events)
}

// ActivateForGood is Activate with a Finish that the host does by itself if it comes to that; the
// Result tells whether it has.
func (c *Client) ActivateForGood(ctx context.Context, events func(Event)) (Result, error) {
	return asked[Result](ctx, c, "activate", activation{Finish: true}, events)
}

// Finish marks what was activated as good, and prunes.
func (c *Client) Finish(ctx context.Context) (Finished, error) {
	return asked[Finished](ctx, c, "finish", struct{}{}, nil)
}

// Revert goes back to what was current before Activate.
func (c *Client) Revert(ctx context.Context, events func(Event)) (Result, error) {
	return asked[Result](ctx, c, "revert", struct{}{}, events)
}

// Rollback chooses what Activate will go to: a release, or for "" the newest good one
// before the current. It changes nothing; without the lock it is only an answer.
func (c *Client) Rollback(ctx context.Context, release string) (Choice, error) {
	return asked[Choice](ctx, c, "rollback", rollback{release}, nil)
}

// Restart restarts what is current, with its drain and gate.
func (c *Client) Restart(ctx context.Context, events func(Event)) (Result, error) {
	return asked[Result](ctx, c, "restart", struct{}{}, events)
}

// List returns the releases, the newest first.
func (c *Client) List(ctx context.Context) ([]Release, error) {
	l, err := asked[listed](ctx, c, "list", struct{}{}, nil)
	return l.Releases, err
}

// Exec runs a command in the current release; its output comes by events. It needs no lock.
func (c *Client) Exec(ctx context.Context, argv []string, events func(Event)) (code int, err error) {
	e, err := asked[exited](ctx, c, "exec", command{argv}, events)
	return e.Code, err
}
