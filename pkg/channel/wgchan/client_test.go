package wgchan

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"
)

// settings are those of a configuration, by section and name.
func settings(t *testing.T, config string) map[string]string {
	t.Helper()
	all, section := map[string]string{}, ""
	for _, line := range strings.Split(config, "\n") {
		name, value, ok := strings.Cut(line, " = ")
		switch {
		case strings.HasPrefix(line, "["):
			section = line
		case ok:
			all[section+name] = value
		case line != "":
			t.Errorf("line %q", line)
		}
	}
	return all
}

func hexKey(t *testing.T, text string) string {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

// stockClient is WireGuard with a netstack that is none of ours, which only knows the
// configuration.
func stockClient(t *testing.T, config string) *netstack.Net {
	t.Helper()
	s := settings(t, config)
	var own []netip.Addr
	for _, a := range strings.Split(s["[Interface]Address"], ", ") {
		own = append(own, netip.MustParseAddr(a))
	}
	if s["[Interface]MTU"] != "1420" || s["[Interface]DNS"] != "10.96.0.10, svc.cluster.local" {
		t.Errorf("configuration:\n%s", config)
	}
	dev, n, err := netstack.CreateNetTUN(own, nil, stockMTU)
	if err != nil {
		t.Fatal(err)
	}
	wg := device.NewDevice(dev, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
	set := fmt.Sprintf("private_key=%s\npublic_key=%s\nendpoint=%s\npersistent_keepalive_interval=%s\n",
		hexKey(t, s["[Interface]PrivateKey"]), hexKey(t, s["[Peer]PublicKey"]), s["[Peer]Endpoint"], s["[Peer]PersistentKeepalive"])
	for _, r := range strings.Split(s["[Peer]AllowedIPs"], ", ") {
		set += "allowed_ip=" + r + "\n"
	}
	if err := wg.IpcSet(set); err != nil {
		t.Fatal(err)
	}
	if err := wg.Up(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(wg.Close)
	return n
}

// TestStockClient: who has the configuration, and nothing of ours, reaches by address
// what the far end reaches.
func TestStockClient(t *testing.T) {
	public, private := newKey(t)
	port, err := Listen(Config{Key: private})
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- port.Serve(ctx, Peer{Key: k.PublicKey()}, &farTranslate{}) }()
	defer func() { cancel(); <-served }()

	config, err := Client{
		Key: k, Peer: public, Endpoint: fmt.Sprintf("127.0.0.1:%d", port.Number()),
		Routes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("fd63:756c:7665:7767::1/128")},
		DNS:    []netip.Addr{netip.MustParseAddr("10.96.0.10")}, Search: []string{"svc.cluster.local"},
	}.Config()
	if err != nil {
		t.Fatal(err)
	}
	n := stockClient(t, config)
	stockTCP(t, n)
	stockUDP(t, n)
	for _, to := range []string{translated, farAddress.String()} {
		stockPing(t, n, to)
	}
}

func stockTCP(t *testing.T, n *netstack.Net) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, at, _ := net.SplitHostPort(l.Addr().String())
	c, err := n.DialContext(ctx, "tcp", net.JoinHostPort(translated, at))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := make([]byte, 1<<20)
	rand.Read(data)
	go c.Write(data)
	got := make([]byte, len(data))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
		t.Errorf("tcp: %v", err)
	}
	if _, err := n.DialContext(ctx, "tcp", translated+":1"); err == nil {
		t.Error("nobody listens there")
	}
}

func stockUDP(t *testing.T, n *netstack.Net) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(buf[:n], from)
		}
	}()
	_, at, _ := net.SplitHostPort(pc.LocalAddr().String())
	c, err := n.Dial("udp", net.JoinHostPort(translated, at))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	for _, size := range []int{1, 1200, 1392, 8000, 65507} {
		data := make([]byte, size)
		rand.Read(data)
		got := make([]byte, 1<<16)
		c.Write(data)
		if m, err := c.Read(got); err != nil || !bytes.Equal(got[:m], data) {
			t.Errorf("udp, %d bytes: %d, %v", size, m, err)
		}
	}
}

func stockPing(t *testing.T, n *netstack.Net, to string) {
	t.Helper()
	a := netip.MustParseAddr(to)
	ask, answer := byte(8), byte(0)
	if a.Is6() {
		ask, answer = 128, 129
	}
	got := make([]byte, 100)
	var err error
	for range 20 { // one may be lost, and an identifier be that of one before
		c, dialErr := n.DialPingAddr(netip.Addr{}, a)
		if dialErr != nil {
			t.Fatal(dialErr)
		}
		defer c.Close()
		c.Write([]byte{ask, 0, 0, 0, 0, 1, 0, 1, 'h', 'i'})
		c.SetReadDeadline(time.Now().Add(time.Second))
		var m int
		if m, err = c.Read(got); err == nil {
			if m != 10 || got[0] != answer {
				t.Errorf("ping %s: %x", to, got[:m])
			}
			return
		}
	}
	t.Errorf("ping %s: %v", to, err)
}

// TestKeys: what is derived is what the curve says, and strangers stay strangers.
func TestKeys(t *testing.T) {
	public, private := newKey(t)
	k, err := privateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	derived, err := k.public()
	if err != nil {
		t.Fatal(err)
	}
	if mapped, err := publicKey(public); err != nil || mapped != derived {
		t.Errorf("%x maps to %x, want %x, %v", public, mapped, derived, err)
	}
	for _, a := range derived.addresses() {
		if !a.IsGlobalUnicast() || a == farAddress {
			t.Errorf("address %s", a)
		}
	}
	for _, bad := range []any{nil, "key", private[:5], public[:5]} {
		if _, err := privateKey(bad); err == nil {
			t.Errorf("%T is a private key", bad)
		}
		if _, err := publicKey(bad); err == nil {
			t.Errorf("%T is a public key", bad)
		}
	}
}
