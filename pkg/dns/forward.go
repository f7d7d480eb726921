package dns

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
)

// An upstream hands questions to the machine's own nameservers as the bytes
// they came in, and the answers back. Only the id is exchanged for a random one
// on the way. Nothing is cached: the machine did not have a cache there before.
//
// The same bytes in flight are asked once. That also ends a loop: a question
// that comes back, since what is upstream asks us in turn, waits for itself
// instead of going round.
type upstream struct {
	servers func() []netip.AddrPort
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	flights singleflight.Group
	buffers sync.Pool

	mu  sync.Mutex
	own []netip.AddrPort // where we listen: never asked
}

// A server that is silent gets company after nextServer, and may still answer
// until the patience of the client's own resolver is about to end.
const (
	upstreamPatience = 4800 * time.Millisecond
	nextServer       = 1500 * time.Millisecond
)

var errNoUpstream = errors.New("no nameserver to ask")

func newUpstream(servers func() []netip.AddrPort, dial func(context.Context, string, string) (net.Conn, error)) *upstream {
	if servers == nil {
		servers = func() []netip.AddrPort { return nil }
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	u := &upstream{servers: servers, dial: dial}
	u.buffers.New = func() any { return new([dns.MaxMsgSize]byte) }
	return u
}

// avoid names the addresses we listen on.
func (u *upstream) avoid(own ...netip.AddrPort) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.own = own
}

// candidates are the servers to ask, in order, without ourselves.
func (u *upstream) candidates() []netip.AddrPort {
	servers := slices.Clone(u.servers()) // not ours, so not under the lock
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.DeleteFunc(servers, func(a netip.AddrPort) bool {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		return slices.ContainsFunc(u.own, func(own netip.AddrPort) bool {
			return own == a || own.Port() == a.Port() && own.Addr().IsUnspecified() && a.Addr().IsLoopback()
		})
	})
}

// forward gives the reply to a query, with the id of that query.
func (u *upstream) forward(ctx context.Context, query []byte, tcp bool) ([]byte, error) {
	network := "udp"
	if tcp {
		network = "tcp"
	}
	got, err, _ := u.flights.Do(network+string(query[2:]), func() (any, error) { return u.race(ctx, network, query) })
	if err != nil {
		return nil, err
	}
	reply := bytes.Clone(got.([]byte))
	copy(reply, query[:2])
	return reply, nil
}

// A try is what came of asking one server.
type try struct {
	reply []byte
	err   error
}

// better are the rcodes for which a resolver asks the next server.
func (t try) better() bool {
	if t.err != nil {
		return true
	}
	rcode := int(t.reply[3] & 15)
	return rcode == dns.RcodeServerFailure || rcode == dns.RcodeRefused || rcode == dns.RcodeNotImplemented
}

// race asks the servers in order, twice round: the next one when the last has
// failed, or is silent for a while. The first good reply wins; if there is none,
// the first bad one is passed on as it is.
func (u *upstream) race(ctx context.Context, network string, query []byte) ([]byte, error) {
	servers := u.candidates()
	if len(servers) == 0 {
		return nil, errNoUpstream
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamPatience)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	tries := make(chan try, 2*len(servers))
	started, pending := 0, 0
	start := func() {
		server := servers[started%len(servers)]
		started, pending = started+1, pending+1
		running.Go(func() { tries <- u.one(ctx, network, server, query) })
	}
	start()
	silent := time.NewTimer(nextServer)
	defer silent.Stop()
	first := try{err: context.DeadlineExceeded}
	for {
		select {
		case <-ctx.Done():
			return first.reply, first.err
		case <-silent.C:
			if started < 2*len(servers) {
				start()
			}
		case t := <-tries:
			pending--
			if !t.better() {
				return t.reply, nil
			}
			if first.reply == nil {
				first = t
			}
			if started < len(servers) || pending == 0 && first.reply == nil && started < 2*len(servers) {
				start()
			} else if pending == 0 {
				return first.reply, first.err
			}
		}
		silent.Reset(nextServer)
	}
}

// one asks one server over a socket of its own, so that port and id are fresh.
func (u *upstream) one(ctx context.Context, network string, server netip.AddrPort, query []byte) try {
	conn, err := u.dial(ctx, network, server.String())
	if err != nil {
		return try{err: err}
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	var w wire = datagrams{}
	if network == "tcp" {
		w = frames{}
	}
	sent := bytes.Clone(query)
	id := rand.Uint32()
	sent[0], sent[1] = byte(id>>8), byte(id)
	if err := w.write(conn, sent); err != nil {
		return try{err: err}
	}
	buf := u.buffers.Get().(*[dns.MaxMsgSize]byte)
	defer u.buffers.Put(buf)
	for {
		n, err := w.read(conn, buf[:])
		if err != nil {
			return try{err: err}
		}
		if answers(buf[:n], sent) {
			return try{reply: bytes.Clone(buf[:n])}
		}
	}
}
