package release

import (
	"bufio"
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

const (
	queued = 1024        // events and answers that wait to be written
	stall  = time.Minute // in which an answer has to find room
)

// A wire is the host's end. What is said on it never keeps apply from what it does: events
// are dropped where there is no room for them, and a deployer that takes no answers is gone.
type wire struct {
	rw     io.ReadWriteCloser
	frames chan frame // closed at the end of what comes
	queue  chan message
	gone   context.Context // ends with the wire; its cause says why
	fail   context.CancelCauseFunc
	all    sync.WaitGroup

	mu      sync.Mutex
	dropped int
}

type frame struct {
	kind    kind
	payload []byte
}

func newWire(rw io.ReadWriteCloser, silence time.Duration) *wire {
	w := &wire{rw: rw, frames: make(chan frame, 16), queue: make(chan message, queued)}
	w.gone, w.fail = context.WithCancelCause(context.Background())
	w.all.Go(func() { w.read(silence) })
	w.all.Go(w.write)
	return w
}

// close gives the wire up, when what is queued has been written, or soon.
func (w *wire) close() {
	close(w.queue)
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.all.Wait()
	}()
	select {
	case <-w.gone.Done():
	case <-time.After(time.Second):
	}
	w.fail(io.EOF)
	w.rw.Close()
	select {
	case <-written:
	case <-time.After(time.Second): // a standard input that was given to us blocking ends with the process
	}
}

func (w *wire) read(silence time.Duration) {
	defer close(w.frames)
	quiet := time.AfterFunc(silence, func() { w.fail(errSilent) })
	defer quiet.Stop()
	r := bufio.NewReader(w.rw)
	for {
		k, payload, err := readFrame(r)
		if err != nil {
			w.fail(err)
			return
		}
		quiet.Stop() // it is we who let the other end wait
		if k != kindBeat {
			select {
			case w.frames <- frame{k, payload}:
			case <-w.gone.Done():
				return
			}
		}
		quiet.Reset(silence)
	}
}

func (w *wire) write() {
	out := newFrameWriter(w.rw)
	every := time.NewTicker(beatEvery)
	defer every.Stop()
	for {
		var err error
		select {
		case m, open := <-w.queue:
			if !open {
				w.fail(io.EOF)
				return
			}
			err = out.message(m)
		case <-every.C:
			err = out.frame(kindBeat, nil)
		case <-w.gone.Done():
			return
		}
		if err != nil {
			w.fail(err)
			return
		}
	}
}

// tell sends an event if there is room.
func (w *wire) tell(e Event) {
	if w.gone.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	e.Dropped = w.dropped
	select {
	case w.queue <- message{Event: &e}:
		w.dropped = 0
	default:
		w.dropped++
	}
}

func (w *wire) say(m message) {
	late := time.NewTimer(stall)
	defer late.Stop()
	select {
	case w.queue <- m:
	case <-w.gone.Done():
	case <-late.C:
		w.fail(errors.New("the deployer takes no answers"))
	}
}

// why is the error that the wire ended with, nil if the deployer just closed it.
func (w *wire) why() error {
	if err := context.Cause(w.gone); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
