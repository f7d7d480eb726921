package hub

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"net"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/channel/resume"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
)

// With a hub that does not say that it passes words on, an agent has connections as they are,
// and who dials is told to.
func TestOlderHub(t *testing.T) {
	var keys [2]crypto.Signer
	for i := range keys {
		_, key, err := ed25519.GenerateKey(nil)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = key
	}
	a, b := net.Pipe()
	var names memchan.Network // knows no words
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- tlschan.Serve(ctx, b, tlschan.Config{Identity: tlschan.Identity{Key: keys[1], Peer: keys[0].Public()}}, &names)
	}()
	defer func() { cancel(); <-served }()
	wire, err := tlschan.Dial(ctx, a, tlschan.Config{Identity: tlschan.Identity{Key: keys[0], Peer: keys[1].Public()}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { wire.Close(); _ = wire.Wait() }()
	if _, err := wire.Listen(ctx, resume.Network, "db-01:22"); err == nil {
		t.Fatal("it knows words")
	}
	hub := older{wire}
	l, err := hub.Listen(ctx, resume.Network, "db-01:22")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
		}
	}()
	if _, err := resume.NewClient(hub, 0).Dial(ctx, "db-01:22"); err == nil || !isPlain(err) {
		t.Errorf("%v", err)
	}
	if c, err := hub.DialContext(ctx, "tcp", "db-01:22"); err == nil {
		c.Close()
	}
}
