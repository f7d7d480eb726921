package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A client of somebody else's make gets through, names are passed on as they are, and
// both directions end by themselves.
func TestSOCKSConnect(t *testing.T) {
	at := echo(t)
	to := hosts{"tcp web.shop:80": at, "tcp [fd00::7]:80": at, "tcp 10.96.1.1:80": at}
	client, err := proxy.SOCKS5("tcp", serve(t, SOCKS, to), nil, proxy.Direct)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"web.shop:80", "[fd00::7]:80", "10.96.1.1:80"} {
		c, err := client.Dial("tcp", host)
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		said := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		go func() {
			c.Write(said)
			c.(*net.TCPConn).CloseWrite()
		}()
		heard, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(heard, append([]byte("hello "), said...)) {
			t.Errorf("%s: %d bytes came back, %v", host, len(heard), err)
		}
		c.Close()
	}
}

// What cannot be had is told apart, in the numbers that SOCKS has for it.
func TestSOCKSRefuses(t *testing.T) {
	at := serve(t, SOCKS, hosts{
		"tcp refused:1": syscall.ECONNREFUSED, "tcp forbidden:1": syscall.EACCES, "tcp nowhere:1": syscall.ENETUNREACH,
		"tcp gone:1": syscall.EHOSTUNREACH, "tcp silent:1": context.DeadlineExceeded, "tcp broken:1": errors.New("broken"),
	})
	request := func(command byte, host string) string {
		return "\x05\x01\x00\x05" + string(command) + "\x00\x03" + string(byte(len(host))) + host + "\x00\x01"
	}
	failed := func(code byte) string { return "\x05\x00\x05" + string(code) + "\x00\x01\x00\x00\x00\x00\x00\x00" }
	for name, c := range map[string]struct{ said, heard string }{
		"refused":        {request(1, "refused"), failed(5)},
		"forbidden":      {request(1, "forbidden"), failed(2)},
		"no network":     {request(1, "nowhere"), failed(3)},
		"no host":        {request(1, "gone"), failed(4)},
		"no answer":      {request(1, "silent"), failed(4)},
		"no such name":   {request(1, "unheard-of"), failed(4)},
		"something else": {request(1, "broken"), failed(1)},
		"BIND":           {request(2, "refused"), failed(7)},
		"no command":     {request(9, "refused"), failed(7)},
		"no name":        {request(1, ""), failed(8)},
		"not a name":     {request(1, "a\x00b"), failed(8)},
		"no address":     {"\x05\x01\x00\x05\x01\x00\x02rest", failed(8)},
		"a password":     {"\x05\x02\x01\x02", "\x05\xff"},
		"SOCKS4":         {"\x04\x01\x00\x50\x0a\x60\x01\x01me\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		"SOCKS4a":        {"\x04\x01\x00\x50\x00\x00\x00\x01me\x00web\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		"HTTP":           {"GET / HTTP/1.1\r\n\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			conn := dialTo(t, at)
			io.WriteString(conn, c.said)
			conn.CloseWrite()
			heard, err := io.ReadAll(conn)
			if err != nil && c.heard != "" || string(heard) != c.heard {
				t.Errorf("heard % x, %v, want % x", heard, err, c.heard)
			}
		})
	}
}

// ask asks for an association, and gives the socket that sends to it.
func ask(t *testing.T, at string) (*net.TCPConn, *net.UDPConn) {
	t.Helper()
	c := dialTo(t, at)
	io.WriteString(c, "\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00")
	answer := make([]byte, 2+10)
	if _, err := io.ReadFull(c, answer); err != nil || answer[3] != 0 {
		t.Fatalf("answered % x, %v", answer, err)
	}
	to, _, err := cutAddress(answer[5:])
	if err != nil {
		t.Fatal(err)
	}
	return c, socket(t, to.String())
}

func socket(t *testing.T, to string) *net.UDPConn {
	t.Helper()
	u, err := net.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	return u.(*net.UDPConn)
}

func datagram(fragment byte, to address, data string) []byte {
	return append(append([]byte{0, 0, fragment}, to...), data...)
}

func named(host string, port byte) address {
	return append(append(address{asName, byte(len(host))}, host...), 0, port)
}

func TestSOCKSAssociate(t *testing.T) {
	at := serve(t, SOCKS, hosts{"udp dns.shop:53": echoUDP(t, "dns"), "udp 10.96.0.10:53": echoUDP(t, "ten"), "udp refused:53": syscall.ECONNREFUSED})
	c, u := ask(t, at)
	exchange := func(to address, data, want string) {
		t.Helper()
		u.SetDeadline(time.Now().Add(5 * time.Second))
		u.Write(datagram(0, to, data))
		buf := make([]byte, 65535)
		n, err := u.Read(buf)
		from, heard, cutErr := cutDatagram(buf[:n])
		if err != nil || cutErr != nil || string(heard) != want || !bytes.Equal(from, to) {
			t.Errorf("%s: %.60q from %s, %v, %v", to, heard, from, err, cutErr)
		}
	}
	dns, ten := named("dns.shop", 53), addressFrom(netip.MustParseAddrPort("10.96.0.10:53"))
	stranger := socket(t, u.RemoteAddr().String())
	exchange(dns, "first", "dns first")
	stranger.Write(datagram(0, ten, "not mine"))
	u.Write(datagram(1, dns, "a fragment"))
	u.Write([]byte{0, 0})
	u.Write(datagram(0, named("refused", 53), "lost"))
	u.Write(datagram(0, named("unheard-of", 53), "lost"))
	exchange(ten, "second", "ten second")
	exchange(dns, "third", "dns third")
	large := strings.Repeat("x", 9000)
	exchange(dns, large, "dns "+large)
	stranger.SetDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := stranger.Read(make([]byte, 16)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stranger heard %d bytes, %v", n, err)
	}
	// It ends with the connection: the port is closed.
	c.Close()
	for deadline := time.Now().Add(5 * time.Second); ; {
		l, err := (&channel.Host{}).Listen(t.Context(), "udp", u.RemoteAddr().String())
		if err == nil {
			l.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the port is still taken: %v", err)
		}
	}
}

// No more flows are kept than there may be, and that one is refused harms no other.
func TestSOCKSAssociateHasABound(t *testing.T) {
	a := &association{flows: map[string]*flow{}}
	for i := range maxFlows {
		if f, begun := a.flow(nil, addressFrom(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 53))); f == nil || !begun {
			t.Fatalf("flow %d: %v, %t", i, f, begun)
		}
	}
	if f, begun := a.flow(nil, named("one.more", 53)); f != nil || begun {
		t.Error("one more was begun")
	}
	first := addressFrom(netip.MustParseAddrPort("10.0.0.0:53"))
	f, begun := a.flow(nil, first)
	if f == nil || begun {
		t.Error("one that is there is not found")
	}
	a.forget(f)
	if _, begun := a.flow(nil, named("one.more", 53)); !begun {
		t.Error("after one has ended there is no room")
	}
}

// conversation is what a program says, and takes what it is told.
type conversation struct{ io.Reader }

func (conversation) Write(p []byte) (int, error) { return len(p), nil }

// Whatever a program says, what is taken for an address can be dialled and written again.
func FuzzGreet(f *testing.F) {
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x03\x03web\x00\x50"))
	f.Add([]byte("\x05\x01\x00\x05\x03\x00\x04\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x00\x35"))
	f.Fuzz(func(t *testing.T, said []byte) {
		command, a, err := greet(conversation{bytes.NewReader(said)})
		if err != nil {
			return
		}
		if command != toConnect && command != toAssociate {
			t.Errorf("command %d", command)
		}
		seeAddress(t, a)
	})
}

func FuzzDatagram(f *testing.F) {
	f.Add(datagram(0, named("web", 53), "data"))
	f.Add(datagram(0, addressFrom(netip.MustParseAddrPort("[fd00::7]:53")), ""))
	f.Fuzz(func(t *testing.T, sent []byte) {
		a, data, err := cutDatagram(sent)
		if err != nil {
			return
		}
		if again := datagram(0, a, string(data)); !bytes.Equal(again[udpHeader:], sent[udpHeader:]) {
			t.Errorf("% x is % x", sent, again)
		}
		seeAddress(t, a)
	})
}

func seeAddress(t *testing.T, a address) {
	host, _, err := net.SplitHostPort(a.String())
	if a[0] != asName && err != nil || a[0] == asName && err == nil && host != a.host() || a.host() == "" {
		t.Errorf("% x is %q, %v", []byte(a), a, err)
	}
	again, err := readAddress(bytes.NewReader(a))
	if err != nil || !bytes.Equal(again, a) {
		t.Errorf("% x is read as % x, %v", []byte(a), []byte(again), err)
	}
}
