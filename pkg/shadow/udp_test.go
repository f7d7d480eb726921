package shadow

import (
	"crypto/ecdh"
	"crypto/rand"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
)

// byUDP opens a wire of WireGuard with a key of its own, which far lets in.
func (p *pod) byUDP(far channel.Network) channel.Silent {
	p.t.Helper()
	own, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	for range 2 { // asked twice it is let in once
		if err := Admit(p.t.Context(), far, own.PublicKey(), nil); err != nil {
			p.t.Fatal(err)
		}
	}
	at := []netip.AddrPort{netip.MustParseAddrPort(p.addr)}
	ch, err := wires.DialUDP(p.t.Context(), at, own, nil, wires.Config{Keys: p.laptop, Beat: time.Second})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { ch.Close(); ch.Wait() })
	return ch
}

func wiresOpen(t *testing.T, far channel.Network) int64 {
	t.Helper()
	info, err := Ask(t.Context(), far)
	if err != nil {
		t.Fatal(err)
	}
	return info.Wires
}

// Two wires of WireGuard beside each other, asked for over another one; that which
// falls silent is forgotten, and the shadow goes on.
func TestWireGuard(t *testing.T) {
	port := echo(t)
	p := start(t, Config{Grace: 4 * time.Second})
	first := p.open(time.Second)
	one, two := p.byUDP(first), p.byUDP(first)
	for _, wire := range []channel.Network{one, two} {
		conn, err := wire.DialContext(t.Context(), "tcp", clusterIP+":"+port)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "hello")
		conn.(interface{ CloseWrite() error }).CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
			t.Errorf("%q %v", got, err)
		}
		conn.Close()
	}
	if n := wiresOpen(t, two); n != 3 {
		t.Errorf("%d wires, want 3", n)
	}
	one.Close()
	one.Wait()
	for deadline := time.Now().Add(patience); wiresOpen(t, two) != 2; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a peer that is gone is still served")
		}
	}
	p.stop()
	p.end()
}

func TestAdmitRefused(t *testing.T) {
	p := start(t, Config{})
	far := p.open(time.Second)
	if err := call(t.Context(), far, "POST", "/wireguard", peer{Key: []byte("short")}, nil); err == nil {
		t.Error("a key that is none")
	}
	for range maxPeers {
		own, _ := ecdh.X25519().GenerateKey(rand.Reader)
		if err := Admit(t.Context(), far, own.PublicKey(), nil); err != nil {
			t.Fatal(err)
		}
	}
	own, _ := ecdh.X25519().GenerateKey(rand.Reader)
	if err := AdmitClient(t.Context(), far, own.PublicKey()); err == nil {
		t.Error("one too many")
	}
	p.stop()
	p.end()
}
