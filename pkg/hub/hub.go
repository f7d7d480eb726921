// Package hub is where hosts that can only dial out are reached by name. It is one server
// of SSH, and of a wire of our own, over a Network whose addresses are hosts: to listen at
// "db-01:22" is to become db-01, and to dial it is to reach who has. So a stock client is a
// whole agent (ssh -NR db-01:22:localhost:22 hub) and a whole user (ssh -J hub db-01), and
// HTTP CONNECT and SOCKS5 are two more ways to dial.
//
// There is one port, whose first bytes decide, and none for a host. Who may do what is an
// authorized_keys file. A host that nobody knows yet is let in by an invitation, for which it
// gets a certificate: hubs keep nothing of either, for they share no store.
package hub

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
	"github.com/culvert-dev/culvert/pkg/relay"
	"github.com/culvert-dev/culvert/pkg/strangers"
)

// Config is what a hub needs to know.
type Config struct {
	HostKey crypto.Signer  // who the hub is, on every wire
	TLS     *tls.Config    // for what is behind TLS; nil: with the host key
	Rights  func() *Rights // as they are now

	CA       *ca.Authority           // makes certificates; nil: there are none
	Exchange *ca.Exchange            // gives them for ID tokens; nil: it does not
	HostCert func() *ssh.Certificate // of the host key, as it is now; nil: there is none, but see Names
	Names    []string                // that the hub is reached by: without a HostCert, the CA makes it one for them

	// Peers finds the other hubs, which have the same host key; nil: there are none. See
	// Addresses.
	Peers func(ctx context.Context) ([]string, error)

	// Advertise is where agents may dial this hub, and no other, HOST:PORT: the other hubs
	// tell it to theirs. Empty: they come by chance.
	Advertise string

	// Balancers may say who has come by them, by the PROXY protocol.
	Balancers []netip.Prefix

	// Beat is how often each end of a wire shows that it lives; after seven times of silence
	// it is dead. Zero means 6 s.
	Beat time.Duration

	Limits Limits
	Drain  time.Duration   // how long open connections have when Serve is to end
	Hurry  <-chan struct{} // ends that; may be nil

	Log   *slog.Logger
	Audit *slog.Logger // gets a line for each host and each connection, and for some refusals of strangers
}

// A Hub serves hosts, and those who reach them.
type Hub struct {
	cfg      Config
	signer   ssh.Signer // of the host key
	id       string     // of this run
	registry Registry
	peers    *peers
	control  memchan.Network // what Ask asks
	redeemed redeemed        // invitations
	began    time.Time
	hostFor  time.Duration // how long its certificates hold
	porch    strangers.Porch
	ledger   ledger
	drain    draining
	metrics  *metrics
	waiting  waiting
	refusals refusals
	loose    streams // of those without a wire

	mu     sync.Mutex
	visits map[*visit]func() // over wires, each with what takes it off its account; nil: it is on none
}

// New starts nothing.
func New(cfg Config) (*Hub, error) {
	signer, err := ssh.NewSignerFromKey(cfg.HostKey)
	if err != nil {
		return nil, fmt.Errorf("host key: %w", err)
	}
	if cfg.HostCert == nil {
		own := &ownCert{ca: cfg.CA, key: signer.PublicKey(), names: cfg.Names}
		if cfg.CA != nil && len(cfg.Names) > 0 {
			err = own.sign()
		}
		if cfg.HostCert = own.Now; err != nil {
			return nil, fmt.Errorf("certificate of the host key: %w", err)
		}
	}
	if cfg.TLS == nil {
		cfg.TLS = blank(cfg.HostKey, cfg.HostCert)
	}
	if cfg.Beat <= 0 {
		cfg.Beat = 6 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Audit == nil {
		cfg.Audit = slog.New(slog.DiscardHandler)
	}
	h := &Hub{cfg: cfg, signer: signer, id: rand.Text(), visits: map[*visit]func(){}, drain: newDraining(), began: time.Now(), hostFor: hostFor}
	h.porch.Most, h.ledger.limits, h.loose.ended = maxStrangers, cfg.Limits.withDefaults(), h.settle
	h.peers = &peers{hub: h, find: cfg.Peers, each: findEvery, claim: claimLimit, known: map[string]*peer{}}
	h.peers.blind.Store(cfg.Peers != nil)
	h.metrics = newMetrics(h)
	h.waiting.most = cfg.Limits.Waiting
	return h, nil
}

// maxStrangers is how many may be at it to show who they are.
const maxStrangers = 512

// enters is for who has shown that he has his key.
func (h *Hub) enters(v *visit) {
	var done func()
	g, err := v.who()
	if err == nil {
		done, err = h.ledger.wire(g.account())
	}
	h.mu.Lock()
	h.visits[v] = done
	h.mu.Unlock()
	if err != nil {
		if g == nil {
			g = &Guest{From: addrOf(v.from)}
		}
		h.auditStranger(g, "login", "", "").refused(err)
		v.end()
	} else {
		h.metrics.events.WithLabelValues("login", "admitted").Inc()
	}
	h.settle()
}

func (h *Hub) leaves(v *visit) {
	h.mu.Lock()
	done := h.visits[v]
	delete(h.visits, v)
	h.mu.Unlock()
	if done != nil {
		done()
	}
	h.settle()
}

// Recheck ends what is not permitted any more; it is called when rights have changed.
func (h *Hub) Recheck() {
	h.waiting.recheck() // first: hosts are to hear why, and not to hold what is lost
	for _, v := range h.visitors() {
		if err := v.recheck(); err != nil {
			h.cfg.Log.Warn("not let in any more", "from", v.from, "err", err)
		}
	}
}

// visitors are asked without the lock: what ends of theirs is told to who reads the audit log,
// and he may be slow.
func (h *Hub) visitors() []*visit {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.visits))
}

// recheckEvery is for what ends by time.
const recheckEvery = 10 * time.Second

func (h *Hub) recheckNow(ctx context.Context) error {
	t := time.NewTicker(recheckEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			h.Recheck()
		}
	}
}

// blank is for clients that know the key, or who has signed the certificate of SSH that is
// with it, or do not ask.
func blank(key crypto.Signer, cert func() *ssh.Certificate) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		own, err := tlschan.Identity{Key: key, Cert: cert()}.TLS()
		return &own, err
	}}
}

// Serve serves whoever ln accepts until ctx ends, and then what is open for as long as Drain
// says, or until ln fails for good. It closes ln, and returns when all that it served is gone.
func (h *Hub) Serve(ctx context.Context, ln net.Listener) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() {
		h.drain.begin()
		ln.Close()
		h.drainFor(h.cfg.Drain, h.cfg.Hurry)
		end()
	})()
	return h.serve(life, &drained{ln, h})
}

func (h *Hub) serve(ctx context.Context, ln net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return h.serveControl(ctx) })
	group.Go(func() error { return h.recheckNow(ctx) })
	group.Go(func() error { return h.tellRefusalsNow(ctx) })
	defer h.tellRefusals() // the last ones
	group.Go(func() error { h.waiting.watch(ctx, h.cfg.Log); return nil })
	begun := make(chan struct{})
	if h.peers.find == nil {
		close(begun)
	} else {
		looked := sync.OnceFunc(func() { close(begun) })
		group.Go(func() error {
			defer looked() // there may be no time to look
			h.peers.run(ctx, looked)
			return nil
		})
	}
	group.Go(func() error {
		<-begun // agents are told how many hubs there are
		return relay.Serve(ctx, ln, h.answer)
	})
	return group.Wait()
}

// dial reaches a host, here or at another hub.
func (h *Hub) dial(ctx context.Context, from net.Addr, network, name, port string) (net.Conn, error) {
	own := func(ctx context.Context) (net.Conn, error) { return h.registry.dial(ctx, from, network, name, port) }
	c, errs := race(ctx, peerTurn, append([]candidate{own}, h.peers.candidates(network, name, port)...))
	if c == nil {
		return nil, worst(errs)
	}
	return c, nil
}

// isElsewhere tells of an error that another hub may not have.
func isElsewhere(err error) bool {
	var away *AwayError
	var offer *OfferError
	return errors.As(err, &away) || errors.As(err, &offer)
}

// ParseKey reads a private key as ssh-keygen(1) writes it, without a passphrase.
func ParseKey(pem []byte) (crypto.Signer, error) {
	raw, err := ssh.ParseRawPrivateKey(pem)
	if err != nil {
		return nil, err
	}
	if k, ok := raw.(*ed25519.PrivateKey); ok {
		return *k, nil
	}
	key, ok := raw.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%T does not sign", raw)
	}
	return key, nil
}
