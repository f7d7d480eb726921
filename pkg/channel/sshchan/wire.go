package sshchan

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// wire is one SSH connection, the same at both ends.
type wire struct {
	*wiring.Life
	Tap  *wiring.Tap
	cfg  Config
	conn ssh.Conn
	ours bool // the other end is one of ours too

	// keepalive says that this end lives, and waits for the other's word if it asks.
	keepalive func(ask bool) error

	asked atomic.Bool // a keepalive has no answer yet
	rtt   atomic.Int64
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
	ctx, cancel := context.WithTimeout(ctx, wiring.Limit(cfg.Keepalive))
	defer cancel()
	t := wiring.NewTap(conn)
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
	w := &wire{Tap: t, cfg: cfg, conn: c}
	w.keepalive = func(ask bool) error {
		_, _, err := c.SendRequest(keepalive, ask, nil)
		return err
	}
	w.Life = &wiring.Life{Line: t, Beat: cfg.Keepalive, OnAlive: cfg.OnAlive, HangUp: func() { c.Close() }}
	w.ours = strings.HasPrefix(string(peer(c)), version)
	end := h(w)
	w.Begin(c.Wait, func() { w.requests(end, reqs) }, func() { w.channels(end, chans) }, w.ask, w.tell)
	return w, nil
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
		w.Spawn(func() { h.open(nc) })
	}
}

// ask sends keepalives, which also measures the round trip.
func (w *wire) ask() {
	for w.keepalive != nil {
		began := time.Now()
		w.asked.Store(true)
		if err := w.keepalive(true); err != nil {
			return
		}
		w.asked.Store(false)
		w.rtt.Store(int64(time.Since(began)))
		w.cfg.OnAlive()
		select {
		case <-time.After(w.cfg.Keepalive - time.Since(began)):
		case <-w.Context().Done():
			return
		}
	}
}

// tell shows the other end that this one lives while the answer to a keepalive
// is on its way, perhaps behind megabytes of data.
func (w *wire) tell() {
	if w.keepalive == nil {
		return
	}
	t := time.NewTicker(w.cfg.Keepalive)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-w.Context().Done():
			return
		}
		if w.asked.Load() {
			w.keepalive(false)
		}
	}
}

// carries tells whether the other end can be asked for the network: a stock one
// only knows "tcp", and would not say that this is why it refuses.
func (w *wire) carries(network string) error {
	if network == "tcp" || w.ours {
		return nil
	}
	return fmt.Errorf("the other end does not carry %s: %w", network, errors.ErrUnsupported)
}

// notOpened is why a channel was not opened: the other end refused, or is gone.
func (w *wire) notOpened(err error, name string) error {
	if w.Tap.Cause() != nil {
		return w.Gone()
	}
	return refused(err, name)
}
