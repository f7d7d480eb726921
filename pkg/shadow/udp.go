package shadow

import (
	"context"
	"crypto/ecdh"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
)

// The way of WireGuard is opened when a laptop asks for it over the wire that it
// has: most never do, and a shadow that is not asked costs nothing. Each wire has a key
// of its own, since a key of WireGuard is at one place at a time.
type udp struct {
	number uint16 // of the port for TCP, which others have made a way to

	mu       sync.Mutex
	port     *wires.UDP
	peers    map[string]bool
	closed   bool
	admitted chan peer
}

const (
	// maxPeers bounds what a laptop that asks again and again can open.
	maxPeers = 16

	// peerSilence ends a peer: the next wire has another key.
	peerSilence = time.Minute
)

// A peer is who may come in by WireGuard.
type peer struct {
	Key     []byte       `json:"key"`               // of X25519, public
	From    []netip.Addr `json:"from,omitempty"`    // where its machine's packets come from
	Lasting bool         `json:"lasting,omitempty"` // it may be silent for as long as the shadow is there
}

func (p peer) key() (*ecdh.PublicKey, error) { return ecdh.X25519().NewPublicKey(p.Key) }

// Admit has the shadow at the other end of a channel let a key in by WireGuard, at the
// number of its port for TCP, for as long as something is heard. Packets from the
// addresses are its machine's.
func Admit(ctx context.Context, far channel.Network, key *ecdh.PublicKey, from []netip.Addr) error {
	return admit(ctx, far, peer{Key: key.Bytes(), From: from})
}

// AdmitClient has it let in a key for as long as the shadow is there.
func AdmitClient(ctx context.Context, far channel.Network, key *ecdh.PublicKey) error {
	return admit(ctx, far, peer{Key: key.Bytes(), Lasting: true})
}

func admit(ctx context.Context, far channel.Network, p peer) error {
	ctx, cancel := context.WithTimeout(ctx, controlLimit)
	defer cancel()
	if err := call(ctx, far, http.MethodPost, "/wireguard", p, nil); err != nil {
		return fmt.Errorf("ask shadow for WireGuard: %w", err)
	}
	return nil
}

func (s *Shadow) admit(keys wires.Keys) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var p peer
		err := json.NewDecoder(r.Body).Decode(&p)
		if err == nil {
			_, err = p.key()
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		isNew, err := s.udp.add(p, func() (*wires.UDP, error) {
			s.cfg.Log.Info("wireguard opened", "port", s.udp.number)
			return wires.ListenUDP(s.udp.number, wires.Config{Keys: keys, Log: s.cfg.Log})
		})
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		if !isNew {
			return
		}
		select {
		case s.udp.admitted <- p:
		case <-r.Context().Done():
			s.udp.remove(p)
		}
	}
}

// add notes a peer, and tells whether it is new.
func (u *udp) add(p peer, listen func() (*wires.UDP, error)) (isNew bool, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.closed:
		return false, net.ErrClosed
	case u.peers[string(p.Key)]:
		return false, nil
	case len(u.peers) >= maxPeers:
		return false, fmt.Errorf("%d keys are let in already", maxPeers)
	case u.port == nil:
		if u.port, err = listen(); err != nil {
			return false, err
		}
	}
	u.peers[string(p.Key)] = true
	return true, nil
}

func (u *udp) remove(p peer) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.peers, string(p.Key))
}

// close lets the port go, and has none opened any more.
func (u *udp) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	if u.port != nil {
		u.port.Close()
	}
}

// clients is what others than laptops reach: all but the shadow itself.
type clients struct{ channel.Network }

func (c clients) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if address == ControlAddress {
		return nil, fmt.Errorf("%s: %w", address, syscall.EACCES)
	}
	return c.Network.DialContext(ctx, network, address)
}

func (clients) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, syscall.EACCES
}

// serveUDP serves who was let in, until ctx ends.
func (s *Shadow) serveUDP(ctx context.Context) error {
	defer s.udp.close()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case p := <-s.udp.admitted:
			all.Go(func() {
				defer s.udp.remove(p)
				if err := s.servePeer(ctx, p); err != nil && !errors.Is(err, net.ErrClosed) {
					s.cfg.Log.Warn("wireguard failed", "err", err)
				}
			})
		}
	}
}

func (s *Shadow) servePeer(ctx context.Context, p peer) error {
	key, err := p.key()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	heard := newPulse()
	if !p.Lasting {
		var waiting sync.WaitGroup
		defer waiting.Wait()
		defer cancel()
		waiting.Go(func() {
			heard.stops(ctx, min(s.cfg.Grace, peerSilence))
			cancel()
		})
	}
	var known sync.Once
	alive := func() {
		heard.beat()
		s.heard()
		known.Do(func() { s.door.wires.Add(1) })
	}
	var network channel.Network = s.network
	if p.Lasting {
		network = clients{network}
	}
	err = s.udp.port.Serve(ctx, key, p.From, alive, network)
	known.Do(func() { s.door.wires.Add(1) })
	s.door.wires.Add(-1)
	return err
}
