package shadow

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A headless Service has no address of its own: its name leads to the router's. When
// it is put back, clients and caches that asked before still have that one, for as
// long as they were told that it holds. A router that ends earlier refuses them, so
// it lingers, and leads them to the original.
const (
	askEvery   = 10 * time.Second
	askLimit   = 2 * time.Second
	untold     = 30 * time.Second // what most clusters say, where nobody can be asked
	longestTTL = time.Minute

	// hearsay comes on top: DNS hears late that the Service is put back, and a cache
	// on the way may round the last seconds up.
	hearsay = 5 * time.Second
)

// remembered is how long others remember the router's address.
type remembered struct {
	mu   sync.Mutex
	told bool
	ttl  time.Duration
}

// hear notes an answer. A cache tells what is left of the time, so that of several
// answers the longest is nearest to the truth.
func (r *remembered) hear(ttl time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told, r.ttl = true, min(max(ttl, r.ttl), longestTTL)
}

func (r *remembered) time() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.told {
		return untold + hearsay
	}
	return r.ttl + hearsay
}

// linger is how long the router goes on after its Service was put back.
func (s *Shadow) linger() time.Duration {
	if s.cfg.TTL == nil {
		return 0
	}
	return s.names.time()
}

// askNames asks every so often, until ctx ends.
func (s *Shadow) askNames(ctx context.Context) error {
	for {
		if ttl, err := s.cfg.TTL(ctx); err == nil {
			s.names.hear(ttl)
		}
		if !pause(ctx, askEvery) {
			return nil
		}
	}
}

// TTLOf asks the cluster's DNS, as the pod knows it, how long the addresses hold that
// a name of the pod's own namespace leads to.
func TTLOf(name string) func(context.Context) (time.Duration, error) {
	conf := readResolvConf("/etc/resolv.conf")
	return func(ctx context.Context) (time.Duration, error) { return askTTL(ctx, &channel.Host{}, conf, name) }
}

func askTTL(ctx context.Context, network channel.Network, conf ResolvConf, name string) (ttl time.Duration, err error) {
	if len(conf.Nameservers) == 0 || len(conf.Search) == 0 {
		return 0, errors.New("ask for a TTL: the pod has no nameserver, or no domain")
	}
	full, err := dnsmessage.NewName(name + "." + strings.Trim(conf.Search[0], ".") + ".")
	if err != nil {
		return 0, fmt.Errorf("ask for the TTL of %s: %w", name, err)
	}
	server := netip.AddrPortFrom(conf.Nameservers[0], 53).String()
	for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
		q := dnsmessage.Question{Name: full, Type: kind, Class: dnsmessage.ClassINET}
		if ttl, err = askOneTTL(ctx, network, server, q); err == nil {
			return ttl, nil
		}
	}
	return 0, fmt.Errorf("ask %s for the TTL of %s: %w", server, full, err)
}

// askOneTTL disables checking, which nothing is checked by here: others do not ask so, and
// what they were answered is kept apart from what we are. So the first answer is no
// cache's.
func askOneTTL(ctx context.Context, network channel.Network, server string, q dnsmessage.Question) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	c, err := network.DialContext(ctx, "udp", server)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	ask := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: uint16(rand.Uint32()), RecursionDesired: true, CheckingDisabled: true},
		Questions: []dnsmessage.Question{q},
	}
	raw, err := ask.Pack()
	if err != nil {
		return 0, err
	}
	if _, err := c.Write(raw); err != nil {
		return 0, err
	}
	for buf := make([]byte, 64<<10); ; {
		n, err := c.Read(buf)
		if err != nil {
			return 0, err
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) == nil && m.Response && m.ID == ask.ID {
			return longest(m, q.Type)
		}
	}
}

// longest is the TTL of the answers of a type; that there is none is an error.
func longest(m dnsmessage.Message, kind dnsmessage.Type) (ttl time.Duration, err error) {
	err = fmt.Errorf("no answer, %s", m.RCode)
	for _, a := range m.Answers {
		if a.Header.Type == kind {
			ttl, err = max(ttl, time.Duration(a.Header.TTL)*time.Second), nil
		}
	}
	return ttl, err
}
