package sshchan

import (
	"context"
	"net"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

func TestMain(m *testing.M) { channeltest.Main(m) }

// pair makes the configurations of two ends that know each other.
func pair(t testing.TB) (near, far Config) {
	t.Helper()
	nearKey, nearPub, err := GenerateKey("near")
	if err != nil {
		t.Fatal(err)
	}
	farKey, farPub, err := GenerateKey("far")
	if err != nil {
		t.Fatal(err)
	}
	if near.Identity, err = ParseIdentity(nearKey, farPub); err != nil {
		t.Fatal(err)
	}
	if far.Identity, err = ParseIdentity(farKey, nearPub); err != nil {
		t.Fatal(err)
	}
	return near, far
}

// tcpPipe is a connection over the loopback.
func tcpPipe(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// serve runs the far end and gives what it returned.
func serve(ctx context.Context, conn net.Conn, cfg Config, n channel.Network) <-chan error {
	res := make(chan error, 1)
	go func() { res <- Serve(ctx, conn, cfg, n) }()
	return res
}

// connect makes a channel over a pair of connections.
func connect(t testing.TB, a, b net.Conn, n channel.Network) *Channel {
	t.Helper()
	near, far := pair(t)
	served := serve(context.Background(), b, far, n)
	ch, err := Dial(context.Background(), a, near)
	if err != nil {
		t.Fatal(err, <-served)
	}
	t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		<-served
	})
	return ch
}

// ends are both ends of a wire over SSH.
func ends(t testing.TB, b wiretest.Beats) wiretest.Ends {
	near, far := pair(t)
	near.Keepalive, far.Keepalive = b.Every, b.Every
	near.OnAlive, far.OnAlive = b.Near, b.Far
	return wiretest.Ends{
		Rest: true,
		Dial: func(ctx context.Context, conn net.Conn) (channel.Silent, error) { return Dial(ctx, conn, near) },
		Serve: func(ctx context.Context, conn net.Conn, n channel.Network) error {
			return Serve(ctx, conn, far, n)
		},
	}
}

func TestWire(t *testing.T) { wiretest.Run(t, ends) }

func BenchmarkWire(b *testing.B) { wiretest.Bench(b, ends) }
