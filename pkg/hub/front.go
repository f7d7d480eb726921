package hub

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
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
	"github.com/culvert-dev/culvert/pkg/proxy"
	"github.com/culvert-dev/culvert/pkg/relay"
	"github.com/culvert-dev/culvert/pkg/strangers"
)

const (
	// strangerLimit is how long a connection may take to say what it wants.
	strangerLimit = 10 * time.Second
	// silenceLimit is how long it may say nothing at all before it is taken for a client
	// of SSH that waits for us: either side may begin (RFC 4253, 4.2).
	silenceLimit = 2 * time.Second
	maxHeader    = 8 << 10
	dialLimit    = 10 * time.Second // for a host to answer
)

// first bytes
const (
	helloTLS = 0x16 // a handshake record (RFC 8446, 5.1)
	socks5   = 0x05 // RFC 1928, 3
)

// answer finds out by the first bytes what is spoken. TLS may be in front of the others.
func (h *Hub) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer h.porch.Leave(conn)
	first, err := h.introduced(conn)
	if err != nil {
		return
	}
	h.porch.Turn(conn, first)
	defer h.porch.Leave(first)
	h.serveFirst(ctx, first)
}

// introduced waits for the first bytes. Where they come from a balancer that may say who has
// come (by the PROXY protocol), and it does, the next ones are waited for. It is not asked to:
// other hubs and who asks for health may come from the same network.
func (h *Hub) introduced(conn net.Conn) (*peeked, error) {
	first, err := peek(conn)
	if err != nil || first.silent || !h.believes(addrOf(conn.RemoteAddr())) {
		return first, err
	}
	said, err := proxyproto.Read(first.First)
	switch {
	case errors.Is(err, proxyproto.ErrNoProxyProtocol):
		return first, nil
	case err != nil:
		h.cfg.Log.Warn("a balancer is not understood", "from", conn.RemoteAddr(), "err", err)
		return nil, err
	}
	if source, _, ok := said.TCPAddrs(); ok && said.Command.IsProxy() {
		first.remote = source
	}
	return first, first.wait()
}

func (h *Hub) believes(balancer netip.Addr) bool {
	return slices.ContainsFunc(h.cfg.Balancers, func(p netip.Prefix) bool { return p.Contains(balancer) })
}

// serveFirst serves one whose first bytes are there.
func (h *Hub) serveFirst(ctx context.Context, conn *peeked) {
	first, err := conn, error(nil)
	if first.is(helloTLS) {
		first, err = h.unwrap(ctx, first)
	}
	if err != nil || first == nil {
		return
	}
	from, ssh := addrOf(conn.RemoteAddr()), first.silent || first.starts("SSH-")
	known := func() { h.porch.Leave(conn) }
	switch {
	case first.is(socks5):
		h.socks(ctx, first, from, known)
	case ssh:
		_ = first.SetDeadline(time.Time{}) // the handshake has its own
		h.ssh(ctx, first, from, known)
	default:
		h.http(ctx, first, from, known)
	}
}

// A peeked connection is one of which the first bytes are known, and not yet read.
type peeked struct {
	strangers.Early
	silent bool
	remote net.Addr // that a balancer has told; nil: its own
}

func (p *peeked) RemoteAddr() net.Addr {
	if p.remote != nil {
		return p.remote
	}
	return p.Conn.RemoteAddr()
}

func newPeeked(c net.Conn, r *bufio.Reader) *peeked {
	return &peeked{Early: strangers.Early{Conn: c, First: r}}
}

// peek waits for them.
func peek(conn net.Conn) (*peeked, error) {
	p := newPeeked(conn, bufio.NewReaderSize(conn, maxHeader))
	return p, p.wait()
}

func (p *peeked) wait() error {
	_ = p.SetDeadline(time.Now().Add(silenceLimit))
	_, err := p.First.Peek(1)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		p.silent, p.First, err = true, bufio.NewReaderSize(p.Conn, maxHeader), nil
	}
	_ = p.SetDeadline(time.Now().Add(strangerLimit))
	return err
}

func (p *peeked) is(b byte) bool {
	have, _ := p.First.Peek(min(1, p.First.Buffered()))
	return len(have) > 0 && have[0] == b
}

// starts waits for as many bytes as it takes to say no.
func (p *peeked) starts(with string) bool {
	for n := 1; n <= len(with); n++ {
		have, err := p.First.Peek(n)
		if err != nil || !strings.HasPrefix(with, string(have)) {
			return false
		}
	}
	return true
}

func (p *peeked) CloseWrite() error {
	if half, ok := p.Conn.(channel.CloseWriter); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Abort has the other side see that something went wrong.
func (p *peeked) Abort(reason error) error {
	c := p.Conn
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn() // an end of file would be said else
	}
	relay.Abort(c, reason)
	return nil
}

// head waits for all of a request's head, which may not be longer than what is kept.
func (p *peeked) head() error {
	for {
		have, _ := p.First.Peek(p.First.Buffered())
		if bytes.Contains(have, []byte("\r\n\r\n")) || bytes.Contains(have, []byte("\n\n")) {
			return nil
		}
		if _, err := p.First.Peek(len(have) + 1); err != nil {
			return err
		}
	}
}

// unwrap takes TLS away. A wire of ours is served here, and then there is nothing left.
func (h *Hub) unwrap(ctx context.Context, conn *peeked) (*peeked, error) {
	hello, again, err := readHello(conn)
	if err != nil {
		return nil, err
	}
	if tlschan.Asked(hello) {
		_ = conn.SetDeadline(time.Time{})
		h.wire(ctx, again, addrOf(conn.RemoteAddr()), func() { h.porch.Leave(conn) })
		return nil, nil
	}
	if asksToJoin(hello) {
		return nil, h.joining(ctx, again)
	}
	inner := tls.Server(again, h.cfg.TLS)
	if err := inner.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return peek(inner)
}

// readHello is what a client of TLS says first, and the connection with that still to be
// read.
func readHello(c net.Conn) (hello *tls.ClientHelloInfo, again net.Conn, err error) {
	var read bytes.Buffer
	settings := &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		hello = h
		return nil, errSeen
	}}
	err = tls.Server(mute{c, io.TeeReader(c, &read)}, settings).Handshake()
	if hello == nil {
		return nil, nil, err
	}
	p := newPeeked(c, bufio.NewReaderSize(&read, max(read.Len(), 16)))
	_, err = p.First.Peek(read.Len())
	return hello, p, err
}

var errSeen = errors.New("seen")

// mute is a connection on which nothing is answered.
type mute struct {
	net.Conn
	r io.Reader
}

func (m mute) Read(p []byte) (int, error)  { return m.r.Read(p) }
func (m mute) Write(p []byte) (int, error) { return len(p), nil }

func addrOf(a net.Addr) netip.Addr {
	at, _ := netip.ParseAddrPort(a.String())
	return at.Addr().Unmap()
}

// anonymous is the hub for who shows none. One who may do nothing is told so when he asks.
func (h *Hub) anonymous(c net.Conn, from netip.Addr) *visit {
	who := func() (*Guest, error) {
		g, err := h.cfg.Rights().Anonymous(from, time.Now())
		if err != nil {
			g = &Guest{Name: "anonymous", From: from}
		}
		return g, nil
	}
	return &visit{hub: h, who: who, from: c.RemoteAddr(), streams: &h.loose, window: waitsPlain}
}

var errLeaving = errors.New("this hub is about to go")

// kinds of wires
const (
	kindSSH  = "ssh"
	kindTLS  = "tls"
	kindPeer = "peer" // another hub's
)

// A gate lets one wire's client in, by its key.
type gate struct {
	hub   *Hub
	conn  net.Conn
	from  netip.Addr
	known func() // it is known who has come
	end   context.CancelFunc
	kind  string // of the wire
	open  interface {
		Inc()
		Dec()
	} // counts such wires, this one among them; nil: not yet
	in   *visit // as the last key that was let in, which he may turn out not to have
	once sync.Once

	refusals []func() // to be told if he is not let in at all: ssh shows one key after the other
}

// alive is called when he has shown that he has the key, and with each sign of life.
func (g *gate) alive() {
	g.once.Do(func() {
		g.known()
		if g.in == nil {
			g.kind = kindPeer
		}
		g.open = g.hub.metrics.wires.WithLabelValues(g.kind)
		g.open.Inc()
		if g.in != nil {
			g.hub.enters(g.in)
		}
	})
}

// admit is the hub for who shows a key.
func (g *gate) admit(user string, key ssh.PublicKey) (channel.Network, error) {
	h := g.hub
	if same(key, h.signer.PublicKey()) {
		g.in = nil
		return &hop{h, g.conn.RemoteAddr()}, nil
	}
	who := func() (*Guest, error) { return h.cfg.Rights().Admit(user, g.from, key, time.Now()) }
	_, err := who()
	if h.leaving() {
		err = errLeaving
	}
	if err != nil {
		r := h.auditStranger(&Guest{Key: ssh.FingerprintSHA256(bare(key)), User: user, From: g.from}, "login", "", "")
		g.refusals = append(g.refusals, func() { r.refused(err) })
		return nil, err
	}
	g.in = &visit{
		hub: h, who: who, from: g.conn.RemoteAddr(), end: g.end, told: g.kind == kindTLS,
		streams: &streams{ended: h.settle}, window: windows[g.kind],
	}
	return g.in, nil
}

// open runs a wire, which ends early when who is at its other end is not let in any more.
func (h *Hub) open(ctx context.Context, c net.Conn, from netip.Addr, kind string, known func(), serve func(context.Context, *gate) error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := &gate{hub: h, conn: c, from: from, known: known, end: cancel, kind: kind}
	err := serve(ctx, g)
	if g.open != nil {
		g.open.Dec()
	} else {
		for _, tell := range g.refusals {
			tell()
		}
	}
	if g.in != nil {
		h.leaves(g.in)
	}
	h.cfg.Log.Info("wire ended", "kind", kind, "from", from, "err", err)
}

// ssh serves a wire of any SSH client's.
func (h *Hub) ssh(ctx context.Context, c net.Conn, from netip.Addr, known func()) {
	h.open(ctx, c, from, kindSSH, known, func(ctx context.Context, g *gate) error {
		cfg := sshchan.Config{Identity: sshchan.Identity{Key: h.signer, Cert: h.cfg.HostCert()}, Keepalive: h.cfg.Beat, DialTimeout: dialLimit, OnAlive: g.alive, Log: h.cfg.Log}
		return sshchan.ServeEach(ctx, c, cfg, func(p sshchan.Peer) (channel.Network, error) { return g.admit(p.User, p.Key) })
	})
}

// wire serves a wire of our own.
func (h *Hub) wire(ctx context.Context, c net.Conn, from netip.Addr, known func()) {
	h.open(ctx, c, from, kindTLS, known, func(ctx context.Context, g *gate) error {
		cfg := tlschan.Config{Identity: h.identity(), Beat: h.cfg.Beat, DialTimeout: dialLimit, OnAlive: g.alive}
		return tlschan.ServeEach(ctx, c, cfg, func(shown ssh.PublicKey) (channel.Network, error) { return g.admit("", shown) })
	})
}

// socks serves who shows no key, and may reach something all the same.
func (h *Hub) socks(ctx context.Context, c *peeked, from netip.Addr, known func()) {
	proxy.ServeSOCKS(ctx, c, numbered{h.anonymous(c, from), known}, proxy.Streams)
}

// numbered has those errors that SOCKS has numbers for (RFC 1928, 6).
type numbered struct {
	channel.Network
	known func() // it is known what is wanted
}

func (n numbered) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	n.known()
	c, err := n.Network.DialContext(ctx, network, address)
	var away *AwayError
	var offer *OfferError
	switch {
	case errors.As(err, &away):
		return nil, syscall.EHOSTUNREACH
	case errors.As(err, &offer):
		return nil, syscall.ECONNREFUSED
	}
	return c, err
}

// http answers one request: CONNECT, one for a certificate, or a question for health. It has
// what is left of the time of a stranger.
func (h *Hub) http(ctx context.Context, c *peeked, from netip.Addr, known func()) {
	var req *http.Request
	err := c.head()
	if err == nil {
		req, err = http.ReadRequest(c.First)
	}
	_ = c.SetDeadline(time.Time{})
	switch {
	case err != nil:
	case req.Method == http.MethodConnect:
		known()
		h.connect(ctx, c, req, from)
	case req.Method == http.MethodGet && req.URL.Path == "/healthz":
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n")
	case req.URL.Path == authorityPath, req.URL.Path == signPath:
		h.authority(ctx, c, req, from, known)
	default:
		say(c, http.StatusNotFound, "this is a hub: it takes SSH, CONNECT and SOCKS5")
	}
}

// connect answers when the host has. Clients show people the reason phrase at most, so
// all is said there, and in one write: corkscrew reads once.
func (h *Hub) connect(ctx context.Context, c *peeked, req *http.Request, from netip.Addr) {
	dial, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	far, err := h.anonymous(c, from).DialContext(dial, "tcp", req.Host)
	if err != nil {
		say(c, statusOf(err), err.Error())
		return
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		relay.Abort(far, err)
		return
	}
	relay.Carry(ctx, "tcp", c, far)
}

// say ends a connection with a status line.
func say(c net.Conn, status int, why string) {
	_, _ = fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", status, printable(why))
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, s)
}

// statusOf is what a dial met.
func statusOf(err error) int {
	var away *AwayError
	var offer *OfferError
	var busy *BusyError
	var refused *ca.RefusedError
	var silent *ca.UnavailableError
	switch {
	case errors.As(err, &busy), errors.As(err, &silent), errors.Is(err, errLeaving):
		return http.StatusServiceUnavailable
	case errors.As(err, &refused), errors.Is(err, syscall.EACCES):
		return http.StatusForbidden
	case errors.As(err, &away) && away.Seen.IsZero():
		return http.StatusNotFound
	case errors.As(err, &offer):
		return http.StatusNotFound
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return http.StatusGatewayTimeout
	}
	return http.StatusBadGateway
}
