package sshchan

import (
	"context"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

// patience is for what must happen.
const patience = 20 * time.Second

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

// TestStrangers: each end talks to exactly the key it was told of.
func TestStrangers(t *testing.T) {
	channeltest.NoLeak(t)
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
	} {
		t.Run(test.name, func(t *testing.T) {
			near, far := pair(t)
			test.change(&near, &far)
			a, b := tcpPipe(t)
			served := serve(context.Background(), b, far, &channel.Host{})
			if ch, err := Dial(context.Background(), a, near); err == nil {
				ch.Close()
				t.Error("the near end made a channel")
			}
			if err := receive(t, served); err == nil {
				t.Error("the far end served")
			}
		})
	}
}

// TestKeysStay: no change of keys by amount in the life of a session.
func TestKeysStay(t *testing.T) {
	near, far := pair(t)
	sc, err := far.server(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*ssh.Config{&near.client().Config, &sc.Config} {
		if c.SetDefaults(); c.RekeyThreshold != 1<<40 {
			t.Errorf("new keys after %d bytes", c.RekeyThreshold)
		}
	}
}

func TestCiphers(t *testing.T) {
	if c := ciphers(true); !strings.HasPrefix(c[0], "aes128-gcm") {
		t.Error("with AES:", c)
	}
	if c := ciphers(false); !strings.HasPrefix(c[0], "chacha20") {
		t.Error("without AES:", c)
	}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}
