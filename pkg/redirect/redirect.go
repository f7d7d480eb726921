// Package redirect takes what comes for a port of this network namespace to
// another port of it, where somebody else has the port and must keep it: the
// shadow does so in a pod that it was added to, whose program goes on listening.
//
// It is a channel.Network: to listen for a port is to listen at a free one, and to
// lead there what comes from outside. What begins in the namespace itself is not
// led anywhere, so that the program is still reached, by a dial of its own address.
//
// The kernel does the leading, by rules that belong to a socket of this process
// (nftables' "flags owner", Linux 5.12): when the process ends, whatever ended it,
// the rules are gone with it, and the program is reached as before. Nobody else
// can change them meanwhile.
//
// There are two ends. Restore takes the rules away and leaves what the kernel
// needs to go on with connections that it has led; Close takes that away, too.
package redirect

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"sync"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A Network is one in which to listen takes the port from who has it.
type Network struct {
	channel.Network
	rules *rules

	mu       sync.Mutex
	taken    []port
	restored bool
}

// A port is one that is taken.
type port struct {
	network string // "tcp" or "udp"
	number  uint16
}

// Open makes an empty set of rules in this network namespace, for which it needs
// CAP_NET_ADMIN. Where there is no such thing it is errors.ErrUnsupported.
func Open(inner channel.Network) (*Network, error) {
	r, err := openRules()
	if err != nil {
		return nil, fmt.Errorf("open a table for redirects: %w", err)
	}
	return &Network{Network: inner, rules: r}, nil
}

// Listen takes what comes from outside for the port of address, until Restore.
// Connections that are open already stay where they are; flows of datagrams come.
func (n *Network) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	from, err := portOf(network, address)
	if err != nil {
		return nil, err
	}
	l, err := n.Network.Listen(ctx, network, ":0")
	if err != nil {
		return nil, err
	}
	to, err := portOf(network, l.Addr().String())
	if err == nil {
		err = n.take(from, to)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("redirect %s port %d: %w", network, from.number, err)
	}
	return l, nil
}

func (n *Network) take(from, to port) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.restored {
		return net.ErrClosed
	}
	if err := n.rules.add(from, to); err != nil {
		return err
	}
	n.taken = append(n.taken, from)
	n.rules.forget([]port{from}, true)
	return nil
}

// Restore takes nothing any more: what is new goes where it was meant to go, at
// once. Connections that came here before are not disturbed. It may be called
// more than once.
func (n *Network) Restore(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.restored {
		return nil
	}
	if err := n.rules.flush(); err != nil {
		return fmt.Errorf("take redirects away: %w", err)
	}
	n.restored = true
	n.rules.forget(n.taken, false)
	return nil
}

// Restored tells whether Restore was done.
func (n *Network) Restored() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.restored
}

// Close ends the redirects, and with them the connections that came by them.
func (n *Network) Close() error { return n.rules.close() }

func portOf(network, address string) (port, error) {
	_, text, err := net.SplitHostPort(address)
	if err != nil {
		return port{}, err
	}
	number, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return port{}, fmt.Errorf("port of %s: %w", address, err)
	}
	return port{network, uint16(number)}, nil
}
