package wgchan

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A way relays datagrams between who sends to it and one address, as a path does that
// is slow, long, lossy or narrow.
type way struct {
	near     *net.UDPConn // faces who dials
	up, down *lane
	hushed   atomic.Bool
	widest   atomic.Int64 // datagram; 0: any
	lost     atomic.Uint64
	lose     atomic.Int64 // one of so many; 0: none

	port   uint16
	mu     sync.Mutex
	client netip.AddrPort
	far    *net.UDPConn
	over   bool
	wg     sync.WaitGroup
}

// lane is one direction.
type lane struct {
	perSecond, buffer int
	delay             time.Duration
	queue             chan datagram
	mu                sync.Mutex
	queued            int
	over              bool
}

type datagram struct {
	b   []byte
	due time.Time
}

func newLane(perSecond, buffer int, delay time.Duration) *lane {
	return &lane{perSecond: perSecond, buffer: max(buffer, 16<<10), delay: delay, queue: make(chan datagram, 1<<16)}
}

func (l *lane) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	close(l.queue)
}

// put queues what there is room for.
func (l *lane) put(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || l.perSecond > 0 && l.queued+len(b) > l.buffer {
		return
	}
	select {
	case l.queue <- datagram{append([]byte(nil), b...), time.Now().Add(l.delay)}:
		l.queued += len(b)
	default:
	}
}

func (l *lane) run(send func([]byte)) {
	for d := range l.queue {
		time.Sleep(time.Until(d.due))
		if l.perSecond > 0 {
			time.Sleep(time.Second * time.Duration(len(d.b)) / time.Duration(l.perSecond))
		}
		l.mu.Lock()
		l.queued -= len(d.b)
		l.mu.Unlock()
		send(d.b)
	}
}

// newWay leads to a port of the loopback.
func newWay(t testing.TB, port uint16, up, down *lane) *way {
	t.Helper()
	r := &way{up: up, down: down}
	var err error
	if r.near, err = net.ListenUDP("udp4", nil); err != nil {
		t.Fatal(err)
	}
	r.near.SetReadBuffer(4 << 20)
	r.near.SetWriteBuffer(4 << 20)
	r.port = port
	r.rebind(t)
	r.wg.Go(func() {
		defer up.end()
		buf := make([]byte, maxPacket)
		for {
			n, from, err := r.near.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			r.mu.Lock()
			r.client = from
			r.mu.Unlock()
			if r.passes(n) {
				up.put(buf[:n])
			}
		}
	})
	r.wg.Go(func() { up.run(func(b []byte) { r.socket().Write(b) }) })
	r.wg.Go(func() {
		down.run(func(b []byte) {
			r.mu.Lock()
			to := r.client
			r.mu.Unlock()
			r.near.WriteToUDPAddrPort(b, to)
		})
	})
	return r
}

func (r *way) socket() *net.UDPConn {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.far
}

// rebind goes on from another port, as a NAT does that has forgotten the first.
func (r *way) rebind(t testing.TB) {
	t.Helper()
	far, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(r.port)})
	if err != nil {
		t.Fatal(err)
	}
	far.SetReadBuffer(4 << 20)
	far.SetWriteBuffer(4 << 20)
	r.mu.Lock()
	before := r.far
	r.far = far
	r.mu.Unlock()
	if before != nil {
		before.Close()
	}
	r.wg.Go(func() {
		buf := make([]byte, maxPacket)
		for {
			n, err := far.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if r.passes(n) {
				r.down.put(buf[:n])
			}
		}
	})
}

func (r *way) close() {
	r.near.Close()
	r.socket().Close()
	r.mu.Lock()
	if !r.over {
		r.over = true
		r.down.end()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

func (r *way) passes(n int) bool {
	if widest := r.widest.Load(); n == 0 || r.hushed.Load() || widest > 0 && int64(n) > widest {
		return false
	}
	if lose := r.lose.Load(); lose > 0 && r.lost.Add(1)%uint64(lose) == 0 {
		return false
	}
	return true
}

func (r *way) address() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), r.near.LocalAddr().(*net.UDPAddr).AddrPort().Port())
}
