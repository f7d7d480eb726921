package tlschan

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

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
		Rest: true,
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
			} else if test.name == "client" && !(errors.Is(err, ErrNotLetIn) && strings.Contains(err.Error(), "not let in")) {
				t.Errorf("a key that is not known there: %v", err)
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

// An end shows a certificate of SSH beside its key, which is that key's; one that pins keys, or
// knows nothing of certificates, does not mind.
func TestCertificate(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
	stranger, authority := pair(t)
	signer, err := ssh.NewSignerFromKey(authority.Identity.Key)
	if err != nil {
		t.Fatal(err)
	}
	certify := func(key crypto.Signer) *ssh.Certificate {
		public, err := ssh.NewPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		c := &ssh.Certificate{Key: public, CertType: ssh.HostCert, KeyId: "x", ValidBefore: ssh.CertTimeInfinity}
		if err := c.SignCert(rand.Reader, signer); err != nil {
			t.Fatal(err)
		}
		return c
	}
	dial := func(near, far Config) (shown ssh.PublicKey, err error) {
		a, b := net.Pipe()
		served := make(chan error, 1)
		go func() {
			served <- ServeEach(context.Background(), b, far, func(key ssh.PublicKey) (channel.Network, error) {
				shown = key
				return &channel.Host{}, far.Identity.isPeer(key)
			})
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		ch, err := Dial(ctx, a, near)
		if err == nil {
			ch.Close()
			_ = ch.Wait()
		}
		<-served
		return shown, err
	}
	t.Run("both ends", func(t *testing.T) {
		near, far := pair(t)
		near.Identity.Cert, far.Identity.Cert = certify(near.Identity.Key), certify(far.Identity.Key)
		var seen ssh.PublicKey
		near.Identity.Known = func(key ssh.PublicKey) error { seen = key; return nil }
		shown, err := dial(near, far)
		if err != nil || !bytes.Equal(shown.Marshal(), near.Identity.Cert.Marshal()) || !bytes.Equal(seen.Marshal(), far.Identity.Cert.Marshal()) {
			t.Errorf("%v, %v, %v", shown, seen, err)
		}
	})
	t.Run("pinned", func(t *testing.T) {
		near, far := pair(t)
		far.Identity.Cert = certify(far.Identity.Key)
		if _, err := dial(near, far); err != nil {
			t.Error(err)
		}
		far.Identity.Key, far.Identity.Cert = stranger.Identity.Key, certify(stranger.Identity.Key)
		if _, err := dial(near, far); err == nil {
			t.Error("a certificate of another key was taken for the one that is pinned")
		}
	})
	t.Run("of another key", func(t *testing.T) {
		near, far := pair(t)
		far.Identity.Cert = certify(stranger.Identity.Key)
		near.Identity.Known = func(ssh.PublicKey) error { return nil }
		if _, err := dial(near, far); err == nil || !strings.Contains(err.Error(), "of another key") {
			t.Error(err)
		}
	})
	t.Run("nonsense", func(t *testing.T) {
		for _, line := range []string{"", "x", "ssh-ed25519 AAAA", string(ssh.MarshalAuthorizedKey(signer.PublicKey()))} {
			der, err := asn1.MarshalWithParams(line, "ia5")
			if err != nil {
				t.Fatal(err)
			}
			if c, err := parseComment(der); err == nil {
				t.Errorf("%q is %v", line, c)
			}
		}
	})
}
