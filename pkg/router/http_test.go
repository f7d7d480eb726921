package router

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	http2lib "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// eachHTTP runs a test for clients of both protocols.
func eachHTTP(t *testing.T, test func(*testing.T, bool)) {
	t.Run("http1", func(t *testing.T) { test(t, false) })
	t.Run("http2", func(t *testing.T) { test(t, true) })
}

func TestRequestsOneByOne(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		original, whole, ann, bob := serves(t, says("original")), serves(t, says("whole")), serves(t, says("ann")), serves(t, says("bob"))
		r, at := runs(t, web80(original))
		c := asks(t, http2)
		want := func(answer string, headers ...string) {
			t.Helper()
			if got := get(t, c, at[0], headers...); got != answer {
				t.Errorf("%v: answered by %q, want %q", headers, got, answer)
			}
		}
		want("original")
		claims80(t, r, "ann", &to{address: ann}, Match{Headers: []Header{{"X-Dev", exact, "ann"}}})
		claims80(t, r, "bob", &to{address: bob}, Match{Headers: []Header{{"x-dev", regex, "^b.b$"}}})
		want("original")
		want("ann", "x-dev", "ann")
		want("bob", "x-dev", "bob")
		want("original", "x-dev", "anna")
		claims80(t, r, "whole", &to{address: whole}, Match{})
		want("whole")
		want("ann", "x-dev", "ann")
		if last, ok := r.Drop("ann"); last || !ok {
			t.Errorf("drop of one of three: last %v, ok %v", last, ok)
		}
		want("whole", "x-dev", "ann")
		r.Drop("whole")
		want("original")
		want("bob", "x-dev", "bob")
		if s := r.Claims(); len(s) != 1 || s[0].Requests != 2 || s[0].Open != 0 {
			t.Errorf("claims: %+v, want bob's with two requests", s)
		}
	})
}

func TestRefusedGoesToTheOriginal(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		r, at := runs(t, web80(serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			http.NewResponseController(w).EnableFullDuplex()
			io.Copy(w, req.Body)
		}))))
		claims80(t, r, "ann", refusing{}, Match{})
		body := strings.Repeat("nothing is lost ", 10000)
		res, err := asks(t, http2).Post("http://"+at[0], "text/plain", strings.NewReader(body))
		must(t, err)
		defer res.Body.Close()
		if got, err := io.ReadAll(res.Body); err != nil || string(got) != body {
			t.Errorf("the original was sent %d bytes, %v; want %d", len(got), err, len(body))
		}
		if s := r.Claims(); s[0].Requests != 0 || s[0].Silent {
			t.Errorf("%+v: a refused dial is no request, and no silence", s[0])
		}
	})
}

func TestSilentLaptop(t *testing.T) {
	r, at := runs(t, web80(serves(t, says("original"))))
	d := &dead{}
	claims80(t, r, "ann", d, Match{})
	began := time.Now()
	if got := get(t, asks(t, false), at[0]); got != "original" {
		t.Errorf("answered by %q", got)
	}
	if took := time.Since(began); took < dialPatience || took > dialPatience+time.Second {
		t.Errorf("the first request waited %s, want %s", took, dialPatience)
	}
	began = time.Now()
	get(t, asks(t, true), at[0])
	if took := time.Since(began); took > time.Second || d.dials.Load() != 1 {
		t.Errorf("the next one waited %s, after %d dials", took, d.dials.Load())
	}
	if s, ok := r.Seen("ann"); !ok || s.Silent {
		t.Errorf("seen again: %+v", s)
	}
}

func TestUnseenLaptop(t *testing.T) {
	mine := &to{address: serves(t, says("ann"))}
	r, at := runs(t, web80(serves(t, says("original"))))
	claims80(t, r, "ann", mine, Match{})
	c := asks(t, false)
	if got := get(t, c, at[0]); got != "ann" {
		t.Fatalf("answered by %q", got)
	}
	began := time.Now()
	soon(t, "the original answers", func() bool { return get(t, c, at[0]) == "original" })
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the original answered after %s", took)
	}
	r.Seen("ann")
	if got := get(t, c, at[0]); got != "ann" {
		t.Errorf("seen again, answered by %q", got)
	}
}

// TestHangingLaptop: what was asked before a laptop went silent is asked of the
// original; a stream that had begun is not ended.
func TestHangingLaptop(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		more := make(chan bool)
		stuck := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path == "/stream" {
				io.WriteString(w, "be")
				w.(http.Flusher).Flush()
				<-more
				io.WriteString(w, "gun")
				return
			}
			<-req.Context().Done()
		}))
		r, at := runs(t, web80(serves(t, says("original"))))
		claims80(t, r, "ann", &to{address: stuck}, Match{})
		c := asks(t, http2)
		res, err := c.Get("http://" + at[0] + "/stream")
		must(t, err)
		defer res.Body.Close()
		began := time.Now()
		if got := get(t, c, at[0]); got != "original" {
			t.Errorf("GET answered by %q", got)
		}
		if took := time.Since(began); took < silence-time.Second || took > silence+time.Second {
			t.Errorf("answered after %v, want about %v", took, silence)
		}
		close(more)
		if all, err := io.ReadAll(res.Body); err != nil || string(all) != "begun" {
			t.Errorf("the stream: %q, %v", all, err)
		}
	})
}

// TestNobodyThere: who asks while the laptop is away and no original runs waits
// for the laptop, for a while.
func TestNobodyThere(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		r, at := runs(t, web80("127.0.0.1:1"))
		claims80(t, r, "ann", &memchan.Network{}, Match{}) // its wire is gone
		c := asks(t, http2)
		began := time.Now()
		time.AfterFunc(time.Second, func() { claims80(t, r, "ann", &to{address: serves(t, says("ann"))}, Match{}) })
		if got := get(t, c, at[0]); got != "ann" || time.Since(began) < time.Second {
			t.Errorf("answered by %q after %v", got, time.Since(began))
		}
	})
}

// TestDyingLaptop: what may be asked twice is, what may not is told.
func TestDyingLaptop(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		asked := make(chan bool, 9)
		stuck := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			io.Copy(io.Discard, req.Body)
			asked <- true
			<-req.Context().Done()
		}))
		r, at := runs(t, web80(serves(t, says("original"))))
		l := &to{address: stuck}
		claims80(t, r, "ann", l, Match{})
		c := asks(t, http2)
		go func() { <-asked; l.cut() }()
		if got := get(t, c, at[0]); got != "original" {
			t.Errorf("GET answered by %q", got)
		}
		go func() { <-asked; l.cut() }()
		res, err := c.Post("http://"+at[0], "text/plain", strings.NewReader("once"))
		must(t, err)
		res.Body.Close()
		if res.StatusCode != http.StatusBadGateway {
			t.Errorf("POST answered with %s", res.Status)
		}
	})
}

func TestNoOriginal(t *testing.T) {
	r, at := runs(t, web80(""))
	res, err := asks(t, false).Get("http://" + at[0])
	must(t, err)
	res.Body.Close()
	if res.StatusCode != http.StatusBadGateway {
		t.Errorf("answered with %s", res.Status)
	}
	claims80(t, r, "ann", &to{address: serves(t, says("ann"))}, Match{})
	if got := get(t, asks(t, false), at[0]); got != "ann" {
		t.Errorf("answered by %q", got)
	}
}

// TestUntouched compares what a server sees, and what its client sees, with and
// without a router between.
func TestUntouched(t *testing.T) {
	requests := map[string]string{
		"plain":      "GET /a/b?c=d;e=%zz HTTP/1.1\r\nHost: web.shop\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nForwarded: for=1.2.3.4\r\n\r\n",
		"path":       "GET /a%2Fb//../c%20d?x HTTP/1.1\r\nHost: web.shop\r\nAccept-Encoding: br\r\n\r\n",
		"two slash":  "GET //a//b HTTP/1.1\r\nHost: web.shop\r\nUser-Agent: me\r\n\r\n",
		"star":       "OPTIONS * HTTP/1.1\r\nHost: web.shop\r\n\r\n",
		"head":       "HEAD /nothing HTTP/1.1\r\nHost: web.shop\r\n\r\n",
		"length":     "POST /x HTTP/1.1\r\nHost: web.shop:80\r\nContent-Length: 5\r\nContent-Type: a/b\r\n\r\nhello",
		"chunked":    "PUT /x HTTP/1.1\r\nHost: web.shop\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 42\r\n\r\n",
		"unknown":    "PROPFIND /x HTTP/1.1\r\nHost: web.shop\r\nTE: trailers\r\n\r\n",
		"expect":     "POST /x HTTP/1.1\r\nHost: web.shop\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
		"early":      "GET /early HTTP/1.1\r\nHost: web.shop\r\n\r\n",
		"bare":       "GET /bare HTTP/1.1\r\nHost: web.shop\r\n\r\n",
		"trailer":    "GET /trailer HTTP/1.1\r\nHost: web.shop\r\nTE: trailers\r\n\r\n",
		"unmodified": "GET /unmodified HTTP/1.1\r\nHost: web.shop\r\nIf-None-Match: \"1\"\r\n\r\n",
	}
	original := serves(t, http.HandlerFunc(describe))
	_, at := runs(t, web80(original))
	for name, text := range requests {
		t.Run(name, func(t *testing.T) {
			direct, routed := talk(t, original, text), talk(t, at[0], text)
			if direct != routed {
				t.Errorf("direct:\n%s\nrouted:\n%s", direct, routed)
			}
		})
	}
}

// describe tells a client all that it has sent.
func describe(w http.ResponseWriter, req *http.Request) {
	h := w.Header()
	h["Date"] = nil
	h.Set("X-From", "the server")
	switch req.URL.Path {
	case "/early":
		h.Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
	case "/bare":
		h["Content-Type"] = nil
	case "/trailer":
		h.Set("Trailer", "X-Told")
		defer h.Set("X-Told", "yes")
		defer h.Set(http.TrailerPrefix+"X-Untold", "yes")
	case "/unmodified":
		h.Set("Etag", `"1"`)
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body, err := io.ReadAll(req.Body)
	fmt.Fprintf(w, "%s %s %s host %s length %d te %v\n", req.Method, req.RequestURI, req.Proto, req.Host, req.ContentLength, req.TransferEncoding)
	var lines bytes.Buffer
	req.Header.Write(&lines)
	fmt.Fprintf(w, "%sbody %q %v trailer %v\n", lines.Bytes(), body, err, req.Trailer)
}

// talk sends bytes, and returns what comes back until nothing more does.
func talk(t *testing.T, address, text string) string {
	t.Helper()
	c := dials(t, address)
	_, err := io.WriteString(c, text)
	must(t, err)
	must(t, c.CloseWrite())
	var all strings.Builder
	read := bufio.NewReader(c)
	for {
		res, err := http.ReadResponse(read, &http.Request{Method: strings.Fields(text)[0]})
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			return all.String()
		}
		must(t, err)
		body, err := io.ReadAll(res.Body)
		must(t, err)
		fmt.Fprintf(&all, "%s %s length %d te %v close %v\n%v\n%s\ntrailer %v\n", res.Proto, res.Status, res.ContentLength, res.TransferEncoding, res.Close, res.Header, body, res.Trailer)
	}
}

func TestLargeBodies(t *testing.T) {
	const size = 100 << 20
	eachHTTP(t, func(t *testing.T, http2 bool) {
		mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			http.NewResponseController(w).EnableFullDuplex()
			w.Header().Set("Trailer", "Sum")
			sum := sha256.New()
			_, err := io.Copy(w, io.TeeReader(req.Body, sum))
			if err == nil {
				w.Header().Set("Sum", fmt.Sprintf("%x", sum.Sum(nil)))
			}
		}))
		r, at := runs(t, web80(serves(t, says("original"))))
		claims80(t, r, "ann", &to{address: mine}, Match{})
		sent, got := sha256.New(), sha256.New()
		req, err := http.NewRequest("POST", "http://"+at[0], io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), sent))
		must(t, err)
		c := asks(t, http2)
		c.Timeout = 0
		res, err := c.Do(req)
		must(t, err)
		defer res.Body.Close()
		n, err := io.Copy(got, res.Body)
		if err != nil || n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			t.Errorf("got %d bytes back, %v", n, err)
		}
		if want := fmt.Sprintf("%x", sent.Sum(nil)); res.Trailer.Get("Sum") != want {
			t.Errorf("trailer %v, want %s", res.Trailer, want)
		}
	})
}

// TestStreams: each message there and back before the next, as gRPC and SSE do.
func TestStreams(t *testing.T) {
	mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		rc := http.NewResponseController(w)
		rc.EnableFullDuplex()
		w.Header().Set("Content-Type", "application/grpc")
		w.WriteHeader(200)
		rc.Flush()
		buf := make([]byte, 100)
		for {
			n, err := req.Body.Read(buf)
			w.Write(buf[:n])
			rc.Flush()
			if err != nil {
				break
			}
		}
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
		w.Header().Set(http.TrailerPrefix+"Grpc-Message", "well done")
	}))
	eachHTTP(t, func(t *testing.T, http2 bool) {
		r, at := runs(t, web80(serves(t, says("original"))))
		claims80(t, r, "ann", &to{address: mine}, Match{Headers: []Header{{"x-dev", exact, "ann"}}})
		read, write := io.Pipe()
		req, err := http.NewRequest("POST", "http://"+at[0]+"/pkg.Service/Chat", read)
		must(t, err)
		req.Header.Set("X-Dev", "ann")
		req.Header.Set("Te", "trailers")
		go io.WriteString(write, "first")
		res, err := asks(t, http2).Do(req)
		must(t, err)
		defer res.Body.Close()
		buf := make([]byte, 100)
		for i := range 20 {
			if i > 0 {
				fmt.Fprintf(write, "message %d", i)
			}
			if n, err := res.Body.Read(buf); err != nil || n == 0 {
				t.Fatalf("message %d: %q, %v", i, buf[:n], err)
			}
		}
		write.Close()
		_, err = io.Copy(io.Discard, res.Body)
		must(t, err)
		if res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("Grpc-Message") != "well done" {
			t.Errorf("trailers %v", res.Trailer)
		}
	})
}

// TestTrailersOnly: gRPC tells of an error by headers that end the stream.
func TestTrailersOnly(t *testing.T) {
	mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Grpc-Status", "12")
	}))
	_, at := runs(t, web80(mine))
	c := dials(t, at[0])
	io.WriteString(c, http2lib.ClientPreface)
	f := http2lib.NewFramer(c, c)
	f.WriteSettings()
	for id := uint32(1); id < 100; id += 2 {
		f.WriteHeaders(http2lib.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: true, BlockFragment: block(":method", "POST", ":scheme", "http", ":authority", "web", ":path", "/a.b/C", "te", "trailers")})
		for {
			frame, err := f.ReadFrame()
			must(t, err)
			if h, ok := frame.(*http2lib.HeadersFrame); ok {
				if !h.StreamEnded() {
					t.Fatal("the headers did not end the stream")
				}
				break
			}
		}
	}
}

func block(fields ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

// TestUpgrade: WebSocket, and what else begins as HTTP/1.1 (RFC 9110, 7.8).
func TestUpgrade(t *testing.T) {
	for _, protocol := range []string{"websocket", "h2c"} {
		t.Run(protocol, func(t *testing.T) {
			mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if protocol == "h2c" && (req.Header.Get("Http2-Settings") != "AAMAAABk" || !strings.Contains(req.Header.Get("Connection"), "HTTP2-Settings")) {
					t.Errorf("upgrade without settings: %v", req.Header)
				}
				c, rw, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Accept: abc\r\n\r\n", req.Header.Get("Upgrade"))
				rw.WriteString("hello ")
				rw.Flush()
				io.Copy(c, rw)
				io.WriteString(c, " bye")
			}))
			r, at := runs(t, web80(serves(t, says("original"))))
			claims80(t, r, "ann", &to{address: mine}, Match{})
			c := dials(t, at[0])
			fmt.Fprintf(c, "GET /chat HTTP/1.1\r\nHost: web\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABk\r\nSec-WebSocket-Key: xyz\r\n\r\nat once ", protocol)
			read := bufio.NewReader(c)
			res, err := http.ReadResponse(read, nil)
			must(t, err)
			if res.StatusCode != 101 || res.Header.Get("Upgrade") != protocol || res.Header.Get("Sec-Websocket-Accept") != "abc" {
				t.Fatalf("%s %v", res.Status, res.Header)
			}
			soon(t, "one open", func() bool { return r.Claims()[0].Open == 1 })
			io.WriteString(c, "and later")
			c.CloseWrite()
			all, err := io.ReadAll(read)
			if string(all) != "hello at once and later bye" {
				t.Errorf("read %q, %v", all, err)
			}
		})
	}
}

func TestServerSentEvents(t *testing.T) {
	next := make(chan string)
	mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		http.NewResponseController(w).Flush()
		for e := range next {
			fmt.Fprintf(w, "data: %s\n\n", e)
			http.NewResponseController(w).Flush()
		}
	}))
	_, at := runs(t, web80(mine))
	res, err := asks(t, false).Get("http://" + at[0]) // answered before any event
	must(t, err)
	defer res.Body.Close()
	read := bufio.NewReader(res.Body)
	for _, e := range []string{"one", "two"} {
		next <- e
		line, err := read.ReadString('\n')
		if line != "data: "+e+"\n" {
			t.Errorf("read %q, %v", line, err)
		}
		read.ReadString('\n')
	}
	close(next)
}

// TestBalanced: connections, not requests, are what a Service spreads; each
// client has one of its own behind the router.
func TestBalanced(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		var mu sync.Mutex
		from := map[string]int{}
		_, at := runs(t, web80(serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			from[req.RemoteAddr]++
		}))))
		for range 5 {
			c := asks(t, http2)
			for range 4 {
				get(t, c, at[0])
			}
		}
		if len(from) != 5 {
			t.Errorf("the original saw %v, want 5 connections", from)
		}
	})
}

// TestNobodyLeftWaiting: a client that goes away ends its request on the laptop.
func TestNobodyLeftWaiting(t *testing.T) {
	began, ended := make(chan bool, 1), make(chan bool, 1)
	mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		began <- true
		<-req.Context().Done()
		ended <- true
	}))
	r, at := runs(t, web80(""))
	claims80(t, r, "ann", &to{address: mine}, Match{})
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+at[0], nil)
	must(t, err)
	go func() { <-began; cancel() }()
	if _, err := asks(t, false).Do(req); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-ended
	soon(t, "none open", func() bool { return r.Claims()[0].Open == 0 })
}

func TestWordsOfTheRouter(t *testing.T) {
	_, at := runs(t, web80(serves(t, says("x"))))
	c := dials(t, at[0])
	io.WriteString(c, "GET / HTTP/1.1\r\n\r\n") // no Host
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	must(t, err)
	if res.StatusCode != 400 {
		t.Errorf("answered with %s", res.Status)
	}
}

// TestDroppedLaptopIsLetGo: what is idle on the way to it ends at once, also where
// the client's own connection stays; what it is answering, when that is done.
func TestDroppedLaptopIsLetGo(t *testing.T) {
	eachHTTP(t, func(t *testing.T, http2 bool) {
		release := make(chan struct{})
		var open atomic.Int64
		laptop := counts(t, &open, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Header.Get("Slow") != "" {
				w.(http.Flusher).Flush()
				<-release
			}
			io.WriteString(w, "laptop")
		}))
		r, at := runs(t, web80(serves(t, says("original"))))
		claims80(t, r, "stays", &to{address: laptop}, Match{Path: "/nothing"})
		claims80(t, r, "idle", &to{address: laptop}, Match{})
		client := asks(t, http2)
		if got := get(t, client, at[0]); got != "laptop" || open.Load() != 1 {
			t.Fatalf("answered %q, %d are open", got, open.Load())
		}
		began := time.Now()
		r.Drop("idle")
		soon(t, "the idle connection ends", func() bool { return open.Load() == 0 })
		if took := time.Since(began); took > time.Second {
			t.Errorf("it ended after %v", took)
		}

		claims80(t, r, "busy", &to{address: laptop}, Match{})
		slow, err := http.NewRequest("GET", "http://"+at[0], nil)
		must(t, err)
		slow.Header.Set("Slow", "1")
		res, err := client.Do(slow)
		must(t, err)
		r.Drop("busy")
		if got := get(t, client, at[0]); got != "original" || open.Load() != 1 {
			t.Errorf("answered %q, %d are open", got, open.Load())
		}
		close(release)
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if string(b) != "laptop" || err != nil {
			t.Errorf("what was begun: %q, %v", b, err)
		}
		soon(t, "the busy connection ends", func() bool { return open.Load() == 0 })
		if n, _ := r.streams.here(); n == 0 {
			t.Error("the client's connection ended, too")
		}
	})
}

// counts serves as serves does, and keeps account of its connections.
func counts(t testing.TB, open *atomic.Int64, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s := &http.Server{Handler: h, Protocols: both(), ConnState: func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed:
			open.Add(-1)
		}
	}}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// TestHeadersHaveAnEnd: who sends no end of them does not use up the router.
func TestHeadersHaveAnEnd(t *testing.T) {
	original := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Much", strings.Repeat("x", len(req.Header.Get("Much"))))
	}))
	_, at := runs(t, web80(original))
	asked := func(size int) int {
		t.Helper()
		req, err := http.NewRequest("GET", "http://"+at[0], nil)
		must(t, err)
		req.Header.Set("Much", strings.Repeat("x", size))
		client := asks(t, false)
		client.Transport.(*http.Transport).MaxResponseHeaderBytes = 4 * maxHeader
		res, err := client.Do(req)
		must(t, err)
		res.Body.Close()
		return res.StatusCode
	}
	if got := asked(maxHeader / 2); got != http.StatusOK {
		t.Errorf("much is answered %d", got)
	}
	if got := asked(1<<20 + 64<<10); got != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("too much is answered %d", got)
	}
}
