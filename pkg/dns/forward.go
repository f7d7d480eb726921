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
// that comes back, since what is upstream asks us in turn (a dnsmasq that reads
// the resolv.conf we are in), waits for itself instead of going round. And since
// whoever asks what is being asked may be that server, the next one is asked
// then at once.
type upstream struct {
	servers func() []netip.AddrPort
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	flights singleflight.Group
	buffers sync.Pool

	mu    sync.Mutex
	own   []netip.AddrPort // where we listen: never asked
	asked map[dns.Question]*repeats
}

// A repeats tells of one question that it has come again.
type repeats struct {
	clients int
	again   chan struct{} // closed, and another made, each time
}

// A server that is silent gets company after nextServer, and may still answer
// until the patience of the client's own resolver is about to end.
const (
	mostTries        = 12
	upstreamPatience = 4800 * time.Millisecond
	nextServer       = 1500 * time.Millisecond
	nextRepeated     = 250 * time.Millisecond // where somebody has asked again meanwhile
)

var errNoUpstream = errors.New("no nameserver to ask")

func newUpstream(servers func() []netip.AddrPort, dial func(context.Context, string, string) (net.Conn, error)) *upstream {
	if servers == nil {
		servers = func() []netip.AddrPort { return nil }
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	u := &upstream{servers: servers, dial: dial, asked: map[dns.Question]*repeats{}}
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
	again, leave := u.enter(query)
	defer leave()
	got, err, _ := u.flights.Do(network+string(query[2:]), func() (any, error) { return u.race(ctx, network, query, again) })
	if err != nil {
		return nil, err
	}
	reply := bytes.Clone(got.([]byte))
	copy(reply, query[:2])
	return reply, nil
}

// enter tells all who are asking the same. again is what tells of the next one.
func (u *upstream) enter(query []byte) (again func() <-chan struct{}, leave func()) {
	q, _ := question(query) // or none, as all that cannot be read
	q.Name = lower(q.Name)  // some servers play with its case
	u.mu.Lock()
	defer u.mu.Unlock()
	r := u.asked[q]
	if r == nil {
		r = &repeats{again: make(chan struct{})}
		u.asked[q] = r
	} else {
		close(r.again)
		r.again = make(chan struct{})
	}
	r.clients++
	again = func() <-chan struct{} {
		u.mu.Lock()
		defer u.mu.Unlock()
		return r.again
	}
	return again, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if r.clients--; r.clients == 0 {
			delete(u.asked, q)
		}
	}
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
func (u *upstream) race(ctx context.Context, network string, query []byte, again func() <-chan struct{}) ([]byte, error) {
	servers := u.candidates()
	if len(servers) == 0 {
		return nil, errNoUpstream
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamPatience)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	tries := make(chan try, mostTries)
	started, pending := 0, 0
	more := func(rounds int) bool { return started < min(rounds*len(servers), mostTries) }
	start := func() {
		if now := u.candidates(); len(now) > 0 { // the machine may have moved meanwhile
			servers = now
		}
		server := servers[started%len(servers)]
		started, pending = started+1, pending+1
		running.Go(func() { tries <- u.one(ctx, network, server, query) })
	}
	repeated := again()
	start()
	silent, due := time.NewTimer(nextServer), time.Now().Add(nextServer)
	defer silent.Stop()
	first := try{err: context.DeadlineExceeded}
	for {
		select {
		case <-ctx.Done():
			return first.reply, first.err
		case <-repeated:
			repeated = again()
			if soon := time.Now().Add(nextRepeated); more(1) && soon.Before(due) {
				due = soon
				silent.Reset(nextRepeated)
			}
			continue
		case <-silent.C:
			if more(2) {
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
			if more(1) || pending == 0 && first.reply == nil && more(2) {
				start()
			} else if pending == 0 {
				return first.reply, first.err
			}
		}
		due = time.Now().Add(nextServer)
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
