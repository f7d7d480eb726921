package channel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// KeepConfig says how a Keep opens its wire.
type KeepConfig struct {
	// Open makes a new wire. Its ctx ends after OpenTimeout.
	Open        func(ctx context.Context) (Channel, error)
	OpenTimeout time.Duration // zero means 30 seconds

	// Beside, if set, makes another wire to where the present one leads and has
	// been silent for Silence. Its ctx ends after BesideTimeout, or earlier when
	// the present one is heard, so that it should change nothing else. It is called
	// again for as long as the silence lasts, unless it says by net.ErrClosed that nothing
	// is there any more: then the silent wire ends at once. Zero means 3 s and 2 s.
	Beside                 func(ctx context.Context) (Channel, error)
	Silence, BesideTimeout time.Duration

	// Age, if set, is how old a wire of Open or Beside becomes before Beside makes the
	// next: load balancers and API servers end what is too old, without a word.
	Age time.Duration

	// Better, if set, makes a wire that is to be preferred to those of Open and
	// Beside. It is tried when one of those is up, again after BetterEvery, and then
	// after twice as long each time up to ten times that; a better wire that was lost
	// early counts as a failure. Its ctx ends after BetterTimeout. Zero means 30 s and 5 s.
	Better                     func(ctx context.Context) (Channel, error)
	BetterEvery, BetterTimeout time.Duration

	// Attempts begin, with jitter, MinBackoff after each other at first and twice as long
	// each time up to MaxBackoff; a wire that has lived for Healthy has it begin anew.
	// Zero means 200 ms, 5 s, and MaxBackoff.
	MinBackoff, MaxBackoff, Healthy time.Duration

	// TakesOver says that the far end lets who listens later at an address take it over
	// (memchan does), so that a listener need not be closed on one wire before it is
	// there on the next.
	TakesOver bool

	// Leaving, if set, tells by the error of a listener that the far end is about to go: then
	// Beside makes the next wire, as after Renew.
	Leaving func(error) bool

	// OnState, if set, is called when Up has changed, and with each wire, one call at a
	// time: not for each attempt that fails in between, nor for those before the
	// first wire. It must not wait for the Keep.
	OnState func(KeepState)

	Log *slog.Logger // nil: nothing is logged
}

// KeepState is what can be told about the wire of a Keep.
type KeepState struct {
	Up       bool          // there is a wire
	Silent   time.Duration // nothing has come over it for so long, which is too long; else 0
	Since    time.Time     // when Up last changed; zero before the first wire
	Reopened int           // wires opened after the first, for want of one that was heard
	Err      error         // what went wrong last: kept while up, for people to read
	RTT      time.Duration // of the wire, where it measures one; 0: unknown
	Renewed  bool          // the wire took over from one that was only old
	Better   bool          // the wire is one of Better
	NoBetter error         // why not, where that was tried

	wires int // so far
}

// Keep is a Channel that opens itself again. It never gives up: while the wire
// is down, dials wait for the next one as long as their context lets them.
// Connections end with the wire they were made on; listeners live on and are
// established on every new wire.
//
// After a network that lost everything for a while, TCP waits for about as long
// again before it tries the next time. So a wire that is silent gets another one
// beside it, which takes over as soon as it is open: dials under way are made
// there, too, and listeners move. What is open on the silent one goes on should
// it be heard again, and else ends when it is dead.
type Keep struct {
	cfg  KeepConfig
	done chan struct{} // closed by Close, and when Run ends
	once sync.Once
	ran  chan struct{} // closed when Run has returned
	wg   sync.WaitGroup

	mu    sync.Mutex
	state KeepState
	wire  *keptWire     // nil while down
	next  chan struct{} // closed when wire is set

	sought int       // attempts at a better wire, since one was good for long
	seekAt time.Time // not before
	found  time.Time // when the last better wire came up; zero: it has been thought of

	told KeepState // what OnState has heard last; Run's own
}

// keptWire is one life of the wire.
type keptWire struct {
	Channel
	present context.Context // ends when it is not the present wire any more
	past    context.CancelFunc
	aging   context.Context // ends when another is wanted
	age     context.CancelFunc
	gone    chan struct{} // closed when Wait has returned
	err     error         // of Wait; after gone
	from    origin
}

// origin is why there is a wire.
type origin int

const (
	opened  origin = iota // there was none, or none that was heard
	renewed               // the one before was only old
	better
)

var _ Channel = (*Keep)(nil)

// NewKeep makes a Keep; its Run opens the wire.
func NewKeep(cfg KeepConfig) *Keep {
	orDuration(&cfg.OpenTimeout, 30*time.Second)
	orDuration(&cfg.MinBackoff, 200*time.Millisecond)
	orDuration(&cfg.MaxBackoff, 5*time.Second)
	orDuration(&cfg.Healthy, cfg.MaxBackoff)
	orDuration(&cfg.Silence, 3*time.Second)
	orDuration(&cfg.BesideTimeout, 2*time.Second)
	orDuration(&cfg.BetterEvery, 30*time.Second)
	orDuration(&cfg.BetterTimeout, 5*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Keep{
		cfg:  cfg,
		done: make(chan struct{}),
		ran:  make(chan struct{}),
		next: make(chan struct{}),
	}
}

func orDuration(d *time.Duration, otherwise time.Duration) {
	if *d <= 0 {
		*d = otherwise
	}
}

// Run keeps a wire open until ctx ends or Close is called, and then returns
// net.ErrClosed when all is gone. It is called once.
func (k *Keep) Run(ctx context.Context) error {
	defer close(k.ran)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, k.end)()
	go func() {
		<-k.done
		cancel()
	}()
	k.reopen(ctx)
	k.end()
	k.mu.Lock()
	//lint:ignore SA2001 a listener that still begins has begun, or sees the end
	k.mu.Unlock()
	k.wg.Wait()
	return net.ErrClosed
}

// Renew opens another wire beside the present one, because the far end is about to
// go: as soon as that is up, what is dialled and what listens moves there.
func (k *Keep) Renew() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wire != nil {
		k.wire.age()
	}
}

func (k *Keep) end() { k.once.Do(func() { close(k.done) }) }

// reopen is the life of a Keep: open, wait until it is gone, pause, again.
func (k *Keep) reopen(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		began := time.Now()
		lived, err := k.life(ctx)
		if ctx.Err() == nil {
			k.down(err)
		}
		if lived > k.cfg.Healthy {
			failures = 0
		}
		attempt := time.Since(began) - lived // which was a wait, too
		wait(ctx, backoff(failures, k.cfg.MinBackoff, k.cfg.MaxBackoff, rand.Float64())-attempt)
		failures++
	}
}

// life opens one wire, and waits until it is gone, or the last of those that
// took over from it. It tells for how long there was one.
func (k *Keep) life(ctx context.Context) (lived time.Duration, err error) {
	ch, err := k.open(ctx, k.cfg.OpenTimeout, k.cfg.Open)
	if err != nil {
		return 0, fmt.Errorf("open: %w", err)
	}
	since := time.Now()
	defer func() { lived = time.Since(since) }()
	for from := opened; ; {
		w := k.begin(ctx, ch, from)
		k.up(w)
		ch, from, err = k.successor(ctx, w)
		if err != nil {
			w.Close()
			<-w.gone
			return 0, err
		}
		if ch == nil {
			<-w.gone
			return 0, w.err
		}
	}
}

func (k *Keep) open(ctx context.Context, limit time.Duration, how func(context.Context) (Channel, error)) (Channel, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return how(ctx)
}

// begin follows a wire to its end.
func (k *Keep) begin(ctx context.Context, ch Channel, from origin) *keptWire {
	w := &keptWire{Channel: ch, gone: make(chan struct{}), from: from}
	w.present, w.past = context.WithCancel(context.Background())
	w.aging, w.age = context.WithCancel(context.Background())
	k.wg.Go(func() {
		defer close(w.gone)
		defer w.age()
		defer context.AfterFunc(ctx, func() { ch.Close() })()
		w.err = ch.Wait()
	})
	return w
}

// backoff is how long to wait after so many failures; r in [0,1) is the jitter,
// which spreads the second half of the time. All of it, as in AWS's "Exponential
// Backoff and Jitter", has the wave of those who come back a little over half as high
// at best, but some wait for much longer than the far end was away: of 1,000 who had
// lost it for 3 s, simulated, the last one for another 24 s, and so for 3 s.
func backoff(failures int, least, most time.Duration, r float64) time.Duration {
	d := most
	if failures < 30 {
		d = min(least<<failures, most)
	}
	return d/2 + time.Duration(r*float64(d/2))
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// up makes w the present wire. One that was before it is not closed: a network
// that was away for a few seconds is no reason to break what is open.
func (k *Keep) up(w *keptWire) {
	k.mu.Lock()
	before := k.wire
	k.wire = w
	k.state.wires++
	if !k.state.Since.IsZero() && w.from == opened {
		k.state.Reopened++
	}
	if before == nil {
		close(k.next)
		k.state.Up, k.state.Since = true, time.Now()
	}
	k.state.Renewed = w.from == renewed
	if k.state.Better = w.from == better; k.state.Better {
		k.state.NoBetter, k.found = nil, time.Now()
	}
	s := k.state
	k.mu.Unlock()
	if before != nil {
		before.past()
		k.retire(before)
	}
	k.cfg.Log.Info("wire up", "reopened", s.Reopened)
	k.tell(s)
}

// retireAfter is time for listeners to be on the next wire.
const retireAfter = 5 * time.Second

// retire has a wire end with its last connection, and not before listeners have moved.
func (k *Keep) retire(w *keptWire) {
	end := w.Channel.(Silent).Retire
	if !k.cfg.TakesOver {
		end()
		return
	}
	k.wg.Go(func() {
		t := time.NewTimer(retireAfter)
		defer t.Stop()
		select {
		case <-t.C:
			end()
		case <-w.gone:
		}
	})
}

func (k *Keep) down(err error) {
	k.mu.Lock()
	if k.wire != nil {
		k.wire.past()
		k.wire, k.next = nil, make(chan struct{})
		k.state.Up, k.state.Since, k.state.Better = false, time.Now(), false
	}
	k.state.Err = err
	s := k.state
	k.mu.Unlock()
	k.cfg.Log.Warn("wire down", "err", err)
	k.tell(s)
}

func (k *Keep) tell(s KeepState) {
	if k.cfg.OnState != nil && (s.Up != k.told.Up || s.wires != k.told.wires) {
		k.told = s
		k.cfg.OnState(s)
	}
}

// State tells how the wire is.
func (k *Keep) State() KeepState {
	k.mu.Lock()
	s, w := k.state, k.wire
	k.mu.Unlock()
	if w != nil {
		if m, ok := w.Channel.(interface{ RTT() time.Duration }); ok {
			s.RTT = m.RTT()
		}
		if m, ok := w.Channel.(Silent); ok && m.Silence() >= k.cfg.Silence {
			s.Silent = m.Silence()
		}
	}
	return s
}

// Ready waits until there is a wire.
func (k *Keep) Ready(ctx context.Context) error {
	_, err := k.current(ctx)
	return err
}

// current waits for a wire. While there is none and ctx runs out, the error
// tells both, and what went wrong with the wire.
func (k *Keep) current(ctx context.Context) (*keptWire, error) {
	for {
		k.mu.Lock()
		w, next := k.wire, k.next
		k.mu.Unlock()
		if k.ended() {
			return nil, net.ErrClosed
		}
		if w != nil {
			return w, nil
		}
		select {
		case <-next:
		case <-k.done:
		case <-ctx.Done():
			return nil, k.noWire(ctx.Err())
		}
	}
}

func (k *Keep) noWire(err error) error {
	if last := k.State().Err; last != nil {
		return fmt.Errorf("no wire: %w (%w)", last, err)
	}
	return fmt.Errorf("no wire: %w", err)
}

func (k *Keep) ended() bool {
	select {
	case <-k.done:
		return true
	default:
		return false
	}
}

// try does a thing on the current wire, and again on the next one if that wire
// turned out to be gone, or another took over meanwhile.
func (k *Keep) try(ctx context.Context, do func(context.Context, *keptWire) error) error {
	for {
		w, err := k.current(ctx)
		if err != nil {
			return err
		}
		err = w.try(ctx, do)
		if err == nil || w.present.Err() == nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		select {
		case <-w.present.Done():
		case <-k.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// try does a thing for as long as w is the present wire.
func (w *keptWire) try(ctx context.Context, do func(context.Context, *keptWire) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(w.present, cancel)()
	return do(ctx, w)
}

// DialContext dials on the wire, or on the next one if it is down.
func (k *Keep) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := k.try(ctx, func(ctx context.Context, w *keptWire) (err error) {
		conn, err = w.DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// Wait blocks until Run has returned.
func (k *Keep) Wait() error {
	<-k.ran
	return net.ErrClosed
}

// Close ends Run.
func (k *Keep) Close() error {
	k.end()
	return nil
}
