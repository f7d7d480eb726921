package netstack

import (
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// A flight bounds what all connections together have on their way to another machine,
// by their send buffers: to more than what the path holds, by as much as its queues and
// the receiver's socket take. gVisor's own bound is loss, which comes in hundreds of
// segments when a window was opened too far; and while it repairs that, it looks at the
// whole window for each acknowledgement, and acknowledgements queue up for seconds.
type flight struct {
	born    time.Time    // all times are since then
	ends    atomic.Int64 // of the epoch
	writing atomic.Int64 // connections in a Write: those that wait for the path are, mostly
	bytes   atomic.Int64 // that have left in the epoch: those written, without those that are kept

	mu     sync.Mutex
	begun  time.Duration // of the epoch
	rates  [2]float64    // the largest of this second and the one before, bytes/s
	second int64         // number of the rates' second
	rtt    time.Duration // the least there was: a path that has become longer gets by with slack
}

const (
	epochLen = 50 * time.Millisecond

	// flightSlack is a quarter of a receiver's socket buffer (wgchan), for it may be
	// counted double, and the round trip time, in milliseconds here, may be rounded up.
	flightSlack = 1 << 20

	flightGain = 1.5 // lets the rate grow

	leastSend = 256 << 10
	leastRTT  = time.Millisecond

	// waited is a Write that has: for room in the buffer.
	waited = time.Millisecond
)

func newFlight() *flight { return &flight{born: time.Now()} }

// write writes to a connection, whose send buffer it sets now and then; nil lets it be.
func (f *flight) write(c *tcpConn, b []byte) (int, error) {
	if f == nil {
		return c.TCPConn.Write(b)
	}
	f.writing.Add(1)
	defer f.writing.Add(-1)
	begun := time.Since(f.born)
	n, err := c.TCPConn.Write(b)
	now := time.Since(f.born)
	f.bytes.Add(int64(n))
	if now-begun >= waited {
		c.full.Store(true)
	}
	if epoch := f.ends.Load(); c.epoch.Load() != epoch || int64(now) >= epoch {
		f.adjust(c, now)
	}
	return n, err
}

// adjust gives a connection its share. A buffer that was full will be again: what it's
// larger by is written, and has not left.
func (f *flight) adjust(c *tcpConn, now time.Duration) {
	var info tcpip.TCPInfoOption
	if c.ep.GetSockOpt(&info) != nil {
		return
	}
	size, was := f.share(now, info.RTT), c.ep.SocketOptions().GetSendBufferSize()
	c.epoch.Store(f.ends.Load())
	full := c.full.Swap(false)
	if size <= was+was/8 && size >= was-was/8 {
		return
	}
	if full && size > was {
		f.bytes.Add(was - size)
	}
	c.ep.SocketOptions().SetSendBufferSize(size, true)
}

// share is the part of one connection that writes of what all may have on their way.
func (f *flight) share(now, rtt time.Duration) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if int64(now) >= f.ends.Load() {
		f.turn(now)
	}
	if rtt > 0 && (f.rtt == 0 || rtt < f.rtt) {
		f.rtt = rtt
	}
	all := flightSlack + flightGain*max(f.rates[0], f.rates[1])*max(f.rtt, leastRTT).Seconds()
	return min(max(int64(all)/max(f.writing.Load(), 1), leastSend), remoteSend)
}

// turn begins an epoch. The lock is held.
func (f *flight) turn(now time.Duration) {
	rate := float64(f.bytes.Swap(0)) / max(now-f.begun, time.Millisecond).Seconds()
	f.begun = now
	f.ends.Store(int64(now + max(epochLen, f.rtt)))
	switch second := int64(now / time.Second); second - f.second {
	case 0:
	case 1:
		f.rates, f.second = [2]float64{0, f.rates[0]}, second
	default:
		f.rates, f.second = [2]float64{}, second
	}
	f.rates[0] = max(f.rates[0], rate)
}
