package sshchan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// wire is the life of one SSH connection, the same at both ends.
type wire struct {
	cfg  Config
	conn ssh.Conn
	tap  *tap
	ours bool // the other end is one of ours too

	ctx  context.Context // ends when the wire is gone
	end  context.CancelFunc
	done chan struct{} // closed when all goroutines are gone

	mu      sync.Mutex
	over    bool // no goroutine is waited for any more
	wg      sync.WaitGroup
	flows   int  // that are open
	retired bool // it closes after the last of them

	asked  atomic.Bool // a keepalive has no answer yet
	rtt    atomic.Int64
	silent atomic.Int64 // ticks
}

// handler is what an end does with what the other one asks for.
type handler interface {
	request(*ssh.Request)
	open(ssh.NewChannel)
}

// handshake makes a wire of conn; do is the end's half of the handshake. It is
// bounded by ctx, and as silence is, also where conn has no deadlines.
func handshake(ctx context.Context, conn net.Conn, cfg Config,
	do func(net.Conn) (ssh.Conn, <-chan ssh.NewChannel, <-chan *ssh.Request, error), peer func(ssh.Conn) []byte,
	h func(*wire) handler) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, keepalives*cfg.Keepalive)
	defer cancel()
	t := newTap(conn)
	stop := context.AfterFunc(ctx, func() { t.Close() })
	c, chans, reqs, err := do(t)
	if !stop() {
		t.Close()
		return nil, fmt.Errorf("ssh handshake: %w", ctx.Err())
	}
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("ssh handshake: %w", err)
	}
	w := &wire{cfg: cfg, conn: c, tap: t, done: make(chan struct{})}
	w.ours = strings.HasPrefix(string(peer(c)), version)
	w.ctx, w.end = context.WithCancel(context.Background())
	w.start(h(w), chans, reqs)
	return w, nil
}

func (w *wire) start(h handler, chans <-chan ssh.NewChannel, reqs <-chan *ssh.Request) {
	w.cfg.OnAlive()
	w.spawn(func() { w.requests(h, reqs) })
	w.spawn(func() { w.channels(h, chans) })
	w.spawn(w.ask)
	w.spawn(w.tell)
	w.spawn(w.watch)
	go w.bury()
}

// spawn runs part. The wire is only gone when it has returned; what begins
// later still, on a dead wire, returns by itself.
func (w *wire) spawn(part func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over {
		go part()
	} else {
		w.wg.Go(part)
	}
}

// bury waits for the end of the connection, and then for all that ran for it.
func (w *wire) bury() {
	w.tap.fail(w.conn.Wait())
	w.tap.Close()
	w.end()
	w.mu.Lock()
	w.over = true
	w.mu.Unlock()
	w.wg.Wait()
	close(w.done)
}

// requests answers one after the other: replies carry no name, only order.
func (w *wire) requests(h handler, reqs <-chan *ssh.Request) {
	for r := range reqs {
		w.cfg.OnAlive()
		if r.Type == keepalive {
			r.Reply(true, nil)
			continue
		}
		h.request(r)
	}
}

func (w *wire) channels(h handler, chans <-chan ssh.NewChannel) {
	for nc := range chans {
		w.cfg.OnAlive()
		w.spawn(func() { h.open(nc) })
	}
}

// ask sends keepalives, which also measures the round trip.
func (w *wire) ask() {
	for {
		began := time.Now()
		w.asked.Store(true)
		if _, _, err := w.conn.SendRequest(keepalive, true, nil); err != nil {
			return
		}
		w.asked.Store(false)
		w.rtt.Store(int64(time.Since(began)))
		w.cfg.OnAlive()
		select {
		case <-time.After(w.cfg.Keepalive - time.Since(began)):
		case <-w.ctx.Done():
			return
		}
	}
}

// tell shows the other end that this one lives while the answer to a keepalive
// is on its way, perhaps behind megabytes of data.
func (w *wire) tell() {
	t := time.NewTicker(w.cfg.Keepalive)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-w.ctx.Done():
			return
		}
		if w.asked.Load() {
			w.conn.SendRequest(keepalive, false, nil)
		}
	}
}

const (
	keepalives        = 7 // without a sign of life
	ticksPerKeepalive = 5
	silentTicks       = keepalives*ticksPerKeepalive - 1 // and one in which it began
)

// watch ends the wire when nothing at all was read from it for too long. All
// that was read is a sign of life: also under load there is one with every
// keepalive of either end, for who waits for an answer tells.
func (w *wire) watch() {
	t := time.NewTicker(w.cfg.Keepalive / ticksPerKeepalive)
	defer t.Stop()
	seen, silent := w.tap.reads.Load(), 0
	for silent < silentTicks {
		select {
		case <-t.C:
		case <-w.ctx.Done():
			return
		}
		if now := w.tap.reads.Load(); now != seen {
			seen, silent = now, 0
			w.cfg.OnAlive() // a request may be behind megabytes of data
		} else {
			silent++
		}
		w.silent.Store(int64(silent))
	}
	w.tap.fail(errSilent(keepalives * w.cfg.Keepalive))
	w.tap.Conn.Close() // what is queued would not arrive
}

// errSilent is the death of a wire that says nothing any more.
type errSilent time.Duration

func (e errSilent) Error() string {
	return fmt.Sprintf("no sign of life for %v", time.Duration(e))
}

func (e errSilent) Timeout() bool { return true }

// carries tells whether the other end can be asked for the network: a stock one
// only knows "tcp", and would not say that this is why it refuses.
func (w *wire) carries(network string) error {
	if network == "tcp" || w.ours {
		return nil
	}
	return fmt.Errorf("the other end does not carry %s: %w", network, errors.ErrUnsupported)
}

// silence is counted and not timed: a process that was stopped has heard nothing.
func (w *wire) silence() time.Duration {
	return time.Duration(w.silent.Load()) * w.cfg.Keepalive / ticksPerKeepalive
}

// count counts the flows.
func (w *wire) count(more int) {
	w.mu.Lock()
	w.flows += more
	over := w.retired && w.flows == 0
	w.mu.Unlock()
	if over { // what was said last may still be on its way
		time.AfterFunc(lastWords, w.closeRetired)
	}
}

func (w *wire) closeRetired() {
	w.mu.Lock()
	over := w.flows == 0
	w.mu.Unlock()
	if over {
		w.close()
	}
}

func (w *wire) retire() {
	w.mu.Lock()
	w.retired = true
	w.mu.Unlock()
	w.count(0)
}

// close ends the wire in good order.
func (w *wire) close() {
	w.tap.fail(net.ErrClosed)
	w.conn.Close()
}

// wait returns when the wire and all that ran for it are gone.
func (w *wire) wait() error {
	<-w.done
	return w.tap.cause()
}

// gone is the error of what is asked of a wire that is gone. The wire's own error
// is in its words only: a reset of the wire is none of the target's.
func (w *wire) gone() error {
	cause := w.tap.cause()
	if cause == nil || errors.Is(cause, net.ErrClosed) {
		return net.ErrClosed
	}
	return fmt.Errorf("%w: %v", net.ErrClosed, cause)
}

// notOpened is why a channel was not opened: the other end refused, or is gone.
func (w *wire) notOpened(err error, name string) error {
	if w.tap.cause() != nil {
		return w.gone()
	}
	return refused(err, name)
}
