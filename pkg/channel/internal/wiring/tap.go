package wiring

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Tap is the connection below a wire's protocol. It keeps the first error, which
// SSH turns into ends of file, and counts reads as signs of life. After a failed
// read nothing is written any more: a flow could otherwise be opened on a mux
// that has already given up, and never be answered.
//
// What is written goes out on a goroutine of its own. SSH writes a packet in
// several pieces, TLS a record at a time: they leave in one, with what other flows
// wrote meanwhile, while the next is being encrypted. It also lets both ends speak
// first, as SSH does, on a connection that has no buffer.
//
// Write never waits: a mux writes also where it reads, to answer what it read, and
// a wait there would stop all flows of the wire, and with both directions full
// for good. It is the flows that wait, before they give data to it (turns.go).
//
// Reads are buffered, since SSH and TLS read the head of a packet by itself.
type Tap struct {
	net.Conn
	in    ahead
	done  chan struct{} // closed with the connection
	reads atomic.Uint64 // of the connection itself, that gave something

	mu      sync.Mutex
	changed sync.Cond
	queue   []byte // written, not yet on its way
	err     error

	most    int     // how much may be queued before data waits
	entered int     // bytes of data that were let in and are not queued yet
	waiting []*turn // who comes first is let in first
}

const (
	// tooMuch is queued when the other end makes this one answer and does not read.
	tooMuch = 64 << 20

	// lastWords is how long Close lets what is queued take.
	lastWords = time.Second
)

// ErrHungUp is the end of a connection that the other end closed.
var ErrHungUp = errors.New("the other end hung up")

var errDeaf = errors.New("the other end does not read what it is told")

// NewTap takes conn over, until Close.
func NewTap(conn net.Conn) *Tap {
	t := &Tap{Conn: conn, done: make(chan struct{}), most: leastQueued}
	t.in.src = counted{t}
	t.changed.L = &t.mu
	go t.write()
	return t
}

func (t *Tap) Read(p []byte) (int, error) {
	n, err := t.in.Read(p)
	if err == io.EOF {
		t.Fail(ErrHungUp)
	} else if err != nil {
		t.Fail(err)
	}
	return n, err
}

// counted is the reader below the buffer.
type counted struct{ t *Tap }

func (c counted) Read(p []byte) (int, error) {
	n, err := c.t.Conn.Read(p)
	if n > 0 {
		c.t.reads.Add(1)
	}
	return n, err
}

// Write queues. Its errors are those of earlier writes.
func (t *Tap) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) > tooMuch {
		t.failed(errDeaf)
	}
	if t.err != nil {
		return 0, t.err
	}
	t.queue = append(t.queue, p...)
	t.changed.Signal()
	return len(p), nil
}

// SetWriteDeadline does nothing: Write does not wait, and what is queued may take
// its time. TLS sets one in the past when it is closed.
func (t *Tap) SetWriteDeadline(time.Time) error { return nil }

// write writes what is queued, and closes the connection at the end of it.
func (t *Tap) write() {
	defer close(t.done)
	defer t.Conn.Close()
	var spare []byte
	for {
		b := t.take(spare)
		if b == nil {
			return
		}
		began := time.Now()
		if _, err := t.Conn.Write(b); err != nil {
			t.Fail(err)
			return
		}
		t.mu.Lock()
		t.paced(len(b), time.Since(began))
		t.mu.Unlock()
		spare = nil
		if cap(b) <= 2*mostQueued {
			spare = b[:0]
		}
	}
}

// take waits for something to write, and leaves spare to be filled meanwhile.
func (t *Tap) take(spare []byte) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.queue) == 0 && t.err == nil {
		t.changed.Wait()
	}
	if len(t.queue) == 0 {
		return nil
	}
	b := t.queue
	t.queue = spare
	t.admit()
	return b
}

// Close lets go out what is queued, but not for long.
func (t *Tap) Close() error {
	t.Fail(net.ErrClosed)
	time.AfterFunc(lastWords, func() { t.Conn.Close() })
	return nil
}

// Cut closes the connection with what is queued.
func (t *Tap) Cut() { t.Conn.Close() }

// Heard counts the reads of the connection that gave something.
func (t *Tap) Heard() uint64 { return t.reads.Load() }

// Done is closed when the connection is, which is as long after Close as the last
// words take.
func (t *Tap) Done() <-chan struct{} { return t.done }

// Fail notes why the wire ends, and lets the writer come to its end.
func (t *Tap) Fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed(err)
}

func (t *Tap) failed(err error) {
	if t.err == nil {
		t.err = err
		t.changed.Signal()
		t.admit()
	}
}

// Cause is why the wire is gone, or nil while it is not.
func (t *Tap) Cause() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}
