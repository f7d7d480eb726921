package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
	"golang.org/x/net/websocket"
)

// A door is a port of "kit serve": its name in manifests, the port that the
// server listens on, and the one that the Service app has for it.
type door struct {
	name    string
	listen  int
	service int
}

var doors = []door{
	{"http", 8080, 80}, {"grpc", 9090, 9090}, {"tls", 8443, 443},
	{"banner", 7001, 7001}, {"line", 7002, 7002}, {"udp", 7003, 7003},
}

// byHeader names who served a request.
const byHeader = "X-Served-By"

// A server says its name in every protocol.
type server struct {
	name   string
	linger time.Duration // it goes on serving after SIGTERM

	mu   sync.Mutex
	seen map[string]int // what came, by path, or by door where there is no path
}

func newServer(name string) *server { return &server{name: name, seen: map[string]int{}} }

func (s *server) see(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[what]++
}

func hostname() string { name, _ := os.Hostname(); return name }

// ownName is NAME, or the host's.
func ownName() string { return cmp.Or(os.Getenv("NAME"), hostname()) }

func serveAll(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	s := newServer("")
	flags.StringVar(&s.name, "name", ownName(), "who it says it is")
	flags.DurationVar(&s.linger, "linger", 2*time.Second, "go on serving after SIGTERM")
	host := flags.String("host", "", "address to listen at")
	offset := flags.Int("offset", 0, "is added to every port")
	if err := flags.Parse(args); err != nil {
		return err
	}
	failed := make(chan error, len(doors))
	for _, d := range doors {
		run, err := s.open(d.name, fmt.Sprintf("%s:%d", *host, d.listen+*offset))
		if err != nil {
			return err
		}
		go func() { failed <- run() }()
	}
	return untilTerm(failed, s.linger)
}

// untilTerm waits for an error or the end. Clients are still sent here until
// every kube-proxy has heard of it.
func untilTerm(failed <-chan error, linger time.Duration) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-failed:
		return err
	case s := <-end:
		if s == syscall.SIGTERM {
			time.Sleep(linger)
		}
		return nil
	}
}

// open listens, and returns what serves there.
func (s *server) open(door, address string) (run func() error, err error) {
	if door == "udp" {
		c, err := net.ListenPacket("udp", address)
		return func() error { return s.datagrams(c) }, err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	switch door {
	case "grpc":
		return func() error { return s.grpcServer().Serve(l) }, nil
	case "tls":
		config, err := s.selfSigned()
		web := &http.Server{Handler: s.handler(), TLSConfig: config}
		return func() error { return web.ServeTLS(l, "", "") }, err
	case "banner":
		return func() error { return acceptAll(l, s.banner) }, nil
	case "line":
		return func() error { return acceptAll(l, s.lines) }, nil
	}
	web := &http.Server{Handler: h2c.NewHandler(s.handler(), &http2.Server{MaxConcurrentStreams: 1000})}
	return func() error { return web.Serve(l) }, nil
}

// selfSigned names the server in its certificate, so that who reads that knows
// who ended the TLS.
func (s *server) selfSigned() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: s.name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, nil
}

func acceptAll(l net.Listener, serve func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

// banner speaks first, as mail and database servers do.
func (s *server) banner(c net.Conn) {
	fmt.Fprintf(c, "220 %s\n", s.name)
	s.lines(c)
}

// lines answers each line with its name and the line, and the end of them with "bye".
func (s *server) lines(c net.Conn) {
	text := bufio.NewScanner(c)
	for text.Scan() {
		s.see("line")
		fmt.Fprintf(c, "%s %s\n", s.name, text.Text())
	}
	fmt.Fprintf(c, "%s bye\n", s.name)
}

func (s *server) datagrams(c net.PacketConn) error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err == nil {
			s.see("udp")
			_, _ = c.WriteTo(fmt.Appendf(nil, "%s %s", s.name, b[:n]), from)
		}
	}
}

// handler is everything over HTTP, also below /api.
func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", s.report)
	mux.HandleFunc("GET /seen", s.tellSeen)
	mux.HandleFunc("POST /echo", echoBody)
	mux.HandleFunc("POST /hash", hashBody)
	mux.HandleFunc("GET /download", download)
	mux.HandleFunc("GET /events", events)
	mux.HandleFunc("/slow", slow)
	mux.HandleFunc("GET /hints", hints)
	mux.Handle("GET /socket", websocket.Server{Handler: func(c *websocket.Conn) { s.socket(c) }})
	mux.Handle("/api/", http.StripPrefix("/api", mux))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(byHeader, s.name)
		s.see(r.URL.Path)
		mux.ServeHTTP(w, r)
	})
}

// report answers who was asked, and what arrived.
func (s *server) report(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	_ = json.NewEncoder(w).Encode(report{
		Name: s.name, Pod: hostname(), Version: os.Getenv("VERSION"), Method: r.Method, Path: r.URL.String(), Proto: r.Proto,
		Host: r.Host, Remote: r.RemoteAddr, Local: local.String(), Header: r.Header, Body: string(body),
	})
}

// tellSeen answers how often each thing came.
func (s *server) tellSeen(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = json.NewEncoder(w).Encode(s.seen)
}

// hashBody answers with the number of bytes and their SHA-256, which is in a
// trailer too.
func hashBody(w http.ResponseWriter, r *http.Request) {
	hash := sha256.New()
	n, err := io.Copy(hash, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Trailer", "X-Sha256")
	sum := hex.EncodeToString(hash.Sum(nil))
	fmt.Fprintf(w, "%d %s\n", n, sum)
	w.Header().Set("X-Sha256", sum)
}

// noise is bytes that do not compress, the same for a seed.
func noise(seed byte, n int64) io.Reader {
	return io.LimitReader(mathrand.NewChaCha8([32]byte{seed}), n)
}

// download sends noise; its SHA-256 follows in a trailer.
func download(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.URL.Query().Get("bytes"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	hash := sha256.New()
	w.Header().Set("Trailer", "X-Sha256")
	w.Header().Set("Content-Type", "application/octet-stream")
	if _, err := io.Copy(w, io.TeeReader(noise(byte(n), n), hash)); err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("X-Sha256", hex.EncodeToString(hash.Sum(nil)))
}

const (
	eventCount = 4
	eventPause = 150 * time.Millisecond
)

// events are sent by and by; who holds them back is found out.
func events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	control := http.NewResponseController(w)
	for i := range eventCount {
		fmt.Fprintf(w, "data: %d %s\n\n", i, w.Header().Get(byHeader))
		if control.Flush() != nil || !sleep(r.Context(), eventPause) {
			return
		}
	}
}

// slow answers after a while.
func slow(w http.ResponseWriter, r *http.Request) {
	pause, err := time.ParseDuration(r.URL.Query().Get("for"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
	if sleep(r.Context(), pause) {
		fmt.Fprintln(w, w.Header().Get(byHeader))
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// hints sends a 103 before its answer.
func hints(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Link", "</style.css>; rel=preload")
	w.WriteHeader(http.StatusEarlyHints)
	fmt.Fprintln(w, "after the hints")
}

func (s *server) socket(c *websocket.Conn) {
	for {
		var text string
		if err := websocket.Message.Receive(c, &text); err != nil {
			return
		}
		if err := websocket.Message.Send(c, s.name+" "+text); err != nil {
			return
		}
	}
}
