package hub

import (
	"fmt"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Limits bound what one key may use, of all of a hub; and, of who shows none, one address.
type Limits struct {
	Wires   int     // zero means 1,024: a deploy has one for each host
	Ports   int     // that it is as a host, or as several; zero means 4,096
	Streams int     // open at a time; zero means 4,096
	Share   int     // of those to one host; zero means 1,024
	Dials   float64 // a second, twice as many at once; zero means 200

	Host    int   // connections to one host, of all who come to it here; zero means 4,096
	Waiting int64 // bytes that wait for who reads slowly, of all; zero means half of GOMEMLIMIT, or 1 GiB
}

func (l Limits) withDefaults() Limits {
	if l.Wires <= 0 {
		l.Wires = 1024
	}
	if l.Ports <= 0 {
		l.Ports = 4096
	}
	if l.Streams <= 0 {
		l.Streams = 4096
	}
	if l.Dials <= 0 {
		l.Dials = 200
	}
	if l.Share <= 0 {
		l.Share = 1024
	}
	if l.Host <= 0 {
		l.Host = 4096
	}
	return l
}

// A BusyError says that somebody uses as much as he may.
type BusyError struct{ What string }

func (e *BusyError) Error() string { return "too many " + e.What + ", try again later" }

// ledger is what is used, by whom.
type ledger struct {
	limits Limits
	mu     sync.Mutex
	all    map[string]*usage
	hosts  map[string]int // connections
	swept  time.Time
}

type usage struct {
	wires, streams, ports int

	to    map[string]int // of the streams
	dials *rate.Limiter
	idle  time.Time // since when nothing is used
}

// of is somebody's, with the lock held. Who was idle for long is forgotten.
func (l *ledger) of(who string) *usage {
	if l.all == nil {
		l.all = map[string]*usage{}
	}
	u := l.all[who]
	if u == nil {
		if now := time.Now(); now.Sub(l.swept) > time.Minute {
			maps.DeleteFunc(l.all, func(_ string, u *usage) bool { return u.wires+u.streams+u.ports == 0 && now.Sub(u.idle) > time.Minute })
			l.swept = now
		}
		u = &usage{to: map[string]int{}, dials: rate.NewLimiter(rate.Limit(l.limits.Dials), int(2*l.limits.Dials))}
		l.all[who] = u
	}
	return u
}

// wire and port are asked before somebody has one more; done is for when he has not any more,
// or never had.
func (l *ledger) wire(who string) (done func(), err error) {
	return l.one(who, "wires", func(u *usage) *int { return &u.wires }, l.limits.Wires)
}

func (l *ledger) port(who string) (done func(), err error) {
	return l.one(who, "ports", func(u *usage) *int { return &u.ports }, l.limits.Ports)
}

func (l *ledger) one(who, what string, of func(*usage) *int, most int) (done func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.of(who)
	n := of(u)
	if *n >= most {
		return nil, &BusyError{fmt.Sprintf("%s of one key (%d)", what, *n)}
	}
	*n++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		*n--
		u.idle = time.Now()
	}), nil
}

// stream is asked before each dial of a host; done is for when the connection has ended, or
// never was.
func (l *ledger) stream(who, host string) (done func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.of(who)
	switch {
	case u.streams >= l.limits.Streams:
		return nil, &BusyError{fmt.Sprintf("open connections of one key (%d)", u.streams)}
	case u.to[host] >= l.limits.Share:
		return nil, &BusyError{fmt.Sprintf("open connections of one key to one host (%d)", u.to[host])}
	case !u.dials.Allow():
		return nil, &BusyError{"dials a second"}
	}
	u.streams++
	u.to[host]++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		u.streams--
		take(u.to, host)
		u.idle = time.Now()
	}), nil
}

// host is asked before a host is given a connection.
func (l *ledger) host(name string) (done func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hosts[name] >= l.limits.Host {
		return nil, &BusyError{fmt.Sprintf("open connections to %s (%d)", name, l.hosts[name])}
	}
	if l.hosts == nil {
		l.hosts = map[string]int{}
	}
	l.hosts[name]++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		take(l.hosts, name)
	}), nil
}

// take takes one away, and what is nothing then.
func take(from map[string]int, name string) {
	if from[name]--; from[name] == 0 {
		delete(from, name)
	}
}

// streams counts what is open of one wire, and tells when there is nothing left.
type streams struct {
	open  atomic.Int64
	ended func()
}

func (s *streams) begin() (end func()) {
	s.open.Add(1)
	return sync.OnceFunc(func() {
		s.open.Add(-1)
		s.ended()
	})
}

// counting counts what a host takes.
type counting struct {
	net.Listener
	v             *visit
	name, account string
	resumes       bool // streams go on there
}

func (l *counting) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if channel.Words(c.RemoteAddr()) != "" && !l.resumes {
			relay.Abort(c, errPlain) // which answers who dials, as below
			continue
		}
		done, err := l.v.hub.ledger.host(l.name)
		if err == nil {
			return l.count(c, done), nil
		}
		relay.Abort(c, err) // which answers who dials
	}
}

func (l *counting) count(c net.Conn, done func()) net.Conn {
	ended, w := l.v.streams.begin(), l.v.wait(l.account)
	one := &counted{Conn: c, wait: w, over: sync.OnceFunc(func() { ended(); done(); w.end() })}
	w.begin(one)
	if p, ok := c.(channel.Pending); ok {
		return &countedPending{one, p}
	}
	return one
}

// countedPending is one that waits to be answered.
type countedPending struct {
	*counted
	pending channel.Pending
}

func (c *countedPending) Answer(err error) error {
	if err != nil {
		defer c.over()
	}
	return c.pending.Answer(err)
}
