package sshchan

import (
	"bytes"
	"net"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// taken is a connection that keeps what is written.
type taken struct {
	net.Conn
	got bytes.Buffer
}

func (t *taken) Write(p []byte) (int, error) { return t.got.Write(p) }

// Only the window that a channel begins with is another.
func TestNarrowed(t *testing.T) {
	type open struct {
		Kind                   string `sshtype:"90"`
		Sender, Window, Packet uint32
		Rest                   []byte `ssh:"rest"`
	}
	packet := func(window uint32) []byte {
		b := append([]byte{0}, ssh.Marshal(open{"direct-tcpip", 7, window, 32 << 10, []byte("rest")})...)
		return append([]byte{0, 0, 0, byte(len(b))}, b...)
	}
	data := append([]byte{0, 0, 0, 15, 0, 94}, make([]byte, 13)...)
	for _, c := range []struct {
		window    uint32
		sent, got []byte
	}{
		{0, packet(2 << 20), packet(2 << 20)},
		{300_000, packet(2 << 20), packet(300_000)},
		{300_000, packet(100), packet(100)},
		{300_000, data, data},
		{300_000, packet(2 << 20)[:12], packet(2 << 20)[:12]},
	} {
		to := &taken{}
		n := &narrowed{Conn: to}
		n.window.Store(c.window)
		sent := bytes.Clone(c.sent)
		if m, err := n.Write(sent); m != len(sent) || err != nil || !bytes.Equal(to.got.Bytes(), c.got) || !bytes.Equal(sent, c.sent) {
			t.Errorf("window %d: %x became %x, %d, %v", c.window, c.sent, to.got.Bytes(), m, err)
		}
	}
	for trip, want := range map[time.Duration]uint32{0: narrowest, 2 * time.Millisecond: 524288, time.Second: widest} {
		if got := windowFor(trip); got != want {
			t.Errorf("%v: %d, want %d", trip, got, want)
		}
	}
}
