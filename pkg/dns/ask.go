package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
)

// A cluster asks the cluster's own DNS, through the channel. It prefers TCP,
// for its answers need not be cut, and keeps a few connections for the next
// question: over a channel a dial costs as much as an answer. CoreDNS answers
// what comes on one connection in turn, so each has one question at a time.
type cluster struct {
	network channel.Network
	server  netip.AddrPort
	reached func() error
	log     *slog.Logger
	cache   cache
	flights singleflight.Group
	silent  atomic.Bool // said once that it does not answer

	mu   sync.Mutex
	idle []net.Conn
	over bool
}

// clusterPatience ends before that of a stub resolver, 5 s, so that it hears
// SERVFAIL instead of nothing.
const (
	clusterPatience = 4 * time.Second
	tcpPatience     = 2 * time.Second
	idleConns       = 4
)

var errNoCluster = errors.New("the cluster's DNS is not known")

func newCluster(network channel.Network, server netip.AddrPort, log *slog.Logger) *cluster {
	return &cluster{network: network, server: server, reached: func() error { return nil }, log: log}
}

// ask gives the cluster's answer, which is not to be changed. Its rcode is
// NOERROR or NXDOMAIN; all else is an error.
func (c *cluster) ask(ctx context.Context, name string, qtype uint16) (*dns.Msg, error) {
	if c.network == nil || !c.server.IsValid() {
		return nil, errNoCluster
	}
	k := cacheKey{lower(name), qtype}
	if m := c.cache.get(k, time.Now()); m != nil {
		return m, nil
	}
	if err := c.reached(); err != nil {
		c.say(ctx, err)
		return nil, err
	}
	got, err, _ := c.flights.Do(fmt.Sprint(k.qtype, " ", k.name), func() (any, error) { return c.fetch(ctx, k) })
	c.say(ctx, err)
	if err != nil {
		return nil, err
	}
	return got.(*dns.Msg), nil
}

// Lookup asks the cluster's DNS for the addresses of a name, as a Server asks it for
// what its Zone may not know, and tells why there is no answer.
func Lookup(ctx context.Context, network channel.Network, server netip.AddrPort, name string) ([]netip.Addr, error) {
	c := newCluster(network, server, slog.New(slog.DiscardHandler))
	c.open()
	defer c.close()
	var addrs []netip.Addr
	for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
		m, err := c.ask(ctx, fqdn(name), kind)
		if err != nil {
			return nil, err
		}
		for _, rr := range m.Answer {
			if a, ok := address(rr); ok && !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("the cluster's DNS %s knows no address of %s", server, name)
	}
	return addrs, nil
}

// address is that of a record of one.
func address(rr dns.RR) (a netip.Addr, ok bool) {
	switch rr := rr.(type) {
	case *dns.A:
		a, ok = netip.AddrFromSlice(rr.A)
	case *dns.AAAA:
		a, ok = netip.AddrFromSlice(rr.AAAA)
	}
	return a.Unmap(), ok
}

func (c *cluster) fetch(ctx context.Context, k cacheKey) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, clusterPatience)
	defer cancel()
	q := new(dns.Msg)
	q.SetQuestion(k.name, k.qtype)
	q.Id = uint16(rand.Uint32())
	m, err := c.exchange(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("ask the cluster's DNS %s: %w", c.server, err)
	}
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return nil, fmt.Errorf("ask the cluster's DNS %s: %s", c.server, dns.RcodeToString[m.Rcode])
	}
	c.cache.put(k, m, time.Now())
	return m, nil
}

// say tells of the first failure, and of the end of a row of them.
func (c *cluster) say(ctx context.Context, err error) {
	switch {
	case err != nil && ctx.Err() == nil && c.silent.CompareAndSwap(false, true):
		c.log.Warn("cluster DNS does not answer", "server", c.server, "err", err)
	case err == nil && c.silent.CompareAndSwap(true, false):
		c.log.Info("cluster DNS answers again", "server", c.server)
	}
}

// exchange tries a kept connection, then a new one, then UDP where TCP cannot
// be had.
func (c *cluster) exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
	for conn := c.take(); conn != nil; conn = c.take() {
		if m, err := c.converse(ctx, conn, q); err == nil || ctx.Err() != nil {
			return m, err
		}
	}
	conn, err := c.dialTCP(ctx)
	if err == nil {
		return c.converse(ctx, conn, q)
	}
	if errors.Is(err, net.ErrClosed) {
		return nil, err
	}
	conn, udpErr := c.network.DialContext(ctx, "udp", c.server.String())
	if udpErr != nil {
		return nil, err
	}
	defer conn.Close()
	return talk(ctx, conn, q, datagrams{})
}

func (c *cluster) dialTCP(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, tcpPatience)
	defer cancel()
	return c.network.DialContext(ctx, "tcp", c.server.String())
}

// converse asks over TCP, and keeps the connection if that went well.
func (c *cluster) converse(ctx context.Context, conn net.Conn, q *dns.Msg) (*dns.Msg, error) {
	m, err := talk(ctx, conn, q, frames{})
	if err != nil {
		conn.Close()
		return nil, err
	}
	c.keep(conn)
	return m, nil
}

func (c *cluster) take() net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.idle) == 0 {
		return nil
	}
	last := len(c.idle) - 1
	conn := c.idle[last]
	c.idle = c.idle[:last]
	return conn
}

// keep and close do not hold the lock while they close: over a wire that is in
// trouble that may take its time, and all questions would wait.
func (c *cluster) keep(conn net.Conn) {
	if !c.put(conn) {
		conn.Close()
	}
}

func (c *cluster) put(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || len(c.idle) == idleConns {
		return false
	}
	c.idle = append(c.idle, conn)
	return true
}

// open and close are the start and end of a Run.
func (c *cluster) open() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = false
}

func (c *cluster) close() {
	c.mu.Lock()
	idle := c.idle
	c.over, c.idle = true, nil
	c.mu.Unlock()
	for _, conn := range idle {
		conn.Close()
	}
}

// talk asks one question on a connection. When ctx ends the connection is no
// more good.
func talk(ctx context.Context, conn net.Conn, q *dns.Msg, wire wire) (*dns.Msg, error) {
	defer interrupt(ctx, conn)()
	raw, err := q.Pack()
	if err != nil {
		return nil, err
	}
	if err := wire.write(conn, raw); err != nil {
		return nil, err
	}
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, err := wire.read(conn, buf)
		if err != nil {
			return nil, err
		}
		if !answers(buf[:n], raw) {
			continue
		}
		m := new(dns.Msg)
		return m, m.Unpack(buf[:n])
	}
}

// interrupt makes reads and writes fail once ctx ends; the func it returns
// takes that back.
func interrupt(ctx context.Context, conn net.Conn) (stop func()) {
	ended := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		conn.SetDeadline(time.Unix(1, 0))
		close(ended)
	})
	return func() {
		if !unhook() {
			<-ended
		}
	}
}

// A wire tells messages apart: one in each datagram, or behind its length.
type wire interface {
	write(w io.Writer, message []byte) error
	read(r io.Reader, buf []byte) (int, error)
}

type datagrams struct{}

func (datagrams) write(w io.Writer, message []byte) error { _, err := w.Write(message); return err }
func (datagrams) read(r io.Reader, buf []byte) (int, error) {
	return r.Read(buf)
}

type frames struct{}

func (frames) write(w io.Writer, message []byte) error {
	if len(message) > dns.MaxMsgSize {
		return fmt.Errorf("message of %d bytes", len(message))
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

func (frames) read(r io.Reader, buf []byte) (int, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return 0, err
	}
	return io.ReadFull(r, buf[:binary.BigEndian.Uint16(length[:])])
}

// answers tells whether a message is the reply to a question that was sent: the
// id, and the question in any case of letters. A server that could not read the
// question may leave it out.
func answers(reply, sent []byte) bool {
	if len(reply) < headerSize || reply[0] != sent[0] || reply[1] != sent[1] || reply[2]&0x80 == 0 {
		return false
	}
	if binary.BigEndian.Uint16(reply[4:]) == 0 {
		rcode := int(reply[3] & 15)
		return rcode != dns.RcodeSuccess && rcode != dns.RcodeNameError
	}
	asked, err := question(sent)
	if err != nil {
		return false
	}
	got, err := question(reply)
	return err == nil && got.Qtype == asked.Qtype && got.Qclass == asked.Qclass && strings.EqualFold(got.Name, asked.Name)
}

const (
	headerSize   = 12
	longestLabel = 63
)

var errQuestion = errors.New("not one question")

// question reads the one question of a message, whatever the rest of it is.
func question(raw []byte) (dns.Question, error) {
	q, _, err := readQuestion(raw)
	return q, err
}

// readQuestion tells also where the question ends. A name in it cannot lead elsewhere:
// before it is only the header, which is another in the reply.
func readQuestion(raw []byte) (dns.Question, int, error) {
	if len(raw) < headerSize || binary.BigEndian.Uint16(raw[4:]) != 1 {
		return dns.Question{}, 0, errQuestion
	}
	for at := headerSize; at < len(raw) && raw[at] != 0; at += 1 + int(raw[at]) {
		if raw[at] > longestLabel {
			return dns.Question{}, 0, errQuestion
		}
	}
	name, off, err := dns.UnpackDomainName(raw, headerSize)
	if err != nil {
		return dns.Question{}, 0, err
	}
	if len(raw) < off+4 {
		return dns.Question{}, 0, errQuestion
	}
	qtype, qclass := binary.BigEndian.Uint16(raw[off:]), binary.BigEndian.Uint16(raw[off+2:])
	return dns.Question{Name: name, Qtype: qtype, Qclass: qclass}, off + 4, nil
}
