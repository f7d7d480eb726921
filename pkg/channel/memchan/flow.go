package memchan

import (
	"cmp"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
)

const (
	flowQueue   = 256 // datagrams that wait to be read; more are dropped, as a kernel does
	maxDatagram = 65535
)

// flow is one end of a "udp" flow.
type flow struct {
	in            chan []byte
	peer          *flow
	local, remote net.Addr
	knock         *knock // of the end that answers; nil at the other one

	deadline.Pair
	once   sync.Once
	closed chan struct{}
	why    error // what the peer reads when this end is closed
}

func flows(near, far net.Addr) (a, b *flow) {
	a = &flow{in: make(chan []byte, flowQueue), local: near, remote: far, closed: make(chan struct{})}
	b = &flow{in: make(chan []byte, flowQueue), local: far, remote: near, closed: make(chan struct{})}
	a.peer, b.peer = b, a
	return a, b
}

func (f *flow) Read(p []byte) (int, error) {
	if err := f.usable(&f.ReadBy); err != nil {
		return 0, f.opError("read", err)
	}
	select {
	case b := <-f.in:
		return copy(p, b), nil
	default:
	}
	select {
	case b := <-f.in:
		return copy(p, b), nil
	case <-f.ReadBy.Done():
		return 0, f.opError("read", os.ErrDeadlineExceeded)
	case <-f.closed:
		return 0, f.opError("read", net.ErrClosed)
	case <-f.peer.closed:
		return f.last(p)
	}
}

// last reads what the peer wrote before it closed, and then why.
func (f *flow) last(p []byte) (int, error) {
	select {
	case b := <-f.in:
		return copy(p, b), nil
	default:
		return 0, f.opError("read", f.peer.why)
	}
}

func (f *flow) Write(p []byte) (int, error) {
	if err := f.usable(&f.WriteBy); err != nil {
		return 0, f.opError("write", err)
	}
	if len(p) > maxDatagram {
		return 0, f.opError("write", syscall.EMSGSIZE)
	}
	select {
	case <-f.peer.closed:
		return 0, f.opError("write", syscall.ECONNREFUSED)
	default:
	}
	select {
	case f.peer.in <- append([]byte(nil), p...):
	default:
	}
	return len(p), nil
}

func (f *flow) usable(d *deadline.Deadline) error {
	if err := f.knock.taken(); err != nil {
		return err
	}
	select {
	case <-f.closed:
		return net.ErrClosed
	default:
	}
	if d.Passed() {
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (f *flow) Close() error {
	f.end(syscall.ECONNREFUSED, io.EOF)
	return nil
}

// Abort closes with the reason, which the peer reads.
func (f *flow) Abort(reason error) error {
	f.end(cmp.Or(reason, broken(reason)), broken(reason))
	return nil
}

func (f *flow) end(refusal, why error) {
	f.knock.refused(refusal)
	f.once.Do(func() {
		f.why = why
		close(f.closed)
	})
}

func (f *flow) LocalAddr() net.Addr  { return f.local }
func (f *flow) RemoteAddr() net.Addr { return f.remote }

func (f *flow) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "udp", Source: f.local, Addr: f.remote, Err: err}
}
