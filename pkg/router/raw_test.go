package router

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// names is a TCP server that answers each line with its name.
func names(t testing.TB, name string) string {
	return listens(t, func(c *net.TCPConn) {
		for lines := bufio.NewScanner(c); lines.Scan(); {
			io.WriteString(c, name+" "+lines.Text()+"\n")
		}
		io.WriteString(c, name+" ends\n")
	})
}

func TestRawGoesToTheWholeClaim(t *testing.T) {
	r, at := runs(t, web80(names(t, "original")))
	say := func(want string) {
		t.Helper()
		c := dials(t, at[0])
		io.WriteString(c, "hello\n")
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != want+" hello\n"+want+" ends\n" {
			t.Errorf("read %q, %v; want it from %s", got, err, want)
		}
	}
	say("original")
	claims80(t, r, "ann", &to{address: names(t, "ann")}, Match{Path: "/"})
	say("original")
	claims80(t, r, "bob", &to{address: names(t, "bob")}, Match{})
	say("bob")
	claims80(t, r, "bob", refusing{}, Match{})
	say("original")
	soon(t, "one connection is counted", func() bool {
		s := r.Claims()
		return s[1].Connections == 1 && s[1].Open == 0 && s[0].Connections == 0
	})
}

func TestSaysNothing(t *testing.T) {
	r, at := runs(t, web80(names(t, "original")))
	c := dials(t, at[0])
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "original ends\n" {
		t.Errorf("read %q, %v", got, err)
	}
	soon(t, "gone", func() bool { n, _ := r.streams.here(); return n == 0 })
}

// TestServerFirst: MySQL, SMTP and others greet a client that waits for it.
func TestServerFirst(t *testing.T) {
	greets := listens(t, func(c *net.TCPConn) {
		io.WriteString(c, "220 ready\r\n")
		io.Copy(c, c)
	})
	_, at := runs(t, web80(greets))
	c := dials(t, at[0])
	read := bufio.NewReader(c)
	if line, err := read.ReadString('\n'); line != "220 ready\r\n" {
		t.Fatalf("read %q, %v", line, err)
	}
	io.WriteString(c, "GET / HTTP/1.1\r\n\r\n") // too late to be HTTP
	c.CloseWrite()
	if got, err := io.ReadAll(read); string(got) != "GET / HTTP/1.1\r\n\r\n" {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestSlowToSpeak: a client that connects before it has something to ask.
func TestSlowToSpeak(t *testing.T) {
	for name, pieces := range map[string][]string{
		"http":        {"", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"},
		"http halves": {"GET / HT", "TP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			r, at := runs(t, web80(serves(t, says("original"))))
			claims80(t, r, "ann", &to{address: serves(t, says("ann"))}, Match{Path: "/"})
			c := dials(t, at[0])
			for _, p := range pieces {
				io.WriteString(c, p)
				time.Sleep(2 * hush)
			}
			if got, err := io.ReadAll(c); !strings.HasSuffix(string(got), "\r\n\r\nann") {
				t.Errorf("read %q, %v", got, err)
			}
		})
	}
	t.Run("raw", func(t *testing.T) {
		_, at := runs(t, web80(names(t, "original")))
		c := dials(t, at[0])
		time.Sleep(2 * hush)
		io.WriteString(c, "ruok\n")
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "original ruok\noriginal ends\n" {
			t.Errorf("read %q, %v", got, err)
		}
	})
}

func TestTLSPasses(t *testing.T) {
	s := httptest.NewUnstartedServer(says("original"))
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	r, at := runs(t, web80(s.Listener.Addr().String()))
	claims80(t, r, "ann", refusing{}, Match{Headers: []Header{{"x-dev", exact, "ann"}}})
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	c, err := tls.Dial("tcp", at[0], &tls.Config{RootCAs: pool, ServerName: "example.com", NextProtos: []string{"h2"}})
	must(t, err)
	defer c.Close()
	if p := c.ConnectionState().NegotiatedProtocol; p != "h2" {
		t.Errorf("negotiated %q", p)
	}
}

func TestNeverLookedInto(t *testing.T) {
	r, at := runs(t, Route{Network: "tcp", Port: 80, Original: names(t, "original"), Protocol: "tcp"})
	claims80(t, r, "ann", &to{address: names(t, "ann")}, Match{Path: "/"})
	c := dials(t, at[0])
	io.WriteString(c, "GET / HTTP/1.1\n")
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "original GET / HTTP/1.1\noriginal ends\n" {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestSaidToBeHTTP: nothing is opened before it is clear for whom; what is no
// HTTP passes all the same.
func TestSaidToBeHTTP(t *testing.T) {
	var opened atomic.Int64
	r, at := runs(t, Route{Network: "tcp", Port: 80, Protocol: "http", Original: listens(t, func(c *net.TCPConn) {
		opened.Add(1)
		io.Copy(c, c)
	})})
	claims80(t, r, "ann", &to{address: serves(t, says("ann"))}, Match{Path: "/"})
	silent, binary := dials(t, at[0]), dials(t, at[0])
	time.Sleep(2 * hush)
	if n := opened.Load(); n != 0 {
		t.Errorf("%d connections were opened for clients that said nothing", n)
	}
	io.WriteString(silent, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	if got, err := io.ReadAll(silent); !strings.HasSuffix(string(got), "ann") {
		t.Errorf("read %q, %v", got, err)
	}
	io.WriteString(binary, "\x16\x03\x01")
	binary.CloseWrite()
	if got, err := io.ReadAll(binary); string(got) != "\x16\x03\x01" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestRawRefused(t *testing.T) {
	_, at := runs(t, Route{Network: "tcp", Port: 80, Protocol: "tcp"})
	c, err := net.Dial("tcp", at[0])
	if err == nil {
		defer c.Close()
		_, err = io.ReadAll(c)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}

func TestResetCrosses(t *testing.T) {
	resets := listens(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 5))
		c.SetLinger(0)
	})
	_, at := runs(t, web80(resets))
	c := dials(t, at[0])
	io.WriteString(c, "\x00\x01\x02\x03\x04")
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
}

// answersUDP is a UDP server that answers with its name and what it was sent.
func answersUDP(t testing.TB, name string) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	done := make(chan bool)
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(append([]byte(name+" "), buf[:n]...), from)
		}
	}()
	t.Cleanup(func() {
		pc.Close()
		<-done
	})
	return pc.LocalAddr().String()
}

func TestDatagrams(t *testing.T) {
	r, at := runs(t, Route{Network: "udp", Port: 53, Original: answersUDP(t, "original")})
	c, err := net.Dial("udp", at[0])
	must(t, err)
	defer c.Close()
	buf := make([]byte, 64<<10)
	ask := func(what string) string { // asks again, as clients of UDP do
		for range 100 {
			io.WriteString(c, what)
			c.SetReadDeadline(time.Now().Add(patienceOfTests / 100))
			if n, err := c.Read(buf); err == nil {
				return string(buf[:n])
			}
		}
		t.Fatal("no answer")
		return ""
	}
	if got := ask("one"); got != "original one" {
		t.Errorf("answered %q", got)
	}
	claim := Claim{ID: "ann", Routes: []string{"udp/53"}}
	must(t, r.Put(claim, &to{address: answersUDP(t, "ann")}, false))
	soon(t, "ann answers", func() bool { return ask("two") == "ann two" })
	large := strings.Repeat("x", 9000)
	if got := ask(large); got != "ann "+large {
		t.Errorf("answered %d bytes", len(got))
	}
	if s := r.Claims()[0]; s.Connections == 0 || s.Open != 1 {
		t.Errorf("%+v", s)
	}
	r.Drop("ann")
	soon(t, "the original answers", func() bool { return ask("three") == "original three" })
	soon(t, "silence", func() bool { // an answer of late would be heard now
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := c.Read(buf)
		return err != nil
	})
}

// TestRawMuch: much data both ways at a time, with and without a mirror.
func TestRawMuch(t *testing.T) {
	const size = 20 << 20
	echo := listens(t, func(c *net.TCPConn) { io.Copy(c, c) })
	r, at := runs(t, web80(echo))
	for _, mirrored := range []bool{false, true} {
		if mirrored {
			must(t, r.Put(Claim{ID: "m", Mirror: true, Routes: []string{"tcp/80"}}, &to{address: echo}, false))
		}
		c := dials(t, at[0])
		data := bytes.Repeat([]byte("\x00culvert"), size/8)
		go func() {
			c.Write(data)
			c.CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
			t.Errorf("mirrored %v: read %d bytes, %v", mirrored, len(got), err)
		}
	}
}

// TestClientsAddress: a laptop is told who is connected, whatever is spoken.
func TestClientsAddress(t *testing.T) {
	n := &memchan.Network{}
	r, at := runs(t, web80(""), Route{Network: "tcp", Port: 25}, Route{Network: "udp", Port: 53})
	must(t, r.Put(Claim{ID: "ann", Routes: []string{"tcp/80", "tcp/25", "udp/53"}}, n, false))
	for i, test := range []struct{ network, port, says string }{
		{"tcp", ":80", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
		{"tcp", ":80", preface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x00\x03\x01\x05\x00\x00\x00\x01\x82\x86\x84"},
		{"tcp", ":25", "hello\n"},
		{"tcp", ":25", ""},
		{"udp", ":53", "hello"},
	} {
		l, err := n.Listen(t.Context(), test.network, test.port)
		must(t, err)
		c, err := net.Dial(test.network, at[map[string]int{":80": 0, ":25": 1, ":53": 2}[test.port]])
		must(t, err)
		io.WriteString(c, test.says)
		near, err := l.Accept()
		must(t, err)
		if got, want := near.RemoteAddr().String(), c.LocalAddr().String(); got != want {
			t.Errorf("%d: the laptop is told of %s, want %s", i, got, want)
		}
		near.Close()
		c.Close()
		l.Close()
	}
}
