package channeltest

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// ServeTCP serves with a handler, on a port of the loopback; connections are
// closed after it, and both are gone before the test is.
func ServeTCP(t testing.TB, handle func(net.Conn)) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// Echo answers with what comes, until that ends.
func Echo(c net.Conn) { io.Copy(c, c) }

func echoTCP(t *testing.T) (address string) {
	return ServeTCP(t, Echo)
}

func echoUDP(t *testing.T) (address string) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		pc.Close()
		<-done
	})
	return pc.LocalAddr().String()
}

// echoAll sends datagrams back until the connection is closed.
func echoAll(c net.Conn) {
	buf := make([]byte, 1<<16)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		c.Write(buf[:n])
	}
}

// closedPort is an address where nobody listens.
func closedPort(t *testing.T, network string) string {
	t.Helper()
	if network == "udp" {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		return pc.LocalAddr().String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func dial(t *testing.T, n channel.Network, network, address string) net.Conn {
	t.Helper()
	c, err := n.DialContext(soon(t), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func listen(t *testing.T, n channel.Network, network string) net.Listener {
	t.Helper()
	l, err := n.Listen(soon(t), network, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func closeWrite(t *testing.T, c net.Conn) {
	cw, ok := c.(channel.CloseWriter)
	if !ok {
		t.Errorf("%T has no CloseWrite", c)
		return
	}
	if err := cw.CloseWrite(); err != nil {
		t.Error("CloseWrite:", err)
	}
}

// exchange writes to an echo and reads back as much.
func exchange(t *testing.T, c net.Conn, data []byte) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	defer c.SetReadDeadline(time.Time{})
	if n, err := c.Write(data); err != nil || n != len(data) {
		t.Fatalf("write of %d bytes: %d, %v", len(data), n, err)
	}
	got := make([]byte, 1<<16)
	n, err := c.Read(got)
	for err == nil && n < len(data) && c.LocalAddr().Network() == "tcp" {
		var m int
		m, err = c.Read(got[n:])
		n += m
	}
	if err != nil || !bytes.Equal(got[:n], data) {
		t.Fatalf("echo of %d bytes: %d, %v", len(data), n, err)
	}
}

func hashAll(r io.Reader) (sum [32]byte) {
	h := sha256.New()
	io.Copy(h, r)
	h.Sum(sum[:0])
	return sum
}

// receive waits for what must come.
func receive[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
	return v
}
