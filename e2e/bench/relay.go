package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvert-dev/culvert/pkg/tun"
)

// The relay does to packets what a long way does, for TCP and UDP alike, and on
// kernels without netem, too. It takes TCP unsegmented, as a network card would,
// or it would be the bottleneck; what it loses is a segment, never the whole. Of UDP every packet is a datagram.

const (
	// onTheWay bounds what is in the relay, each way: more than fits any window.
	onTheWay = 1 << 16

	// fullAfter is for how long packets queue before a rate; then they are lost.
	fullAfter = 100 * time.Millisecond

	largest = 1 << 16
)

// relayMain is the role "relay": CONDITION NETNS NETNS.
func relayMain(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return errors.New("relay: want CONDITION NETNS NETNS")
	}
	c, err := parseCondition(args[0])
	if err != nil {
		return err
	}
	one, err := openIn(args[1])
	if err != nil {
		return err
	}
	defer one.Close()
	other, err := openIn(args[2])
	if err != nil {
		return err
	}
	defer other.Close()
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { one.Close(); other.Close() })()
	g.Go(func() error { return c.carry(one, other) })
	g.Go(func() error { return c.carry(other, one) })
	if err := g.Wait(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// openIn opens the device of another network namespace, in a thread of its own
// that ends thereafter.
func openIn(path string) (d *tun.Device, err error) {
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		runtime.LockOSThread()
		var there netns.NsHandle
		if there, err = netns.GetFromPath(path); err != nil {
			return
		}
		defer there.Close()
		if err = netns.Set(there); err == nil {
			d, err = tun.Open(wan)
		}
	}()
	<-opened
	if err != nil {
		return nil, fmt.Errorf("relay in %s: %w", path, err)
	}
	return d, nil
}

// A departed packet is on its way.
type departed struct {
	packet []byte // behind its virtio-net header
	due    time.Time
}

// carry takes packets one way until a device is closed.
func (c condition) carry(from, to *tun.Device) error {
	way := make(chan departed, onTheWay)
	var g errgroup.Group
	g.Go(func() error {
		defer close(way)
		return c.depart(from, to, way)
	})
	g.Go(func() error {
		defer func() {
			for range way { // so that who departs sees that it is over
			}
		}()
		defer from.Close()
		return arrive(to, way)
	})
	return g.Wait()
}

func (c condition) depart(from, to *tun.Device, way chan<- departed) error {
	buf := make([]byte, from.HeaderLen()+largest)
	var free time.Time // when the rate lets the next one go
	for {
		n, err := from.Readv([][]byte{buf})
		if err != nil {
			return err
		}
		now := time.Now()
		for _, p := range survivors(bytes.Clone(buf[:n]), from.HeaderLen(), happens(c.Loss)) {
			if happens(c.Reorder)() {
				if err := write(to, p); err != nil {
					return err
				}
				continue
			}
			if free.Sub(now) < fullAfter {
				free = c.gone(free, now, len(p)-from.HeaderLen())
				way <- departed{p, free.Add(c.RTT / 2)}
			}
		}
	}
}

// gone is when the last bit of a packet has left, if the one before had by free.
func (c condition) gone(free, now time.Time, size int) time.Time {
	if free.Before(now) {
		free = now
	}
	if c.Rate == 0 {
		return free
	}
	return free.Add(time.Duration(float64(size) * 8 / c.Rate * float64(time.Microsecond)))
}

// arrive sleeps in the kernel: Go's own timers are up to a millisecond late.
func arrive(to *tun.Device, way <-chan departed) error {
	for d := range way {
		if wait := time.Until(d.due); wait > 0 {
			ts := unix.NsecToTimespec(int64(wait))
			_ = unix.Nanosleep(&ts, nil) // a signal that cuts it short does little harm
		}
		if err := write(to, d.packet); err != nil {
			return err
		}
	}
	return nil
}

func write(to *tun.Device, packet []byte) error {
	_, err := to.Writev([][]byte{packet})
	return err
}

// happens is a die that falls so many times in a hundred.
func happens(percent float64) func() bool {
	return func() bool { return percent > 0 && rand.Float64()*100 < percent }
}

// survivors are what is left of a packet: itself, or if some of its segments are
// lost what was before, between and after them.
func survivors(packet []byte, headerLen int, lost func() bool) (left [][]byte) {
	u := unsegmented{packet, headerLen}
	n, begin := u.segments(), 0
	for i := range n {
		if lost() {
			if begin < i {
				left = append(left, u.cut(begin, i))
			}
			begin = i + 1
		}
	}
	switch {
	case begin == 0:
		return [][]byte{packet}
	case begin < n:
		left = append(left, u.cut(begin, n))
	}
	return left
}

// An unsegmented packet is IPv4 behind a virtio-net header (linux/virtio_net.h),
// which tells of what size the segments shall be.
type unsegmented struct {
	b         []byte
	headerLen int
}

const (
	gsoType = 1 // where it is in the header
	gsoSize = 4
)

func (u unsegmented) ip() header.IPv4 { return header.IPv4(u.b[u.headerLen:]) }

func (u unsegmented) size() int { return int(binary.NativeEndian.Uint16(u.b[gsoSize:])) }

// payload is where the TCP payload begins.
func (u unsegmented) payload() int {
	ip := u.ip()
	return u.headerLen + int(ip.HeaderLength()) + int(header.TCP(ip.Payload()).DataOffset())
}

func (u unsegmented) segments() int {
	if u.b[gsoType] == unix.VIRTIO_NET_HDR_GSO_NONE {
		return 1
	}
	return (len(u.b) - u.payload() + u.size() - 1) / u.size()
}

// cut makes a packet of the segments from begin to before end. The kernel left the
// TCP checksum to who segments, so there is only that of the pseudo header.
func (u unsegmented) cut(begin, end int) []byte {
	from, to := u.payload()+begin*u.size(), min(u.payload()+end*u.size(), len(u.b))
	c := unsegmented{append(bytes.Clone(u.b[:u.payload()]), u.b[from:to]...), u.headerLen}
	if to-from <= u.size() {
		c.b[gsoType] = unix.VIRTIO_NET_HDR_GSO_NONE
		binary.NativeEndian.PutUint16(c.b[gsoSize:], 0)
	}
	ip := c.ip()
	ip.SetTotalLength(uint16(len(ip)))
	ip.SetID(ip.ID() + uint16(begin))
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	tcp := header.TCP(ip.Payload())
	tcp.SetSequenceNumber(tcp.SequenceNumber() + uint32(begin*u.size()))
	if to < len(u.b) {
		tcp.SetFlags(uint8(tcp.Flags() &^ (header.TCPFlagFin | header.TCPFlagPsh)))
	}
	tcp.SetChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(tcp))))
	return c.b
}
