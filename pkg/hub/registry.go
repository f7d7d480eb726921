package hub

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
)

// A Registry is the hosts that are attached to one hub. A host is there exactly for as long
// as somebody listens under its name; that somebody's key owns it meanwhile. Who has the key
// and listens again takes the port over at once: his old wire may be dead, and not be known
// to be.
type Registry struct {
	memory memchan.Network

	mu     sync.Mutex
	hosts  map[string]*host
	absent int               // of them
	claims map[string]*claim // by name, while other hubs are asked
}

type host struct {
	key   string
	ports map[string]int // by network and port, how many listen; none left: it is away
	since time.Time      // when it came
	seen  time.Time      // when it went
}

// maxAway bounds how many that are away are remembered, which is for people to read.
const maxAway = 10_000

// A TakenError says that a name is another key's now.
type TakenError struct{ Host string }

func (e *TakenError) Error() string { return fmt.Sprintf("%s is attached with another key", e.Host) }

// An AwayError says that a host is not there.
type AwayError struct {
	Host string
	Seen time.Time // zero: never
}

func (e *AwayError) Error() string {
	if e.Seen.IsZero() {
		return e.Host + " is not attached"
	}
	return fmt.Sprintf("%s is offline, last seen %v ago", e.Host, time.Since(e.Seen).Round(time.Second))
}

// An OfferError says that a host is there, and does not offer what was asked for.
type OfferError struct{ Host, Port string }

func (e *OfferError) Error() string { return fmt.Sprintf("%s does not offer port %s", e.Host, e.Port) }

func portKey(network, port string) string { return network + "/" + port }

func (r *Registry) listen(ctx context.Context, key, network, name, port string) (net.Listener, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, c := r.hosts[name], r.claims[name]
	switch {
	case h != nil && len(h.ports) > 0 && h.key != key, c != nil && (c.key != key || c.lost):
		return nil, &TakenError{name}
	case h == nil:
		h = &host{}
	}
	l, err := r.memory.Listen(ctx, network, net.JoinHostPort(name, port))
	if err != nil {
		return nil, err
	}
	if r.hosts == nil {
		r.hosts = map[string]*host{}
	}
	if len(h.ports) == 0 {
		if !h.seen.IsZero() {
			r.absent--
		}
		h.key, h.ports, h.since = key, map[string]int{}, time.Now()
	}
	r.hosts[name] = h
	h.ports[portKey(network, port)]++
	return &offer{Listener: l, gone: sync.OnceFunc(func() { r.gone(name, h, portKey(network, port)) })}, nil
}

// An offer is one port of a host.
type offer struct {
	net.Listener
	gone func()
}

func (o *offer) Close() error {
	o.gone()
	return o.Listener.Close()
}

func (r *Registry) gone(name string, h *host, port string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h.ports[port]--; h.ports[port] > 0 {
		return
	}
	if delete(h.ports, port); len(h.ports) > 0 {
		return
	}
	h.seen = time.Now()
	if r.absent++; r.absent > maxAway {
		maps.DeleteFunc(r.hosts, func(_ string, h *host) bool { return len(h.ports) == 0 })
		r.absent = 0
	}
}

// count is how many hosts are attached.
func (r *Registry) count() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hosts {
		if len(h.ports) > 0 {
			n++
		}
	}
	return n
}

// missing says why nobody listens there.
func (r *Registry) missing(network, name, port string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch h := r.hosts[name]; {
	case h == nil:
		return &AwayError{Host: name}
	case len(h.ports) == 0:
		return &AwayError{name, h.seen}
	case h.ports[portKey(network, port)] == 0:
		return &OfferError{name, port}
	}
	return nil
}

const wiresTried = 3 // of one host: a dead one is found out by a dial

// dial reaches a port of a host, which has taken the connection then. It hears where that is
// from, and the words of the network.
func (r *Registry) dial(ctx context.Context, from net.Addr, network, name, port string) (c net.Conn, err error) {
	network, words := channel.CutWords(network)
	ctx = memchan.From(ctx, channel.WithWords(from, words))
	for range wiresTried {
		if err := r.missing(network, name, port); err != nil {
			return nil, err
		}
		c, err = r.memory.DialContext(ctx, network, net.JoinHostPort(name, port))
		if err == nil || !errors.Is(err, net.ErrClosed) && !errors.Is(err, memchan.ErrNobody) && !errors.Is(err, syscall.ECONNRESET) {
			break
		}
	}
	return c, err
}
