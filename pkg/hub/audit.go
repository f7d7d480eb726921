package hub

import (
	"context"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// A record is what the audit log gets one line of: a host that was attached, or a
// connection to one, when it is over or was refused.
type record struct {
	log     *slog.Logger
	metrics *metrics
	event   string
	began   time.Time
	attrs   []slog.Attr
	spares  func() bool // tells that a refusal is not to be written; nil: it is
}

func (h *Hub) audit(g *Guest, what, network, address string) *record {
	if g == nil {
		g = &Guest{}
	}
	return &record{log: h.cfg.Audit, metrics: h.metrics, event: what, began: time.Now(), attrs: []slog.Attr{
		slog.String("event", what), slog.String("who", g.Name), slog.String("key", g.Key), slog.String("user", g.User),
		slog.String("from", g.From.String()), slog.String("network", network), slog.String("to", address),
	}}
}

func (r *record) write(verdict string, more ...slog.Attr) {
	r.attrs = append(r.attrs, slog.String("verdict", verdict))
	r.log.LogAttrs(context.Background(), slog.LevelInfo, "audit", append(r.attrs, more...)...)
}

func (r *record) refused(err error) {
	r.metrics.refused(r.event, err)
	why := slog.String("why", err.Error())
	switch {
	case r.spares == nil:
		r.write("refused", why)
	case !r.spares():
		r.attrs = clipped(append(r.attrs, why))
		r.write("refused")
	}
}

func (r *record) seconds() slog.Attr {
	return slog.Float64("seconds", float64(time.Since(r.began).Milliseconds())/1000)
}

// attached tells of a host twice: when it is there, and when it goes.
func (r *record) attached(l net.Listener) net.Listener {
	r.metrics.came(r.event, "attached")
	r.log.LogAttrs(context.Background(), slog.LevelInfo, "audit", append(r.attrs, slog.String("verdict", "attached"))...)
	return &offer{Listener: l, gone: sync.OnceFunc(func() { r.write("detached", r.seconds()) })}
}

// count tells of a connection when it is closed.
func (r *record) count(c net.Conn, w *wait, done func()) net.Conn {
	n := &counted{Conn: c, sum: r.metrics, wait: w}
	r.metrics.opened(r)
	w.begin(n)
	n.over = sync.OnceFunc(func() {
		done()
		w.end()
		r.metrics.streams.Dec()
		r.write("opened", slog.Int64("in", n.in.Load()), slog.Int64("out", n.out.Load()), r.seconds())
	})
	return n
}

// came tells of something that went well.
func (r *record) came(verdict string, more ...slog.Attr) {
	r.metrics.came(r.event, verdict)
	r.write(verdict, more...)
}

// counted is a connection to a host.
type counted struct {
	net.Conn
	in, out atomic.Int64 // bytes from the host, and to it
	over    func()
	sum     *metrics // to which these count, too; nil: to none
	wait    *wait
	why     atomic.Pointer[error] // the hub has ended it; nil: it has not
}

func (c *counted) took(n int) {
	c.in.Add(int64(n))
	if c.sum != nil {
		c.sum.in.Add(int64(n))
	}
}

func (c *counted) gave(n int) {
	c.out.Add(int64(n))
	if c.sum != nil {
		c.sum.out.Add(int64(n))
	}
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.took(n)
	return n, c.because(err)
}

func (c *counted) Write(p []byte) (int, error) {
	c.wait.writing.Store(true)
	n, err := c.Conn.Write(p)
	c.wait.writing.Store(false)
	c.gave(n)
	return n, c.because(err)
}

// WriteTo keeps the cheaper way of a connection that has its own buffers.
func (c *counted) WriteTo(w io.Writer) (n int64, err error) {
	to := tally{w, c}
	if from, ok := c.Conn.(io.WriterTo); ok {
		n, err = from.WriteTo(to)
	} else {
		n, err = relay.Copy(to, c.Conn)
	}
	return n, c.because(err)
}

// tally counts what comes from a host.
type tally struct {
	io.Writer
	c *counted
}

func (t tally) Write(p []byte) (int, error) {
	n, err := t.Writer.Write(p)
	t.c.took(n)
	return n, err
}

func (c *counted) CloseWrite() error {
	if half, ok := c.Conn.(channel.CloseWriter); ok {
		return half.CloseWrite()
	}
	return nil
}

// because is err, or why the hub has ended it: who is joined to it is told so.
func (c *counted) because(err error) error {
	if why := c.why.Load(); err != nil && why != nil {
		return *why
	}
	return err
}

// end is for the hub, which nobody has asked to.
func (c *counted) end(why error) {
	c.why.Store(&why)
	_ = c.Abort(why)
}

func (c *counted) Abort(reason error) error {
	defer c.over()
	relay.Abort(c.Conn, reason)
	return nil
}

func (c *counted) Close() error {
	defer c.over()
	return c.Conn.Close()
}
