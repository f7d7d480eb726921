// Package proxy lets programs that know of proxies into a Network: those that speak SOCKS5
// (RFC 1928), for TCP and UDP, and those that speak HTTP, to tunnel by CONNECT (RFC 9110,
// section 9.3.6) or to have requests made for them.
//
// Either passes on the host that the program asks for as it is, name or address: whose it
// is, where a name is resolved and what may be reached is all for the Network to say. So a
// program is to leave names alone, as with socks5h in its proxy's URL.
//
// What SOCKS has beside that is not here. BIND, for the active mode of FTP, would listen in
// the Network for one connection from anybody. SOCKS4 has no IPv6, and no names but by an
// extension. Nobody is asked for a password: who may connect is who may come to the
// address that is listened at.
//
// The libraries there are for SOCKS either carry no UDP, or cannot be had at a version
// that is kept. HTTP is the standard library's reverse proxy, turned round.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/relay"
)

const (
	helloLimit = 30 * time.Second // for a program to say what it wants
	dialLimit  = 30 * time.Second // also while a wire is opened again
)

// dial bounds a dial by time and by the proxy's own end.
func dial(ctx, proxy context.Context, to relay.Dialer, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	defer context.AfterFunc(proxy, cancel)()
	c, err := to.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("dial %s %s: %w", network, address, err)
	}
	return c, nil
}

// A reason is what went wrong with a dial, as far as either protocol tells it apart.
type reason int

const (
	failed reason = iota
	forbidden
	noNetwork
	noHost
	refused
	silent
)

func reasonOf(err error) reason {
	var name *net.DNSError
	switch {
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return forbidden
	case errors.Is(err, syscall.ENETUNREACH):
		return noNetwork
	case errors.Is(err, syscall.EHOSTUNREACH), errors.As(err, &name) && name.IsNotFound:
		return noHost
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded):
		return silent
	}
	return failed
}
