package wiring

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Life is the life of one wire, the same at both ends.
type Life struct {
	Line    Line
	Beat    time.Duration // how often each end shows that it lives; 0: silence means nothing
	OnAlive func()        // called when the other one did
	HangUp  func()        // closes the protocol on the line

	ctx  context.Context // ends when the wire is gone
	end  context.CancelFunc
	done chan struct{} // closed when all goroutines are gone

	mu      sync.Mutex
	over    bool // no goroutine is waited for any more
	wg      sync.WaitGroup
	flows   int  // that are open
	retired bool // it closes after the last of them

	silent atomic.Int64 // ticks
}

// Line is what a wire runs over: a Tap, where that is a byte stream.
type Line interface {
	// Fail notes why the wire ends, unless Cause has a reason already.
	Fail(err error)
	Cause() error

	// Heard grows with all that comes from the other end.
	Heard() uint64

	// Close ends it, and lets go out what was said last; Cut lets nothing go.
	Close() error
	Cut()
}

// Begin begins a life; wait returns when the protocol has come to its end, and
// parts are what goes on until then.
func (l *Life) Begin(wait func() error, parts ...func()) {
	l.done = make(chan struct{})
	l.ctx, l.end = context.WithCancel(context.Background())
	l.OnAlive()
	l.Spawn(l.watch)
	for _, part := range parts {
		l.Spawn(part)
	}
	go l.bury(wait)
}

// Spawn runs part. The wire is only gone when it has returned; what begins
// later still, on a dead wire, returns by itself.
func (l *Life) Spawn(part func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		go part()
	} else {
		l.wg.Go(part)
	}
}

// bury waits for the end of the connection, and then for all that ran for it.
func (l *Life) bury(wait func() error) {
	l.Line.Fail(wait())
	l.Line.Close()
	l.end()
	l.mu.Lock()
	l.over = true
	l.mu.Unlock()
	l.wg.Wait()
	close(l.done)
}

// Context ends when the wire is gone.
func (l *Life) Context() context.Context { return l.ctx }

// Beats are how many without a sign of life are a wire's end.
const Beats = 7

const (
	ticksPerBeat = 5
	silentTicks  = Beats*ticksPerBeat - 1 // and one in which it began
)

// Limit is how long a wire may be silent that beats so often, and how long its
// handshake may take.
func Limit(beat time.Duration) time.Duration { return Beats * beat }

// watch ends the wire when nothing at all was read from it for too long. All
// that was read is a sign of life: also under load there is one with every
// beat of either end, for who waits for an answer tells.
func (l *Life) watch() {
	if l.Beat == 0 {
		return
	}
	t := time.NewTicker(l.Beat / ticksPerBeat)
	defer t.Stop()
	seen, silent := l.Line.Heard(), 0
	for silent < silentTicks {
		select {
		case <-t.C:
		case <-l.ctx.Done():
			return
		}
		if now := l.Line.Heard(); now != seen {
			seen, silent = now, 0
			l.OnAlive() // an answer may be behind megabytes of data
		} else {
			silent++
		}
		l.silent.Store(int64(silent))
	}
	l.Line.Fail(ErrSilent(Limit(l.Beat)))
	l.Line.Cut() // what is queued would not arrive
}

// ErrSilent is the death of a wire that says nothing any more.
type ErrSilent time.Duration

func (e ErrSilent) Error() string {
	return fmt.Sprintf("no sign of life for %v", time.Duration(e))
}

func (e ErrSilent) Timeout() bool { return true }

// Silence is how long nothing was read from the wire. It is counted and not timed:
// a process that was stopped has heard nothing.
func (l *Life) Silence() time.Duration {
	return time.Duration(l.silent.Load()) * l.Beat / ticksPerBeat
}

// Count counts the flows.
func (l *Life) Count(more int) {
	l.mu.Lock()
	l.flows += more
	over := l.retired && l.flows == 0
	l.mu.Unlock()
	if over { // what was said last may still be on its way
		time.AfterFunc(lastWords, l.closeRetired)
	}
}

func (l *Life) closeRetired() {
	if l.Flows() == 0 {
		l.Close()
	}
}

// Flows is how many are open.
func (l *Life) Flows() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.flows
}

// Retire closes the wire when the last flow over it is closed.
func (l *Life) Retire() {
	l.mu.Lock()
	l.retired = true
	l.mu.Unlock()
	l.Count(0)
}

// Close ends the wire in good order. It is a channel's Close.
func (l *Life) Close() error {
	l.Line.Fail(net.ErrClosed)
	l.HangUp()
	return nil
}

// Wait returns when the wire and all that ran for it are gone, and says why.
func (l *Life) Wait() error {
	<-l.done
	return l.Line.Cause()
}

// Gone is the error of what is asked of a wire that is gone. The wire's own error
// is in its words only: a reset of the wire is none of the target's.
func (l *Life) Gone() error {
	cause := l.Line.Cause()
	if cause == nil || errors.Is(cause, net.ErrClosed) {
		return net.ErrClosed
	}
	return fmt.Errorf("%w: %v", net.ErrClosed, cause)
}
