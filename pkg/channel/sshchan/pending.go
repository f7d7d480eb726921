package sshchan

import (
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// pending is a connection of "tcp" that the far end accepted, from before its
// SSH channel is confirmed: a stream as soon as it is.
type pending struct {
	w       *wire
	in      incoming
	network string
	local   net.Addr

	once   sync.Once
	stream stream // set when taken
	err    error  // set when it cannot be taken any more
}

var _ channel.Pending = (*pending)(nil)

// incoming is a connection that the far end accepted.
type incoming struct {
	ssh.NewChannel
	origin net.Addr
}

// accept confirms the channel.
func (p *pending) accept() (net.Conn, error) {
	ch, reqs, err := p.in.Accept()
	if err != nil {
		return nil, p.w.gone()
	}
	return newConn(p.w, ch, reqs, p.network, p.local, p.in.origin), nil
}

// decide answers the far end, the first time.
func (p *pending) decide(refusal error) {
	p.once.Do(func() {
		if refusal != nil {
			p.err = net.ErrClosed
			p.in.Reject(reason(refusal), say(refusal))
			return
		}
		c, err := p.accept()
		if err != nil {
			p.err = err
			return
		}
		p.stream = c.(stream)
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
func (p *pending) taken(op string) (stream, error) {
	p.decide(nil)
	if p.err != nil {
		return stream{}, p.opError(op)
	}
	return p.stream, nil
}

func (p *pending) opError(op string) error {
	return &net.OpError{Op: op, Net: p.network, Source: p.local, Addr: p.in.origin, Err: p.err}
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

func (p *pending) LocalAddr() net.Addr  { return p.local }
func (p *pending) RemoteAddr() net.Addr { return p.in.origin }

func (p *pending) SetDeadline(t time.Time) error {
	return p.set(func(s stream) error { return s.SetDeadline(t) })
}
func (p *pending) SetReadDeadline(t time.Time) error {
	return p.set(func(s stream) error { return s.SetReadDeadline(t) })
}
func (p *pending) SetWriteDeadline(t time.Time) error {
	return p.set(func(s stream) error { return s.SetWriteDeadline(t) })
}

func (p *pending) set(how func(stream) error) error {
	s, err := p.taken("set")
	if err != nil {
		return err
	}
	return how(s)
}
