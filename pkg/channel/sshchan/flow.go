package sshchan

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// flow is an SSH channel as a net.Conn.
type flow struct {
	w             *wire
	ch            ssh.Channel
	local, remote net.Addr

	deadline.Pair
	once      sync.Once
	closed    chan struct{}
	late      atomic.Bool // closed by a deadline that came late
	unbounded struct {    // calls under way that no deadline can interrupt
		read, write atomic.Bool
	}

	rmu     sync.Mutex // one reader
	rest    []byte     // read ahead, not yet asked for
	rerr    error      // what ended reading
	pumping bool
	asked   bool          // the pump owes an answer
	want    chan struct{} // asks the pump for more
	got     chan piece
	pumped  chan struct{} // closed when the pump is gone

	writing chan struct{} // holds a token while somebody writes
	finSent bool          // held by writing

	nmu    sync.Mutex
	reqs   <-chan *ssh.Request
	fin    bool  // the other end said that it sent all
	broken error // why the other end broke off
}

// piece is what one read of the channel gave.
type piece struct {
	b   []byte
	err error
}

func newFlow(w *wire, ch ssh.Channel, reqs <-chan *ssh.Request, local, remote net.Addr) *flow {
	f := &flow{
		w: w, ch: ch, reqs: reqs, local: local, remote: remote,
		closed:  make(chan struct{}),
		want:    make(chan struct{}, 1),
		got:     make(chan piece, 1),
		pumped:  make(chan struct{}),
		writing: make(chan struct{}, 1),
	}
	w.Count(1)
	if !w.ours { // it has nothing to tell on a channel, but may ask whether we live
		f.reqs = nil
		w.Spawn(func() { ssh.DiscardRequests(reqs) })
	}
	f.ReadBy.Func = func() { f.passed(&f.unbounded.read) }
	f.WriteBy.Func = func() { f.passed(&f.unbounded.write) }
	return f
}

// passed ends the connection if a deadline has passed that the call under way
// did not know of when it began.
func (f *flow) passed(call *atomic.Bool) {
	if call.Load() {
		f.late.Store(true)
		f.Abort(os.ErrDeadlineExceeded)
	}
}

// Read reads what the pump has read ahead.
func (f *flow) Read(p []byte) (int, error) {
	f.rmu.Lock()
	defer f.rmu.Unlock()
	if err := f.readable(); err != nil || len(p) == 0 {
		return 0, err
	}
	if len(f.rest) == 0 {
		if err := f.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}

func (f *flow) readable() error {
	if f.isClosed() {
		return f.OpError("read", f.closedError())
	}
	if f.ReadBy.Passed() {
		return f.OpError("read", os.ErrDeadlineExceeded)
	}
	return nil
}

// fill waits for the pump; rmu is held.
func (f *flow) fill() error {
	if f.rerr != nil {
		return f.rerr
	}
	if !f.pumping {
		f.pumping = true
		f.w.Spawn(f.pump)
	}
	if !f.asked {
		f.asked = true
		select {
		case f.want <- struct{}{}:
		case <-f.pumped:
		}
	}
	select {
	case p := <-f.got:
		f.take(p)
	case <-f.pumped:
		f.takeLast()
	case <-f.ReadBy.Done():
		return f.OpError("read", os.ErrDeadlineExceeded)
	case <-f.closed:
		return f.OpError("read", f.closedError())
	}
	if len(f.rest) == 0 {
		return f.rerr
	}
	return nil
}

func (f *flow) take(p piece) {
	f.asked = false
	f.rest, f.rerr = p.b, p.err
}

// takeLast reads without the pump, which has gone with the wire: what came
// before that is still there, and nothing is waited for any more.
func (f *flow) takeLast() {
	select {
	case p := <-f.got:
		f.take(p)
		return
	default:
	}
	buf := make([]byte, mostPump)
	n, err := f.readChannel(buf)
	f.take(piece{buf[:n], err})
}

const (
	leastPump = 4 << 10
	mostPump  = 64 << 10
)

// pump reads the channel whenever it is asked to. Its buffer grows with what
// comes.
func (f *flow) pump() {
	defer close(f.pumped)
	buf := make([]byte, leastPump)
	for {
		select {
		case <-f.want:
		case <-f.closed:
			return
		case <-f.w.Context().Done():
			return
		}
		n, err := f.readChannel(buf)
		f.got <- piece{buf[:n], err}
		if err != nil {
			return
		}
		if n == len(buf) && n < mostPump {
			buf = make([]byte, min(4*n, mostPump))
		}
	}
}

// readChannel reads, and finds out what an end of file means.
func (f *flow) readChannel(p []byte) (int, error) {
	n, err := f.ch.Read(p)
	if err == nil {
		return n, nil
	}
	return n, f.ending()
}

// ending is what reading ends with: io.EOF only if all was read.
func (f *flow) ending() error {
	if f.isClosed() {
		return f.OpError("read", f.closedError())
	}
	if fin, err := f.heard(); err != nil {
		return f.OpError("read", err)
	} else if fin {
		return io.EOF
	}
	if f.w.Tap.Cause() != nil {
		return f.OpError("read", f.w.Gone())
	}
	if f.w.ours {
		return f.OpError("read", syscall.ECONNRESET)
	}
	return io.EOF
}

// heard takes in the requests that came on the channel. Those that came before
// an end of file are there when it is read. Nobody waits for them otherwise:
// there is room for sixteen, and no end sends more than two.
func (f *flow) heard() (fin bool, broken error) {
	f.nmu.Lock()
	defer f.nmu.Unlock()
	for {
		select {
		case r, ok := <-f.reqs:
			if !ok {
				f.reqs = nil // from now on, nothing comes
				continue
			}
			f.note(r)
		default:
			return f.fin, f.broken
		}
	}
}

func (f *flow) note(r *ssh.Request) {
	switch r.Type {
	case finRequest:
		f.fin = true
	case abortRequest:
		f.broken = wiring.Hear(string(r.Payload), f.remote.String())
	default:
		r.Reply(false, nil)
	}
}

// Write writes at once. If a deadline is set it needs a copy, which goes on its way
// even if the deadline passes first; and towards a stock end, which answers a close only
// when it has got rid of all that came before, as what waits for its window waits so long.
func (f *flow) Write(p []byte) (int, error) {
	if err := f.lockWrite(); err != nil {
		return 0, err
	}
	f.unbounded.write.Store(true)
	if f.WriteBy.Armed() || !f.w.ours {
		f.unbounded.write.Store(false)
		return f.writeBounded(p)
	}
	n, err := f.writePieces(p)
	f.unbounded.write.Store(false)
	<-f.writing
	return n, f.writeError(err)
}

func (f *flow) writeBounded(p []byte) (int, error) {
	own := append([]byte(nil), p...)
	res := make(chan error, 1)
	f.w.Spawn(func() {
		_, err := f.writePieces(own)
		<-f.writing
		res <- err
	})
	select {
	case err := <-res:
		if err != nil {
			return 0, f.writeError(err)
		}
		return len(p), nil
	case <-f.WriteBy.Done():
		return 0, f.OpError("write", os.ErrDeadlineExceeded)
	case <-f.closed:
		return 0, f.OpError("write", f.closedError())
	}
}

// writePieces gives p to SSH, as there is room for it on the wire. A deadline
// counts until it has begun: what is sent in part, a frame perhaps, must be sent
// in whole.
func (f *flow) writePieces(p []byte) (n int, err error) {
	n, err = f.w.Tap.InTurns(p, f.ch.Write, f.closed, f.WriteBy.Done())
	if err == wiring.ErrShutOut {
		err = f.shutOut()
	}
	return n, err
}

// shutOut is why a write was not let in.
func (f *flow) shutOut() error {
	if !f.isClosed() && f.WriteBy.Passed() {
		return os.ErrDeadlineExceeded
	}
	return net.ErrClosed
}

// lockWrite waits for its turn to write.
func (f *flow) lockWrite() error {
	if f.isClosed() {
		return f.OpError("write", f.closedError())
	}
	if f.WriteBy.Passed() {
		return f.OpError("write", os.ErrDeadlineExceeded)
	}
	select {
	case f.writing <- struct{}{}:
		return nil
	case <-f.WriteBy.Done():
		return f.OpError("write", os.ErrDeadlineExceeded)
	case <-f.closed:
		return f.OpError("write", f.closedError())
	}
}

// writeError says what an SSH channel only calls an end of file.
func (f *flow) writeError(err error) error {
	if err == nil {
		return nil
	}
	if f.isClosed() {
		return f.OpError("write", f.closedError())
	}
	if _, broken := f.heard(); broken != nil {
		return f.OpError("write", broken)
	}
	if f.w.Tap.Cause() != nil {
		return f.OpError("write", f.w.Gone())
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return f.OpError("write", err)
	}
	return f.OpError("write", syscall.EPIPE)
}

// Close tells the other end that all was sent, unless a write is under way.
func (f *flow) Close() error {
	f.end(func() {
		select {
		case f.writing <- struct{}{}:
			f.sendFin()
			<-f.writing
		default:
		}
		f.ch.Close()
	})
	return nil
}

// Abort closes with the reason: the other end reads it in place of an end of
// file.
func (f *flow) Abort(reason error) error {
	f.end(func() {
		if f.w.ours {
			f.ch.SendRequest(abortRequest, false, []byte(wiring.Say(reason)))
		}
		f.ch.Close()
	})
	return nil
}

// end ends it once, with a last word. A deadline would keep it in memory.
func (f *flow) end(last func()) {
	f.once.Do(func() {
		defer f.w.Count(-1)
		defer f.SetDeadline(time.Time{})
		close(f.closed)
		last()
	})
}

// sendFin needs the turn to write.
func (f *flow) sendFin() {
	if f.w.ours && !f.finSent {
		f.ch.SendRequest(finRequest, false, nil)
	}
	f.finSent = true
}

func (f *flow) isClosed() bool {
	select {
	case <-f.closed:
		return true
	default:
		return false
	}
}

func (f *flow) closedError() error {
	if f.late.Load() {
		return os.ErrDeadlineExceeded
	}
	return net.ErrClosed
}

func (f *flow) LocalAddr() net.Addr  { return f.local }
func (f *flow) RemoteAddr() net.Addr { return f.remote }

func (f *flow) OpError(op string, err error) error {
	return &net.OpError{Op: op, Net: f.remote.Network(), Source: f.local, Addr: f.remote, Err: err}
}

// stream is a flow of "tcp".
type stream struct{ *flow }

// CloseWrite ends what is sent; reading goes on.
func (s stream) CloseWrite() error {
	if err := s.lockWrite(); err != nil {
		return err
	}
	defer func() { <-s.writing }()
	if s.finSent {
		return nil
	}
	s.sendFin()
	return s.writeError(s.ch.CloseWrite())
}

// WriteTo copies all to dst. It reads the channel itself, which saves a copy and
// a change of goroutines, unless the pump has begun or a deadline is set.
func (s stream) WriteTo(dst io.Writer) (int64, error) {
	s.rmu.Lock()
	s.unbounded.read.Store(true)
	if s.pumping || s.ReadBy.Armed() || s.isClosed() {
		s.unbounded.read.Store(false)
		s.rmu.Unlock()
		return relay.Copy(dst, s.flow)
	}
	defer s.rmu.Unlock()
	defer s.unbounded.read.Store(false)
	return relay.Copy(dst, direct(s))
}

// direct reads without the pump.
type direct struct{ *flow }

func (d direct) Read(p []byte) (int, error) {
	if d.rerr != nil {
		return 0, d.rerr
	}
	n, err := d.readChannel(p)
	d.rerr = err
	return n, err
}
