package netstack_test

import (
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/culvert-dev/culvert/pkg/netstack"
)

// BenchmarkStream carries one stream through the device to a socket of the far
// end and back, with and without the virtio-net header.
func BenchmarkStream(b *testing.B) {
	needNetns(b)
	for _, gso := range []bool{true, false} {
		for _, mtu := range []int{1500, 65535} {
			for _, down := range []bool{false, true} {
				b.Run(fmt.Sprintf("gso=%v/mtu=%d/down=%v", gso, mtu, down), func(b *testing.B) { stream(b, gso, mtu, down) })
			}
		}
	}
}

func stream(b *testing.B, gso bool, mtu int, down bool) {
	e := newFarEnd(b)
	start(b, mtu, e, func(c *netstack.Config) {
		if !gso {
			c.Device = whole(b, c.Device)
		}
	})
	const chunk = 1 << 20
	source := func(c net.Conn) {
		buf := make([]byte, chunk)
		for range b.N {
			c.Write(buf)
		}
		c.(*net.TCPConn).CloseWrite()
	}
	sunk := make(chan int64, 1)
	sink := func(c net.Conn) {
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, chunk))
		sunk <- n
	}
	near, far := source, sink
	if down {
		near, far = sink, source
	}
	serve(b, e, web4+":80", func(c net.Conn) { far(c); c.Close() })
	c := dial(b, "tcp", web4+":80")
	b.SetBytes(chunk)
	b.ResetTimer()
	near(c)
	if n := <-sunk; n != int64(b.N)*chunk {
		b.Errorf("%d bytes arrived of %d", n, b.N*chunk)
	}
}

// BenchmarkConnect opens connections one after the other.
func BenchmarkConnect(b *testing.B) {
	needNetns(b)
	e := newFarEnd(b)
	start(b, 65535, e)
	serve(b, e, web4+":80", func(c net.Conn) { c.Write([]byte("x")); c.Close() })
	for b.Loop() {
		c, err := net.Dial("tcp", web4+":80")
		must(b, err)
		readN(b, c, 1)
		c.Close()
	}
}
