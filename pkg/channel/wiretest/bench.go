package wiretest

import (
	"context"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Bench measures a wire over a byte stream, on the loopback.
func Bench(b *testing.B, ends NewEnds) { BenchSites(b, sites(ends)) }

// BenchSites measures a wire over the loopback, with the machine's own sockets at the
// far end.
func BenchSites(b *testing.B, ends NewSite) {
	b.Run("Up", func(b *testing.B) { benchBulk(b, ends, 1, 0, up) })
	b.Run("Down", func(b *testing.B) { benchBulk(b, ends, 1, 0, down) })
	b.Run("Up8", func(b *testing.B) { benchBulk(b, ends, 8, 0, up) })
	b.Run("Down8", func(b *testing.B) { benchBulk(b, ends, 8, 0, down) })
	b.Run("Up100ms", func(b *testing.B) { benchBulk(b, ends, 1, 50*time.Millisecond, up) })
	b.Run("Down100ms", func(b *testing.B) { benchBulk(b, ends, 1, 50*time.Millisecond, down) })
	b.Run("RoundTrip", func(b *testing.B) { benchRoundTrip(b, ends, false) })
	b.Run("RoundTripLoaded", func(b *testing.B) { benchRoundTrip(b, ends, true) })
	b.Run("Dial", func(b *testing.B) { benchDial(b, ends) })
	b.Run("Idle1000", func(b *testing.B) { benchIdle(b, ends) })
}

// lag copies, and lets all arrive later, as a long line does that holds as much
// as is given to it.
func lag(dst, src net.Conn, delay time.Duration) {
	type piece struct {
		b   []byte
		due time.Time
	}
	line := make(chan piece, 1<<16)
	go func() {
		defer close(line)
		for {
			buf := make([]byte, 64<<10)
			n, err := src.Read(buf)
			if err != nil {
				return
			}
			line <- piece{buf[:n], time.Now().Add(delay)}
		}
	}()
	for p := range line {
		time.Sleep(time.Until(p.due))
		dst.Write(p.b)
	}
	dst.Close()
}

// benchServer is a listener on the loopback, and what it does with connections.
func benchServer(b *testing.B, handle func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
	return l.Addr().String()
}

func benchOpen(b *testing.B, ch channel.Channel, address string) net.Conn {
	c, err := ch.DialContext(context.Background(), "tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	return c
}

const benchChunk = 1 << 20

// up sends so many chunks to a server that tells when it has them all.
func up(b *testing.B, ch channel.Channel, chunks int) {
	c := benchOpen(b, ch, benchServer(b, func(c net.Conn) {
		io.Copy(io.Discard, c)
		c.Write([]byte("x"))
	}))
	defer c.Close()
	buf := make([]byte, benchChunk)
	for range chunks {
		if _, err := c.Write(buf); err != nil {
			b.Error(err)
			return
		}
	}
	c.(channel.CloseWriter).CloseWrite()
	io.ReadFull(c, buf[:1])
}

// down takes as many from one, the way a session does: by relay.Join.
func down(b *testing.B, ch channel.Channel, chunks int) {
	c := benchOpen(b, ch, benchServer(b, func(c net.Conn) {
		buf := make([]byte, benchChunk)
		for range chunks {
			if _, err := c.Write(buf); err != nil {
				b.Error(err)
				return
			}
		}
	}))
	app, local := tcpPipe(b)
	go relay.Join(local, c)
	defer app.Close()
	if n, err := io.Copy(io.Discard, app); err != nil || n != int64(chunks)*benchChunk {
		b.Errorf("%d bytes, %v", n, err)
	}
}

// benchBulk moves b.N chunks over as many flows at once.
func benchBulk(b *testing.B, ends NewSite, flows int, delay time.Duration, move func(*testing.B, channel.Channel, int)) {
	ch := reach(b, ends, Beats{}, Way{Delay: delay}, &channel.Host{})
	move(b, ch, 1) // the wire is warm
	b.SetBytes(benchChunk)
	before := worked()
	b.ResetTimer()
	var all sync.WaitGroup
	for i := range flows {
		chunks := b.N / flows
		if i < b.N%flows {
			chunks++
		}
		all.Go(func() { move(b, ch, chunks) })
	}
	all.Wait()
	b.ReportMetric((worked()-before).Seconds()/float64(b.N)*(1<<30)/benchChunk, "cpu-s/GiB")
}

// benchRoundTrip is of a byte, alone or beside a flow that sends all it can.
func benchRoundTrip(b *testing.B, ends NewSite, loaded bool) {
	ch := reach(b, ends, Beats{}, Way{}, &channel.Host{})
	c := benchOpen(b, ch, benchServer(b, func(c net.Conn) { io.Copy(c, c) }))
	defer c.Close()
	if loaded {
		bulk := benchOpen(b, ch, benchServer(b, func(c net.Conn) { io.Copy(io.Discard, c) }))
		defer bulk.Close()
		go pour(bulk)
	}
	buf := make([]byte, 1)
	took := make([]time.Duration, 0, 1<<20)
	for b.Loop() {
		began := time.Now()
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-us")
}

// benchDial is of flows that come and go, one after the other, each with a byte.
func benchDial(b *testing.B, ends NewSite) {
	ch := reach(b, ends, Beats{}, Way{}, &channel.Host{})
	address := benchServer(b, func(c net.Conn) { io.Copy(c, c) })
	buf := make([]byte, 1)
	for b.Loop() {
		c := benchOpen(b, ch, address)
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "flows/s")
}

// benchIdle is what 1,000 flows hold, at both ends together, that have sent and
// received 64 KiB each and are silent: with their relays and sockets' goroutines.
func benchIdle(b *testing.B, ends NewSite) {
	const flows = 1000
	address := benchServer(b, func(c net.Conn) { io.Copy(c, c) })
	for b.Loop() {
		ch := reach(b, ends, Beats{}, Way{}, &channel.Host{})
		before := inUse()
		conns := make([]net.Conn, flows)
		buf := make([]byte, 64<<10)
		for i := range conns {
			conns[i] = benchOpen(b, ch, address)
			go conns[i].Write(buf)
			io.ReadFull(conns[i], make([]byte, len(buf)))
		}
		b.ReportMetric(float64(inUse()-before)/flows, "B/flow")
		for _, c := range conns {
			c.Close()
		}
		ch.Close()
		ch.Wait()
	}
}

// inUse is the memory in use: heap and stacks.
func inUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}
