package router

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// puts a mirror for tcp/80.
func mirrors80(t testing.TB, r *Router, l *to, m Match) {
	t.Helper()
	must(t, r.Put(Claim{ID: "mirror", Holder: "m@laptop", Match: m, Mirror: true, Routes: []string{"tcp/80"}}, l, false))
}

func TestMirrorOfRequests(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		seen := make(chan string, 9)
		mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			b, err := io.ReadAll(req.Body)
			seen <- fmt.Sprintf("%s %s %s %s %q %v", req.Proto, req.Method, req.Host, req.RequestURI, b, err)
			w.WriteHeader(http.StatusTeapot)
		}))
		r, at := runs(t, web80(serves(t, says("original"))))
		mirrors80(t, r, &to{address: mine}, Match{Path: "/a"})
		c := asks(t, http2)
		get(t, c, at[0]) // not matched
		for _, body := range []string{"", "hello", strings.Repeat("x", 500<<10)} {
			res, err := c.Post("http://"+at[0]+"/a?b", "text/plain", strings.NewReader(body))
			must(t, err)
			b, err := io.ReadAll(res.Body)
			if res.StatusCode != 200 || string(b) != "original" {
				t.Errorf("answered %s %q, %v", res.Status, b, err)
			}
			res.Body.Close()
			want := fmt.Sprintf("%s POST %s /a?b %q <nil>", map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2], at[0], body)
			if got := <-seen; got != want {
				t.Errorf("the mirror saw %.100q, want %.100q", got, want)
			}
		}
		soon(t, "copies have ended", func() bool { s := r.Claims()[0]; return s.Open == 0 && s.Requests == 3 })
	})
}

// TestMirrorAfterTheClient: copies go on when the original has answered and the
// client has gone.
func TestMirrorAfterTheClient(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		const all, size = 50, 20 << 10
		gone := make(chan bool)
		seen := make(chan string, all)
		mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			<-gone
			n, err := io.Copy(io.Discard, req.Body)
			seen <- fmt.Sprint(n, err)
		}))
		r, at := runs(t, web80(serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			io.CopyN(io.Discard, req.Body, size) // and not the end
		}))))
		mirrors80(t, r, &to{address: mine}, Match{})
		for range all {
			c := asks(t, http2)
			res, err := c.Post("http://"+at[0], "a/b", bytes.NewReader(make([]byte, size)))
			must(t, err)
			res.Body.Close()
			c.CloseIdleConnections()
		}
		close(gone)
		for range all {
			select {
			case got := <-seen:
				if want := fmt.Sprint(size, error(nil)); got != want {
					t.Errorf("the mirror read %s, want %s", got, want)
				}
			case <-time.After(patienceOfTests):
				t.Fatal("copies are missing")
			}
		}
	})
}

// TestMirrorThatNeverReads: the original is served as if there were none.
func TestMirrorThatNeverReads(t *testing.T) {
	end := make(chan bool)
	stuck := listens(t, func(c *net.TCPConn) {
		c.SetReadBuffer(4 << 10)
		<-end
	})
	defer close(end)
	r, at := runs(t, web80(serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n, _ := io.Copy(io.Discard, req.Body)
		fmt.Fprint(w, n)
	}))))
	mirrors80(t, r, &to{address: stuck}, Match{})
	eachHTTP(t, func(t *testing.T, http2 bool) {
		c := asks(t, http2)
		began := time.Now()
		const size = 64 << 20
		res, err := c.Post("http://"+at[0], "a/b", io.LimitReader(zeros{}, size))
		must(t, err)
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if string(b) != fmt.Sprint(size) || time.Since(began) > patienceOfTests/2 {
			t.Errorf("the original read %s bytes in %s", b, time.Since(began))
		}
	})
	soon(t, "the copies are given up", func() bool { return r.Claims()[0].Open == 0 })
	if r.copies.bytes != 0 || r.copies.n != 0 {
		t.Errorf("%d bytes and %d copies are still held", r.copies.bytes, r.copies.n)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestMirrorOfBytes(t *testing.T) {
	seen := make(chan []byte, 1)
	mine := listens(t, func(c *net.TCPConn) {
		io.WriteString(c, "nobody reads this")
		b, _ := io.ReadAll(c)
		seen <- b
	})
	r, at := runs(t, web80(listens(t, func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		fmt.Fprint(c, n)
	})))
	mirrors80(t, r, &to{address: mine}, Match{})
	c := dials(t, at[0])
	want := append(bytes.Repeat([]byte("x"), 900<<10), '\n')
	c.Write(want[:3])
	time.Sleep(2 * hush)
	go func() {
		c.Write(want[3:])
		c.CloseWrite()
	}()
	if got, err := io.ReadAll(c); string(got) != fmt.Sprint(len(want)) {
		t.Errorf("read %q, %v", got, err)
	}
	if got := <-seen; !bytes.Equal(got, want) {
		t.Errorf("the mirror saw %d bytes", len(got))
	}
}

func TestMirrorOfDatagrams(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer pc.Close()
	r, at := runs(t, Route{Network: "udp", Port: 53, Original: answersUDP(t, "original")})
	must(t, r.Put(Claim{ID: "m", Mirror: true, Routes: []string{"udp/53"}}, &to{address: pc.LocalAddr().String()}, false))
	c, err := net.Dial("udp", at[0])
	must(t, err)
	defer c.Close()
	buf := make([]byte, 64<<10)
	for _, size := range []int{5, 0, 20000} {
		c.Write(make([]byte, size))
		c.SetReadDeadline(time.Now().Add(patienceOfTests))
		if n, err := c.Read(buf); n != size+len("original ") || err != nil {
			t.Errorf("answered %d bytes to %d, %v", n, size, err)
		}
		pc.SetReadDeadline(time.Now().Add(patienceOfTests))
		n, from, err := pc.ReadFrom(buf)
		if n != size || err != nil {
			t.Errorf("the mirror saw %d bytes of %d, %v", n, size, err)
		}
		pc.WriteTo([]byte("nobody reads this"), from)
	}
}
