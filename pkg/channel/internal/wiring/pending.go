package wiring

import (
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Stream is a connection of "tcp" over a wire.
type Stream interface {
	Flow
	channel.CloseWriter
	io.WriterTo
}

// Offer is a connection that the far end accepted, and that waits for its answer.
type Offer interface {
	Accept() (Stream, error) // may fail as a wire does that is gone
	Reject(reason error)
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
}

// NewPending is the connection of "tcp" that is offered: a stream as soon as it
// is answered.
func NewPending(o Offer) channel.Pending { return &pending{Offer: o} }

type pending struct {
	Offer

	once   sync.Once
	stream Stream // set when taken
	err    error  // set when it cannot be taken any more
}

// decide answers the far end, the first time.
func (p *pending) decide(refusal error) {
	p.once.Do(func() {
		if refusal != nil {
			p.err = net.ErrClosed
			p.Reject(refusal)
			return
		}
		p.stream, p.err = p.Accept()
	})
}

func (p *pending) Answer(err error) error {
	p.decide(err)
	switch {
	case err == nil && p.err != nil:
		return p.opError("accept")
	case err != nil && p.err == nil:
		return p.stream.Abort(err)
	}
	return nil
}

// taken takes the connection if nobody answered yet.
func (p *pending) taken(op string) (Stream, error) {
	p.decide(nil)
	if p.err != nil {
		return nil, p.opError(op)
	}
	return p.stream, nil
}

func (p *pending) opError(op string) error {
	return &net.OpError{Op: op, Net: "tcp", Source: p.LocalAddr(), Addr: p.RemoteAddr(), Err: p.err}
}

func (p *pending) Read(b []byte) (int, error) {
	s, err := p.taken("read")
	if err != nil {
		return 0, err
	}
	return s.Read(b)
}

func (p *pending) WriteTo(dst io.Writer) (int64, error) {
	s, err := p.taken("read")
	if err != nil {
		return 0, err
	}
	return s.WriteTo(dst)
}

func (p *pending) Write(b []byte) (int, error) {
	s, err := p.taken("write")
	if err != nil {
		return 0, err
	}
	return s.Write(b)
}

func (p *pending) CloseWrite() error {
	s, err := p.taken("close")
	if err != nil {
		return err
	}
	return s.CloseWrite()
}

// Close refuses what was not taken, as nobody's port does.
func (p *pending) Close() error {
	p.decide(syscall.ECONNREFUSED)
	if p.err != nil {
		return nil
	}
	return p.stream.Close()
}

func (p *pending) Abort(reason error) error { return p.Answer(reason) }

func (p *pending) SetDeadline(t time.Time) error {
	return p.set(func(s Stream) error { return s.SetDeadline(t) })
}
func (p *pending) SetReadDeadline(t time.Time) error {
	return p.set(func(s Stream) error { return s.SetReadDeadline(t) })
}
func (p *pending) SetWriteDeadline(t time.Time) error {
	return p.set(func(s Stream) error { return s.SetWriteDeadline(t) })
}

func (p *pending) set(how func(Stream) error) error {
	s, err := p.taken("set")
	if err != nil {
		return err
	}
	return how(s)
}
