package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
)

// A checker asks one host over every protocol who it is.
type checker struct {
	host   string
	direct int // what is added to the server's own ports; below zero: the Service's are asked
	path   string
	header headers
}

// headers are "name: value" flags.
type headers map[string][]string

func (h headers) String() string { return "" }

func (h headers) Set(text string) error {
	name, value, ok := strings.Cut(text, ":")
	if !ok {
		return fmt.Errorf("%q is not name: value", text)
	}
	h[textproto.CanonicalMIMEHeaderKey(name)] = []string{strings.TrimSpace(value)}
	return nil
}

// verdict is what one protocol says.
type verdict struct {
	By  string `json:"by,omitempty"`
	Err string `json:"err,omitempty"`
}

// check asks over all protocols at once, or those named, and prints a verdict for each.
func check(limit time.Duration, args []string) error {
	flags := flag.NewFlagSet("check", flag.ContinueOnError)
	c := &checker{header: headers{}}
	flags.Var(c.header, "H", "a header `name: value`")
	flags.StringVar(&c.path, "path", "", "goes before every path")
	flags.IntVar(&c.direct, "direct", -1, "ask the server's own ports plus this, not those of the Service")
	if err := flags.Parse(args); err != nil || flags.NArg() == 0 {
		return fmt.Errorf("check [-H 'NAME: VALUE'] [-path PREFIX] [-direct OFFSET] HOST [PROTOCOL...] (%w)", err)
	}
	c.host = flags.Arg(0)
	found := map[string]verdict{}
	var all sync.WaitGroup
	var mu sync.Mutex
	for name, ask := range c.protocols() {
		if only := flags.Args()[1:]; len(only) > 0 && !slices.Contains(only, name) {
			continue
		}
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			by, err := ask(ctx)
			v := verdict{By: by}
			if err != nil {
				v.Err = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			found[name] = v
		})
	}
	all.Wait()
	return json.NewEncoder(os.Stdout).Encode(found)
}

func (c *checker) protocols() map[string]func(context.Context) (string, error) {
	overGRPC := func(do func(context.Context, *grpc.ClientConn) (string, error)) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) { return c.withGRPC(ctx, do) }
	}
	return map[string]func(context.Context) (string, error){
		"http/1.1": c.web("http", "HTTP/1.1"), "h2c": c.web("http", "HTTP/2.0"),
		"https": c.web("tls", "HTTP/1.1"), "https h2": c.web("tls", "HTTP/2.0"),
		"h2c upgrade": c.upgrade, "events": c.events, "websocket": c.websocket, "hints": c.hints,
		"post": c.post("HTTP/1.1"), "post h2c": c.post("HTTP/2.0"), "download": c.download,
		"grpc unary": overGRPC(c.grpcUnary), "grpc bidi": overGRPC(c.grpcBidi), "grpc error": overGRPC(c.grpcFail),
		"banner": c.banner, "line": c.line, "udp": c.udp,
	}
}

func (c *checker) address(name string) string {
	i := slices.IndexFunc(doors, func(d door) bool { return d.name == name })
	port := doors[i].service
	if c.direct >= 0 {
		port = doors[i].listen + c.direct
	}
	return net.JoinHostPort(c.host, fmt.Sprint(port))
}

// transport speaks one version of HTTP only, over connections of its own.
func transport(proto string) *http.Transport {
	p := new(http.Protocols)
	p.SetHTTP1(proto == "HTTP/1.1")
	p.SetHTTP2(proto == "HTTP/2.0")
	p.SetUnencryptedHTTP2(proto == "HTTP/2.0")
	return &http.Transport{
		Protocols: p, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableCompression: true, ExpectContinueTimeout: 5 * time.Second,
	}
}

func (c *checker) request(ctx context.Context, method, path, door string, body io.Reader) (*http.Request, error) {
	scheme := "http"
	if door == "tls" {
		scheme = "https"
	}
	req, err := http.NewRequestWithContext(ctx, method, scheme+"://"+c.address(door)+c.path+path, body)
	if err == nil {
		req.Header = http.Header(c.header).Clone()
	}
	return req, err
}

// web asks for a report, and wants the request to have arrived as it was sent.
func (c *checker) web(door, proto string) func(context.Context) (string, error) {
	return func(ctx context.Context) (by string, err error) {
		t := transport(proto)
		defer t.CloseIdleConnections()
		req, err := c.request(ctx, http.MethodGet, "/report?a=1&b=%20", door, nil)
		if err != nil {
			return "", err
		}
		res, err := t.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		var r report
		if err := json.NewDecoder(res.Body).Decode(&r); err != nil {
			return "", err
		}
		by = res.Header.Get(byHeader)
		if res.TLS != nil && res.TLS.PeerCertificates[0].Subject.CommonName != by {
			return by, fmt.Errorf("the certificate is of %s", res.TLS.PeerCertificates[0].Subject.CommonName)
		}
		return by, c.asSent(req, res, r)
	}
}

func (c *checker) asSent(req *http.Request, res *http.Response, r report) error {
	if res.Proto != r.Proto || res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %d, but %s at the server", res.Proto, res.StatusCode, r.Proto)
	}
	if r.Host != req.URL.Host || r.Path != strings.TrimPrefix(req.URL.RequestURI(), "/api") {
		return fmt.Errorf("host %q and path %q arrived", r.Host, r.Path)
	}
	for name, values := range r.Header {
		if want := req.Header[name]; !slices.Equal(values, want) && name != "User-Agent" {
			return fmt.Errorf("header %s: %q arrived, sent were %q", name, values, want)
		}
	}
	for name := range req.Header {
		if len(r.Header[name]) == 0 {
			return fmt.Errorf("header %s was lost", name)
		}
	}
	return nil
}

const bodySize = 3 << 20

// post sends a body after "100 Continue", and reads its hash and a trailer.
func (c *checker) post(proto string) func(context.Context) (string, error) {
	return func(ctx context.Context) (by string, err error) {
		t := transport(proto)
		defer t.CloseIdleConnections()
		hash := sha256.New()
		req, err := c.request(ctx, http.MethodPost, "/hash", "http", io.TeeReader(noise(1, bodySize), hash))
		if err != nil {
			return "", err
		}
		req.Header.Set("Expect", "100-continue")
		res, err := t.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		answer, err := io.ReadAll(res.Body)
		sum := hex.EncodeToString(hash.Sum(nil))
		if want := fmt.Sprintf("%d %s\n", bodySize, sum); err != nil || string(answer) != want || res.Trailer.Get("X-Sha256") != sum {
			return "", fmt.Errorf("%q with trailer %v, want %q (%w)", answer, res.Trailer, want, err)
		}
		return res.Header.Get(byHeader), nil
	}
}

func (c *checker) download(ctx context.Context) (by string, err error) {
	t := transport("HTTP/1.1")
	defer t.CloseIdleConnections()
	req, err := c.request(ctx, http.MethodGet, fmt.Sprintf("/download?bytes=%d", bodySize), "http", nil)
	if err != nil {
		return "", err
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, res.Body)
	if sum := hex.EncodeToString(hash.Sum(nil)); err != nil || n != bodySize || res.Trailer.Get("X-Sha256") != sum {
		return "", fmt.Errorf("%d bytes of %s with trailer %v (%w)", n, sum, res.Trailer, err)
	}
	return res.Header.Get(byHeader), nil
}

// events must come when they are sent, not all at the end.
func (c *checker) events(ctx context.Context) (by string, err error) {
	t := transport("HTTP/1.1")
	defer t.CloseIdleConnections()
	req, err := c.request(ctx, http.MethodGet, "/events", "http", nil)
	if err != nil {
		return "", err
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	var came []time.Time
	for text := bufio.NewScanner(res.Body); text.Scan(); {
		if strings.HasPrefix(text.Text(), "data: ") {
			came = append(came, time.Now())
		}
	}
	if len(came) != eventCount {
		return "", fmt.Errorf("%d events, want %d", len(came), eventCount)
	}
	if took := came[eventCount-1].Sub(came[0]); took < eventPause*(eventCount-2) {
		return "", fmt.Errorf("all events came within %v", took)
	}
	return res.Header.Get(byHeader), nil
}

func (c *checker) hints(ctx context.Context) (by string, err error) {
	t := transport("HTTP/1.1")
	defer t.CloseIdleConnections()
	var codes []int
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		codes = append(codes, code)
		return nil
	}})
	req, err := c.request(ctx, http.MethodGet, "/hints", "http", nil)
	if err != nil {
		return "", err
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if !slices.Equal(codes, []int{http.StatusEarlyHints}) {
		return "", fmt.Errorf("answers before the answer: %v", codes)
	}
	return res.Header.Get(byHeader), nil
}

func (c *checker) websocket(ctx context.Context) (by string, err error) {
	address := c.address("http")
	config, err := websocket.NewConfig("ws://"+address+c.path+"/socket", "http://"+address)
	if err != nil {
		return "", err
	}
	config.Header = http.Header(c.header).Clone()
	conn, err := config.DialContext(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	setDeadline(ctx, conn)
	for i := range 5 {
		var answer string
		if err := websocket.Message.Send(conn, fmt.Sprint(i)); err != nil {
			return by, err
		}
		if err := websocket.Message.Receive(conn, &answer); err != nil {
			return by, err
		}
		by, _, _ = strings.Cut(answer, " ")
		if answer != fmt.Sprintf("%s %d", by, i) {
			return by, fmt.Errorf("message %d: %q", i, answer)
		}
	}
	return by, nil
}

func setDeadline(ctx context.Context, c net.Conn) {
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
}

// upgrade goes from HTTP/1.1 to h2c (RFC 7540, 3.2): the answer to the request
// that asks for it comes as stream 1.
func (c *checker) upgrade(ctx context.Context) (by string, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.address("http"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	setDeadline(ctx, conn)
	req, err := c.request(ctx, http.MethodGet, "/report", "http", nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Connection", "Upgrade, HTTP2-Settings")
	req.Header.Set("Upgrade", "h2c")
	req.Header.Set("HTTP2-Settings", "AAMAAABkAAQAAP__")
	if err := req.Write(conn); err != nil {
		return "", err
	}
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, req)
	if err != nil {
		return "", err
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		return res.Header.Get(byHeader), fmt.Errorf("answered %s", res.Status)
	}
	return streamOne(conn, in)
}

func streamOne(conn io.Writer, in io.Reader) (by string, err error) {
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return "", err
	}
	f := http2.NewFramer(conn, in)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := f.WriteSettings(); err != nil {
		return "", err
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return by, err
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			for _, h := range frame.Fields {
				if strings.EqualFold(h.Name, byHeader) {
					by = h.Value
				}
			}
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = f.WriteSettingsAck()
			}
		case *http2.GoAwayFrame, *http2.RSTStreamFrame:
			return by, fmt.Errorf("%v", frame)
		}
		if h := frame.Header(); err != nil || h.StreamID == 1 && h.Flags.Has(http2.FlagDataEndStream) {
			return by, err
		}
	}
}

// banner reads before it writes.
func (c *checker) banner(ctx context.Context) (by string, err error) {
	return c.talk(ctx, "banner", func(in *bufio.Reader) (string, error) {
		line, err := in.ReadString('\n')
		return strings.TrimSpace(strings.TrimPrefix(line, "220 ")), err
	})
}

// line writes first.
func (c *checker) line(ctx context.Context) (by string, err error) {
	return c.talk(ctx, "line", func(*bufio.Reader) (string, error) { return "", nil })
}

// talk ends with a half-close, after which the server still has a word to say.
func (c *checker) talk(ctx context.Context, door string, greet func(*bufio.Reader) (string, error)) (by string, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.address(door))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	setDeadline(ctx, conn)
	in := bufio.NewReader(conn)
	greeted, err := greet(in)
	if err != nil {
		return "", fmt.Errorf("no banner: %w", err)
	}
	fmt.Fprintln(conn, "hello")
	line, err := in.ReadString('\n')
	by, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	if err != nil || rest != "hello" || greeted != "" && greeted != by {
		return by, fmt.Errorf("%q after banner of %q (%w)", line, greeted, err)
	}
	err = conn.(*net.TCPConn).CloseWrite()
	last, readErr := io.ReadAll(in)
	if string(last) != by+" bye\n" {
		return by, fmt.Errorf("%q after the half-close (%w)", last, errors.Join(err, readErr))
	}
	return by, nil
}

// udp wants small and large datagrams back; one lost on the way is sent again.
func (c *checker) udp(ctx context.Context) (by string, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", c.address("udp"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	b := make([]byte, 64<<10)
	for _, size := range []int{5, 1200, 8000} {
		text := strings.Repeat("x", size)
		n := 0
		for range 3 {
			if _, err = io.WriteString(conn, text); err != nil {
				continue
			}
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if n, err = conn.Read(b); err == nil {
				break
			}
		}
		name, rest, _ := strings.Cut(string(b[:n]), " ")
		if err != nil || rest != text || by != "" && by != name {
			return by, fmt.Errorf("%d bytes after %d from %q (%w)", n, size, name, err)
		}
		by = name
	}
	return by, nil
}
