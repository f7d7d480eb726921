package channel

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/internal/deadline"
)

const (
	flowBacklog = 128 // flows that wait to be accepted
	flowQueue   = 256 // datagrams that wait to be read, of one flow
	maxDatagram = 65535
)

// flows is a listener over one UDP socket: datagrams of one remote address are
// one flow. What cannot be queued is dropped, as a kernel does.
type flows struct {
	pc   *net.UDPConn
	idle time.Duration

	backlog chan *flow
	done    chan struct{} // closed when the reader is gone

	mu  sync.Mutex
	all map[netip.AddrPort]*flow
}

func newFlows(pc *net.UDPConn, idle time.Duration) *flows {
	l := &flows{
		pc:      pc,
		idle:    idle,
		backlog: make(chan *flow, flowBacklog),
		done:    make(chan struct{}),
		all:     make(map[netip.AddrPort]*flow),
	}
	go l.read()
	return l
}

func (l *flows) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "udp", Addr: l.Addr(), Err: net.ErrClosed}
	default:
	}
	select {
	case f := <-l.backlog:
		return f, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "udp", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

func (l *flows) Addr() net.Addr { return l.pc.LocalAddr() }

func (l *flows) Close() error {
	err := l.pc.Close()
	<-l.done
	return err
}

func (l *flows) read() {
	defer close(l.done)
	defer l.closeAll()
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := l.pc.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(posix(err), syscall.ECONNRESET) {
				continue // Windows tells here of a flow whose peer is gone
			}
			return
		}
		if f := l.flow(from); f != nil {
			f.deliver(append([]byte(nil), buf[:n]...))
		}
	}
}

// flow finds the flow of an address, or begins one if there is room.
func (l *flows) flow(from netip.AddrPort) *flow {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.all[from]; f != nil {
		return f
	}
	f := &flow{l: l, remote: from, queue: make(chan []byte, flowQueue), closed: make(chan struct{})}
	select {
	case l.backlog <- f:
	default:
		return nil
	}
	l.all[from] = f
	f.timer = time.AfterFunc(l.idle, func() { f.end(io.EOF) })
	return f
}

func (l *flows) forget(f *flow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all[f.remote] == f {
		delete(l.all, f.remote)
	}
}

func (l *flows) closeAll() {
	l.mu.Lock()
	all := l.all
	l.all = map[netip.AddrPort]*flow{}
	l.mu.Unlock()
	for _, f := range all {
		f.end(net.ErrClosed)
	}
}

// flow is one remote address of a flows.
type flow struct {
	l      *flows
	remote netip.AddrPort
	queue  chan []byte
	timer  *time.Timer
	deadline.Pair

	once   sync.Once
	closed chan struct{}
	err    error // why closed
}

func (f *flow) deliver(b []byte) {
	select {
	case f.queue <- b:
		f.touch()
	default:
	}
}

func (f *flow) touch() {
	select {
	case <-f.closed:
	default:
		f.timer.Reset(f.l.idle)
	}
}

func (f *flow) Read(p []byte) (int, error) {
	if f.ReadBy.Passed() {
		return 0, f.opError("read", os.ErrDeadlineExceeded)
	}
	select {
	case b := <-f.queue:
		return copy(p, b), nil
	default:
	}
	select {
	case b := <-f.queue:
		return copy(p, b), nil
	case <-f.ReadBy.Done():
		return 0, f.opError("read", os.ErrDeadlineExceeded)
	case <-f.closed:
		if f.err == io.EOF {
			return 0, io.EOF
		}
		return 0, f.opError("read", f.err)
	}
}

func (f *flow) Write(p []byte) (int, error) {
	select {
	case <-f.closed:
		return 0, f.opError("write", net.ErrClosed)
	default:
	}
	if f.WriteBy.Passed() {
		return 0, f.opError("write", os.ErrDeadlineExceeded)
	}
	f.touch()
	return f.l.pc.WriteToUDPAddrPort(p, f.remote)
}

func (f *flow) Close() error {
	f.end(net.ErrClosed)
	return nil
}

func (f *flow) end(err error) {
	f.once.Do(func() {
		f.l.forget(f) // first: who sees the end may count on the next datagram to begin another
		f.timer.Stop()
		f.err = err
		close(f.closed)
	})
}

func (f *flow) LocalAddr() net.Addr  { return f.l.pc.LocalAddr() }
func (f *flow) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(f.remote) }

func (f *flow) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "udp", Source: f.LocalAddr(), Addr: f.RemoteAddr(), Err: err}
}
