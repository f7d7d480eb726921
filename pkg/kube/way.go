package kube

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport"
	"k8s.io/client-go/transport/spdy"
)

// A Way leads from here through the API server to the shadow's port. On all of
// them the same is said to the shadow: a GET with an Upgrade header, answered by
// 101, and from there on the bytes are the wire's.
type Way string

// A Path is how to get to a shadow.
type Path struct {
	Way      Way    // "" is the best that works
	Upgrade  string // what wire to ask for there: the header's value
	Endpoint string // past the API server: Auto, LoadBalancer, HostPort, HOST, HOST:PORT, or "" for never

	// Only is the one protocol of a load balancer, "tcp" or "udp": not every cloud has
	// some that lead two. "" is both.
	Only string
}

// The ways, the best first (measured: the first has 2 to 5 times the throughput
// of the others and a quarter of their delay).
const (
	PodsProxy Way = "pods/proxy"
	WebSocket Way = "port-forward websocket"
	SPDY      Way = "port-forward spdy"
)

const (
	wayLimit  = 8 * time.Second // for one way, before the next is tried
	askLimit  = 5 * time.Second // for one question of a dial to the API server
	wayBuffer = 64 << 10
)

// ways remembers which one worked.
type ways struct {
	mu    sync.Mutex
	order []Way
	last  Way    // that worked
	pod   string // that was reached
}

func (w *ways) list() []Way {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Way(nil), w.order...)
}

// worked moves a way to the front.
func (w *ways) worked(way Way) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = way
	order := []Way{way}
	for _, other := range w.order {
		if other != way {
			order = append(order, other)
		}
	}
	w.order = order
}

// Way is the way of the last dial that worked, "" before.
func (s *Shadow) Way() Way {
	s.ways.mu.Lock()
	defer s.ways.mu.Unlock()
	return s.ways.last
}

// Pod is the name of the shadow's pod as it was last seen ready, "" before.
func (s *Shadow) Pod() string {
	s.ways.mu.Lock()
	defer s.ways.mu.Unlock()
	return s.ways.pod
}

// seen remembers the ready pod.
func (w *ways) seen(pod string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pod = pod
}

// Dial connects to the shadow's ready pod, by the way that worked last or else
// by the best that works, and tells which. ctx bounds the dial only.
//
// A dial that takes too long takes the pooled connections to the API server with
// it: whatever is next begins on a fresh one.
//
// A deadline that passes ends the connection for good; it is there to bound a
// handshake.
func (s *Shadow) Dial(ctx context.Context) (net.Conn, Way, error) {
	conn, way, err := s.dial(ctx)
	s.cluster.dropSlow(err)
	return conn, way, err
}

func (c *Cluster) dropSlow(err error) {
	if errors.Is(err, context.DeadlineExceeded) {
		c.conns.drop()
	}
}

func (s *Shadow) dial(ctx context.Context) (net.Conn, Way, error) {
	pod, err := s.readyPod(ctx)
	if err != nil {
		return nil, "", err
	}
	if err := s.unbound(ctx); err != nil {
		return nil, "", err
	}
	return s.cluster.dialPod(ctx, &s.ways, door{pod.Name, port, s.cfg.Path.Upgrade})
}

// DialWay is Dial by one way, whichever worked last.
func (s *Shadow) DialWay(ctx context.Context, way Way) (net.Conn, error) {
	pod, err := s.readyPod(ctx)
	if err != nil {
		return nil, err
	}
	return s.cluster.dialWay(ctx, way, door{pod.Name, port, s.cfg.Path.Upgrade})
}

// A door is where a shadow in a pod is dialled, and what is asked for there.
type door struct {
	pod     string
	port    int
	upgrade string // "": nothing is asked for, and the bytes are the port's own
}

func (d door) String() string { return d.pod + ":" + strconv.Itoa(d.port) }

// dialPod tries the ways one after the other.
func (c *Cluster) dialPod(ctx context.Context, ways *ways, at door) (net.Conn, Way, error) {
	var errs []error
	for _, way := range ways.list() {
		conn, err := c.dialWay(ctx, way, at)
		if err == nil {
			ways.worked(way)
			return conn, way, nil
		}
		errs = append(errs, fmt.Errorf("by %s: %w", way, sorted(err)))
		if ctx.Err() != nil || notReached(err) {
			break // another way would not be better
		}
	}
	return nil, "", fmt.Errorf("dial pod %s in namespace %s: %w", at.pod, c.Namespace, errors.Join(errs...))
}

// notReached tells whether not even the API server was reached.
func notReached(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// readyPod is the pod to dial: after a replacement, the new one.
func (s *Shadow) readyPod(ctx context.Context) (*corev1.Pod, error) {
	ask, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	list, err := s.cluster.client.CoreV1().Pods(s.cluster.Namespace).
		List(ask, metav1.ListOptions{LabelSelector: s.podSelector(s.pod)})
	if err != nil {
		return nil, fmt.Errorf("find the shadow's pod in namespace %s: %w", s.cluster.Namespace, sorted(err))
	}
	var newest *corev1.Pod
	for i := range list.Items {
		p := &list.Items[i]
		if isReady(p) && (newest == nil || newest.CreationTimestamp.Before(&p.CreationTimestamp)) {
			newest = p
		}
	}
	if newest == nil {
		return nil, s.noPod(ctx, len(list.Items))
	}
	s.ways.seen(newest.Name)
	return newest, nil
}

// noPod tells a pod that is not ready from a session that is over.
func (s *Shadow) noPod(ctx context.Context, pods int) error {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	if err := s.refused(ctx, pods, nil); errors.Is(err, ErrGone) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("no pod of session %s is ready in namespace %s", s.cfg.Session, s.cluster.Namespace)
}

func (c *Cluster) dialWay(ctx context.Context, way Way, at door) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, wayLimit)
	defer cancel()
	if way == PodsProxy {
		return c.dialProxy(ctx, at)
	}
	return c.dialForward(ctx, way, at)
}

// podURL is the address of a subresource of a pod, below whatever path the API
// server's own URL has.
func (c *Cluster) podURL(pod, sub string) (*url.URL, error) {
	server, err := url.Parse(c.Server)
	if err != nil {
		return nil, err
	}
	if server.Path == "" {
		server.Path = "/" // else the joined path would not begin with one
	}
	return server.JoinPath("api/v1/namespaces", c.Namespace, "pods", pod, sub), nil
}

// dialProxy upgrades a request to the proxy subresource: the API server then
// relays bytes between us and the pod, with nothing of its own in between.
func (c *Cluster) dialProxy(ctx context.Context, at door) (net.Conn, error) {
	target, err := c.podURL(at.String(), "proxy/")
	if err != nil {
		return nil, err
	}
	trip, base, err := c.upgradeTransport()
	if err != nil {
		return nil, err
	}
	// The request lives as long as the connection does.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, end)
	resp, err := trip.RoundTrip(upgradeRequest(life, target, at.upgrade))
	if err == nil {
		err = switched(resp)
	}
	if !stop() && err == nil {
		resp.Body.Close()
		err = ctx.Err()
	}
	if err != nil {
		end()
		base.CloseIdleConnections()
		return nil, deadlineOf(ctx, err)
	}
	body := resp.Body.(io.ReadWriteCloser) // net/http promises it for a 101
	return newConn(PodsProxy, at, body, body, func() error { defer end(); return body.Close() }), nil
}

// upgradeTransport is the cluster's transport, HTTP/1.1 only: HTTP/2 has no
// Upgrade. It is made by hand, because client-go's has no setting for it that
// keeps the rest of the configuration.
func (c *Cluster) upgradeTransport() (http.RoundTripper, *http.Transport, error) {
	config := rest.CopyConfig(c.config)
	config.NextProtos = []string{"http/1.1"}
	config.Dial = c.conns.dialApart
	conf, err := config.TransportConfig()
	if err != nil {
		return nil, nil, err
	}
	tlsConfig, err := transport.TLSConfigFor(conf)
	if err != nil {
		return nil, nil, err
	}
	proxy := conf.Proxy
	if proxy == nil {
		proxy = utilnet.NewProxierWithNoProxyCIDR(http.ProxyFromEnvironment)
	}
	base := &http.Transport{
		Proxy: proxy, DialContext: conf.DialHolder.Dial,
		TLSClientConfig: tlsConfig, TLSHandshakeTimeout: dialTimeout,
		TLSNextProto:   map[string]func(string, *tls.Conn) http.RoundTripper{}, // no HTTP/2
		ReadBufferSize: wayBuffer, WriteBufferSize: wayBuffer,
	}
	trip, err := transport.HTTPWrappersForConfig(conf, base)
	return gauge{trip, c.credentials}, base, err
}

func upgradeRequest(ctx context.Context, target *url.URL, to string) *http.Request {
	req := &http.Request{
		Method: http.MethodGet, URL: target, Host: target.Host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Connection": {"Upgrade"}, "Upgrade": {to}},
	}
	return req.WithContext(ctx)
}

// switched makes an error of any answer that is not a 101.
func switched(resp *http.Response) error {
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024)) // as much as came
	err := fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(text))
	switch resp.StatusCode {
	case http.StatusForbidden:
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	case http.StatusUnauthorized:
		return fmt.Errorf("%w: %w", ErrUnauthorized, err)
	}
	return err
}

// deadlineOf gives the deadline's error where the deadline was the reason.
func deadlineOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	return err
}

// dialForward opens one port-forward with one stream. Several streams on one
// would stop each other: the protocol below has no flow control.
func (c *Cluster) dialForward(ctx context.Context, way Way, at door) (net.Conn, error) {
	target, err := c.podURL(at.pod, "portforward")
	if err != nil {
		return nil, err
	}
	dialer, err := c.forwardDialer(way, target)
	if err != nil {
		return nil, err
	}
	wire, err := dialStreams(ctx, dialer)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { wire.Close() })
	conn, err := forward(wire, way, at)
	if !stop() && err == nil {
		conn.Close()
		err = ctx.Err()
	}
	if err != nil {
		wire.Close()
		return nil, deadlineOf(ctx, err)
	}
	return conn, nil
}

func (c *Cluster) forwardDialer(way Way, target *url.URL) (httpstream.Dialer, error) {
	switch way {
	case WebSocket:
		return portforward.NewSPDYOverWebsocketDialer(target, c.config)
	case SPDY:
		trip, upgrader, err := spdy.RoundTripperFor(c.config)
		if err != nil {
			return nil, err
		}
		return spdy.NewDialer(upgrader, &http.Client{Transport: trip}, http.MethodPost, target), nil
	}
	return nil, fmt.Errorf("no such way: %q", way)
}

// dialStreams gives the library's dial a context. A connection that comes too
// late is closed.
func dialStreams(ctx context.Context, dialer httpstream.Dialer) (httpstream.Connection, error) {
	type result struct {
		wire httpstream.Connection
		err  error
	}
	done := make(chan result, 1)
	go func() {
		wire, _, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
		done <- result{wire, err}
	}()
	select {
	case r := <-done:
		return r.wire, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				r.wire.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// forward opens the pair of streams that one forwarded connection is, and says
// the upgrade to the shadow itself.
func forward(wire httpstream.Connection, way Way, at door) (net.Conn, error) {
	headers := http.Header{}
	headers.Set(corev1.PortHeader, strconv.Itoa(at.port))
	headers.Set(corev1.PortForwardRequestIDHeader, "0")
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	troubles, err := wire.CreateStream(headers)
	if err != nil {
		return nil, fmt.Errorf("open error stream: %w", err)
	}
	troubles.Close() // we only listen
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := wire.CreateStream(headers)
	if err != nil {
		return nil, fmt.Errorf("open data stream: %w", err)
	}
	conn := newConn(way, at, data, data, func() error { data.Reset(); return wire.Close() })
	told := make(chan struct{})
	if at.upgrade == "" {
		conn.told = told
	}
	go func() {
		defer close(told)
		text, _ := io.ReadAll(troubles)
		if len(text) > 0 {
			conn.fail(fmt.Errorf("port-forward: %s", bytes.TrimSpace(text)))
		}
	}()
	if at.upgrade == "" {
		return conn, nil
	}
	if err := conn.upgrade(); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// streamConn makes a net.Conn of the two halves of a stream.
type streamConn struct {
	r     io.Reader
	w     io.Writer
	way   Way
	at    door
	close func() error
	told  <-chan struct{} // an end is told when this is closed, and the reason is known; nil: at once

	once   sync.Once
	mu     sync.Mutex
	err    error // why it ended, once it did
	timers [2]*time.Timer
}

func newConn(way Way, at door, r io.Reader, w io.Writer, close func() error) *streamConn {
	return &streamConn{r: r, w: w, way: way, at: at, close: close}
}

// upgrade is the shadow's hand-shake, on the ways where the API server does not
// do it for us.
func (c *streamConn) upgrade() error {
	if err := upgradeRequest(context.Background(), &url.URL{Scheme: "http", Host: "culvert", Path: "/"}, c.at.upgrade).Write(c); err != nil {
		return fmt.Errorf("ask for the upgrade: %w", c.reason(err))
	}
	buffered := bufio.NewReader(c.r)
	resp, err := http.ReadResponse(buffered, nil)
	if err != nil {
		return fmt.Errorf("ask for the upgrade: %w", c.reason(err))
	}
	if err := switched(resp); err != nil {
		return err
	}
	if n := buffered.Buffered(); n > 0 {
		early, _ := buffered.Peek(n)
		c.r = io.MultiReader(bytes.NewReader(early), c.r)
	}
	return nil
}

// toldLimit is how long an end waits for its reason, which comes by a stream of its own.
const toldLimit = time.Second

func (c *streamConn) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err == io.EOF && c.told != nil {
		select {
		case <-c.told:
		case <-time.After(toldLimit):
		}
	}
	return n, c.reason(err)
}

func (c *streamConn) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	return n, c.reason(err)
}

func (c *streamConn) Close() error {
	c.fail(net.ErrClosed)
	return nil
}

// fail ends the connection; the first reason stays.
func (c *streamConn) fail(why error) {
	c.once.Do(func() {
		c.mu.Lock()
		c.err = why
		for _, t := range c.timers {
			if t != nil {
				t.Stop()
			}
		}
		c.mu.Unlock()
		_ = c.close() // nobody is left to tell
	})
}

// reason puts why it ended in the place of what the ended stream says.
func (c *streamConn) reason(err error) error {
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	return err
}

// wayAddr is an end of a connection in words: there is no address.
type wayAddr string

func (wayAddr) Network() string  { return "kubernetes" }
func (a wayAddr) String() string { return string(a) }

func (c *streamConn) LocalAddr() net.Addr  { return wayAddr(c.way) }
func (c *streamConn) RemoteAddr() net.Addr { return wayAddr(c.at.String()) }

func (c *streamConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *streamConn) SetReadDeadline(t time.Time) error  { return c.expire(0, t) }
func (c *streamConn) SetWriteDeadline(t time.Time) error { return c.expire(1, t) }

func (c *streamConn) expire(which int, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if old := c.timers[which]; old != nil {
		old.Stop()
	}
	c.timers[which] = nil
	if !t.IsZero() {
		c.timers[which] = time.AfterFunc(time.Until(t), func() { c.fail(os.ErrDeadlineExceeded) })
	}
	return nil
}
