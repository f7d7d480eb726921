package sshchan

import (
	"context"
	"net"
	"strconv"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Serve is the far end: it opens network up to whoever shows the right key on
// conn, which it takes over. It returns when the wire is gone and everything
// that ran for it has ended: net.ErrClosed after ctx, else the wire's error.
func Serve(ctx context.Context, conn net.Conn, cfg Config, network channel.Network) error {
	return ServeEach(ctx, conn, cfg, func(p Peer) (channel.Network, error) { return network, cfg.check(p.Key) })
}

// Admit says what is open to a peer, or why nothing is. It may be asked of several keys of
// one peer, some of which it turns out not to have.
type Admit func(Peer) (channel.Network, error)

// ServeEach is Serve where not everybody is let into the same Network.
func ServeEach(ctx context.Context, conn net.Conn, cfg Config, admit Admit) error {
	cfg = cfg.withDefaults()
	sc, err := cfg.server(admit)
	if err != nil {
		conn.Close()
		return err
	}
	var network channel.Network
	shake := func(conn net.Conn) (ssh.Conn, <-chan ssh.NewChannel, <-chan *ssh.Request, error) {
		c, chans, reqs, err := ssh.NewServerConn(conn, sc)
		if err != nil {
			return nil, nil, nil, err
		}
		network = c.Permissions.ExtraData[theirs{}].(channel.Network)
		return c, chans, reqs, nil
	}
	w, err := handshake(ctx, conn, cfg, shake, ssh.Conn.ClientVersion, func(w *wire) handler {
		return &server{w: w, network: network, listeners: make(map[bound]net.Listener)}
	})
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { w.Close() })()
	return w.Wait()
}

// server is the far end of one wire.
type server struct {
	w       *wire
	network channel.Network

	mu        sync.Mutex
	listeners map[bound]net.Listener
}

// open dials for the other end, and only then says yes.
func (s *server) open(nc ssh.NewChannel) {
	if kind := nc.ChannelType(); kind != directTCP && kind != directDatagram {
		nc.Reject(ssh.UnknownChannelType, "unknown channel type "+kind)
		return
	}
	network, t, err := parsePayload(nc.ChannelType(), nc.ExtraData())
	if err != nil {
		nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	far, err := s.dial(network, t.address(network))
	if err != nil {
		nc.Reject(reason(err), wiring.Say(err))
		return
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		relay.Abort(far, err)
		return
	}
	origin := wiring.ParseAddr(network, net.JoinHostPort(t.OriginHost, strconv.Itoa(int(t.OriginPort))))
	wiring.Join(s.w.Context(), network, newConn(s.w, ch, reqs, network, far.RemoteAddr(), origin), far, s.w.cfg.Idle)
}

// dial ends with the wire.
func (s *server) dial(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.w.Context(), s.w.cfg.DialTimeout)
	defer cancel()
	return s.network.DialContext(ctx, network, address)
}

// request does what a global request asks for.
func (s *server) request(r *ssh.Request) {
	switch r.Type {
	case forwardTCP, forwardDatagram:
		port, err := s.listen(r)
		if err != nil {
			r.Reply(false, s.why(err))
			return
		}
		r.Reply(true, port)
	case cancelTCP, cancelDatagram:
		r.Reply(s.cancel(r), nil)
	default:
		r.Reply(false, nil)
	}
}

// why is the payload of a refusal, which RFC 4254 does not know.
func (s *server) why(err error) []byte {
	if !s.w.ours {
		return nil
	}
	return []byte(wiring.Say(err))
}

// parseForward reads the request for a listener, or its cancellation.
func parseForward(r *ssh.Request) (bound, error) {
	if r.Type == forwardTCP || r.Type == cancelTCP {
		var m forwardRequest
		err := ssh.Unmarshal(r.Payload, &m)
		return bound{"tcp", m.Host, m.Port}, err
	}
	var m dgramForward
	err := ssh.Unmarshal(r.Payload, &m)
	if err == nil && m.Network != "udp" {
		err = net.UnknownNetworkError(m.Network)
	}
	return bound{m.Network, m.Host, m.Port}, err
}

// listen listens for the other end and gives the payload of the answer.
func (s *server) listen(r *ssh.Request) ([]byte, error) {
	b, err := parseForward(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.w.Context(), s.w.cfg.DialTimeout)
	defer cancel()
	address := target{Host: b.host, Port: b.port}.address(b.network)
	ln, err := s.network.Listen(ctx, b.network, address)
	if err != nil {
		return nil, err
	}
	var reply []byte
	if b.port == 0 {
		b.port = portOf(ln.Addr())
		reply = ssh.Marshal(forwardReply{b.port})
	}
	s.mu.Lock()
	s.listeners[b] = ln
	s.mu.Unlock()
	s.w.Spawn(func() { s.accept(b, ln) })
	return reply, nil
}

func portOf(a net.Addr) uint32 {
	_, service, _ := net.SplitHostPort(a.String())
	port, _ := strconv.ParseUint(service, 10, 16)
	return uint32(port)
}

func (s *server) cancel(r *ssh.Request) bool {
	b, err := parseForward(r)
	if err != nil {
		return false
	}
	s.mu.Lock()
	ln := s.listeners[b]
	delete(s.listeners, b)
	s.mu.Unlock()
	if ln == nil {
		return false
	}
	ln.Close()
	return true
}

// accept hands over what a listener accepts until it is closed, or the wire is.
func (s *server) accept(b bound, ln net.Listener) {
	defer ln.Close()
	defer context.AfterFunc(s.w.Context(), func() { ln.Close() })()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s.w.Spawn(func() { s.forward(b, c) })
	}
}

// forward opens a channel to the other end for a connection from the network.
// One that still waits for its answer gets that of the other end.
func (s *server) forward(b bound, far net.Conn) {
	kind := forwardedTCP
	if b.network != "tcp" {
		kind = forwardedDgram
	}
	t := target{Host: b.host, Port: b.port, OriginPort: portOf(far.RemoteAddr())}
	t.OriginHost, _, _ = net.SplitHostPort(far.RemoteAddr().String())
	ch, reqs, err := s.w.conn.OpenChannel(kind, t.payload(b.network))
	if err != nil {
		wiring.Refuse(far, s.w.notOpened(err, ""))
		return
	}
	near := newConn(s.w, ch, reqs, b.network, far.LocalAddr(), far.RemoteAddr())
	wiring.Hand(s.w.Context(), b.network, near, far, s.w.cfg.Idle)
}
