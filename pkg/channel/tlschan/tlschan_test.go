package tlschan

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

func TestMain(m *testing.M) { channeltest.Main(m) }

// pair makes the configurations of two ends that know each other.
func pair(t testing.TB) (near, far Config) {
	t.Helper()
	nearKey, nearPub, err := sshchan.GenerateKey("near")
	if err != nil {
		t.Fatal(err)
	}
	farKey, farPub, err := sshchan.GenerateKey("far")
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

// ends are both ends of a wire over TLS.
func ends(t testing.TB, b wiretest.Beats) wiretest.Ends {
	near, far := pair(t)
	near.Beat, far.Beat = b.Every, b.Every
	near.OnAlive, far.OnAlive = b.Near, b.Far
	return wiretest.Ends{
		Dial: func(ctx context.Context, conn net.Conn) (channel.Silent, error) { return Dial(ctx, conn, near) },
		Serve: func(ctx context.Context, conn net.Conn, n channel.Network) error {
			return Serve(ctx, conn, far, n)
		},
	}
}

func TestWire(t *testing.T) { wiretest.Run(t, ends) }

func BenchmarkWire(b *testing.B) { wiretest.Bench(b, ends) }

// TestStrangers: each end talks to exactly the key it was told of.
func TestStrangers(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
	stranger, _ := pair(t)
	for _, test := range []struct {
		name   string
		change func(near, far *Config)
	}{
		{"client", func(near, _ *Config) { near.Identity.Key = stranger.Identity.Key }},
		{"server", func(_, far *Config) { far.Identity.Key = stranger.Identity.Key }},
		{"client trusts nobody", func(near, _ *Config) { near.Identity.Peer = nil }},
		{"server trusts nobody", func(_, far *Config) { far.Identity.Peer = nil }},
		{"client without a key", func(near, _ *Config) { near.Identity.Key = nil }},
		{"server without a key", func(_, far *Config) { far.Identity.Key = nil }},
		{"client trusts itself", func(near, _ *Config) { near.Identity.Peer = near.Identity.Key.Public() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			near, far := pair(t)
			test.change(&near, &far)
			a, b := net.Pipe()
			served := make(chan error, 1)
			go func() { served <- Serve(context.Background(), b, far, &channel.Host{}) }()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			ch, err := Dial(ctx, a, near)
			if err == nil {
				ch.Close()
			}
			if err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the near end: %v", err)
			}
			select {
			case err := <-served:
				if err == nil {
					t.Error("the far end served")
				}
			case <-ctx.Done():
				t.Error("the far end goes on")
			}
		})
	}
}

func TestParseIdentity(t *testing.T) {
	key, pub, err := sshchan.GenerateKey("x")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ private, peer []byte }{{key, key}, {pub, pub}, {nil, pub}, {key, nil}} {
		if _, err := ParseIdentity(test.private, test.peer); err == nil {
			t.Errorf("%.20q and %.20q are an identity", test.private, test.peer)
		}
	}
}
