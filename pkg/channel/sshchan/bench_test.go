package sshchan

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

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

func benchDial(b *testing.B, address string) (*Channel, net.Conn) {
	near, far := tcpPipe(b)
	ch := connect(b, near, far, &channel.Host{})
	c, err := ch.DialContext(context.Background(), "tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	return ch, c
}

const benchChunk = 1 << 20

func BenchmarkUp(b *testing.B) {
	_, c := benchDial(b, benchServer(b, func(c net.Conn) {
		io.Copy(io.Discard, c)
		c.Write([]byte("x"))
	}))
	buf := make([]byte, benchChunk)
	b.SetBytes(benchChunk)
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	c.(channel.CloseWriter).CloseWrite()
	io.ReadFull(c, buf[:1])
}

func BenchmarkDown(b *testing.B) {
	_, c := benchDial(b, benchServer(b, func(c net.Conn) {
		buf := make([]byte, benchChunk)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}))
	defer c.Close()
	b.Run("Read", func(b *testing.B) {
		buf := make([]byte, benchChunk)
		b.SetBytes(benchChunk)
		for b.Loop() {
			if _, err := io.ReadFull(c, buf); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkDownJoin is the way of a download in a session: relay.Join.
func BenchmarkDownJoin(b *testing.B) {
	want := make(chan int)
	_, c := benchDial(b, benchServer(b, func(c net.Conn) {
		buf := make([]byte, benchChunk)
		for range <-want {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}))
	near, far := tcpPipe(b)
	go relay.Join(far, c)
	b.SetBytes(benchChunk)
	want <- b.N
	b.ResetTimer()
	if _, err := io.Copy(io.Discard, near); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	_, c := benchDial(b, benchServer(b, func(c net.Conn) { io.Copy(c, c) }))
	defer c.Close()
	buf := make([]byte, 1)
	for b.Loop() {
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDial(b *testing.B) {
	address := benchServer(b, func(c net.Conn) { io.Copy(c, c) })
	ch, c := benchDial(b, address)
	c.Close()
	for b.Loop() {
		c, err := ch.DialContext(context.Background(), "tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
