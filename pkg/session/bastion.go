package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/openssh"
)

// BastionConfig says which.
type BastionConfig struct {
	Destination string // as ssh has it
	Batch       bool   // nobody is there to be asked

	Reporter Reporter
	Log      *slog.Logger
}

// A Bastion is an SSH server that leads to a network: whatever TCP is dialled on it, that
// server dials. The wire is kept open. One beside it, or after it, is opened without
// asking a person as long as that works.
type Bastion struct {
	cfg  BastionConfig
	way  openssh.Way
	keep *channel.Keep

	before func(ctx context.Context) // a wire is opened again
	first  chan channel.Channel      // that was opened before the Keep began
	manned atomic.Bool               // not without a person
	stop   context.CancelFunc

	over   context.Context // ends when it is of no use to try again; its cause says why
	refuse context.CancelCauseFunc
}

const (
	askPerson = 5 * time.Minute  // for all that ssh may ask
	askNobody = 15 * time.Second // with some jump hosts on a long way
	retrySSH  = time.Second      // a process each time, and a server that may count
)

// NewBastion starts nothing.
func NewBastion(cfg BastionConfig) *Bastion {
	b := &Bastion{cfg: cfg, before: func(context.Context) {}, first: make(chan channel.Channel, 1)}
	b.over, b.refuse = context.WithCancelCause(context.Background())
	return b
}

// look asks ssh for the way there.
func (b *Bastion) look(ctx context.Context) (err error) {
	b.way, err = openssh.Look(ctx, b.cfg.Destination)
	return err
}

// Open opens the first wire, which may ask questions on the terminal. Close ends what
// has begun then.
func (b *Bastion) Open(ctx context.Context) error {
	if err := b.look(ctx); err != nil {
		return err
	}
	b.cfg.Reporter.Asks()
	wire, err := openssh.Dial(ctx, b.wire(b.cfg.Batch))
	if err != nil {
		return err
	}
	b.first <- wire
	b.keep = channel.NewKeep(channel.KeepConfig{
		Open: b.open, OpenTimeout: askPerson, Beside: b.beside, BesideTimeout: askNobody, MinBackoff: retrySSH, OnState: b.changed, Log: b.cfg.Log,
	})
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop = stop
	go b.keep.Run(life)
	return b.keep.Ready(ctx)
}

func (b *Bastion) wire(batch bool) openssh.Config {
	cfg := openssh.Config{Destination: b.cfg.Destination, Batch: batch, OnWorn: func() { b.keep.Renew() }, Log: b.cfg.Log}
	if !batch {
		cfg.Say = b.cfg.Reporter.Say
	}
	return cfg
}

func (b *Bastion) open(ctx context.Context) (channel.Channel, error) {
	select {
	case wire := <-b.first:
		return wire, nil
	case <-b.over.Done():
		return nil, context.Cause(b.over)
	default:
	}
	b.before(ctx)
	wire, err := openssh.Dial(ctx, b.wire(b.cfg.Batch))
	if errors.Is(err, openssh.ErrRefused) || errors.Is(err, context.Canceled) && ctx.Err() == nil {
		b.refuse(err) // who fails again and again is locked out
	}
	if err != nil {
		return nil, err
	}
	return wire, nil
}

// beside opens a wire while there is one, where that needs nobody.
func (b *Bastion) beside(ctx context.Context) (channel.Channel, error) {
	if b.manned.Load() {
		return nil, openssh.ErrRefused
	}
	wire, err := openssh.Dial(ctx, b.wire(true))
	if errors.Is(err, openssh.ErrRefused) {
		b.manned.Store(true)
	}
	if err != nil {
		return nil, err
	}
	return wire, nil
}

func (b *Bastion) changed(s channel.KeepState) {
	switch {
	case !s.Up && !errors.Is(s.Err, net.ErrClosed):
		b.cfg.Reporter.Say(fmt.Sprintf("the way through %s is down, opening it again: %v", b.cfg.Destination, s.Err))
	case s.Up && s.Reopened > 0:
		b.cfg.Reporter.Say(fmt.Sprintf("the way through %s is open again", b.cfg.Destination))
	}
}

// DialContext has the server dial.
func (b *Bastion) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.over, cancel)()
	conn, err := b.keep.DialContext(ctx, network, address)
	if err != nil && b.over.Err() != nil {
		return nil, context.Cause(b.over)
	}
	return conn, err
}

// Listen is not to be had.
func (b *Bastion) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return b.keep.Listen(ctx, network, address)
}

// Addrs are this machine's next hop on the way to the server.
func (b *Bastion) Addrs(ctx context.Context) ([]netip.Addr, error) { return b.way.Addrs(ctx) }

// Close ends the wire, and its ssh.
func (b *Bastion) Close() {
	if b.keep == nil {
		return
	}
	b.keep.Close()
	b.keep.Wait()
	b.stop()
	select {
	case wire := <-b.first: // there was no time to use it
		wire.Close()
		wire.Wait()
	default:
	}
	b.refuse(net.ErrClosed)
}
