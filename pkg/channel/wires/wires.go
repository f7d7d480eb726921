// Package wires names the wires that there are between two ends of ours over a byte
// stream, and makes either end of one: so nobody above has to know more of them than
// the name. A far end serves all; the near end says, in the Upgrade header of the
// request that every such stream begins with, which one it wants.
package wires

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// A Wire is one of those below.
type Wire string

// The wires, the best first.
const (
	TLS Wire = "tls"
	SSH Wire = "ssh"
)

const prefix = "culvert-"

// Upgrade is the value of the Upgrade header (RFC 9110, 7.8) that asks for w.
func (w Wire) Upgrade() string { return prefix + string(w) }

// Asked is the wire that an Upgrade header asks for, "" if that is none of ours.
func Asked(upgrade string) Wire {
	for _, w := range []Wire{TLS, SSH} {
		if strings.EqualFold(upgrade, w.Upgrade()) {
			return w
		}
	}
	return ""
}

// Keys are an end's own private key and the public key of the other end, for
// whichever wire.
type Keys struct {
	tls tlschan.Identity
	ssh sshchan.Identity
}

// ParseKeys reads them as sshchan.GenerateKey wrote them.
func ParseKeys(private, peer []byte) (k Keys, err error) {
	if k.ssh, err = sshchan.ParseIdentity(private, peer); err != nil {
		return k, err
	}
	k.tls, err = tlschan.ParseIdentity(private, peer)
	return k, err
}

// Config is what both ends need to know.
type Config struct {
	Keys    Keys
	Beat    time.Duration // see tlschan.Config; zero means 2 s
	OnAlive func()        // likewise; may be nil
	Log     *slog.Logger  // nil: nothing is logged
}

func (c Config) tls() tlschan.Config {
	return tlschan.Config{Identity: c.Keys.tls, Beat: c.Beat, OnAlive: c.OnAlive}
}

func (c Config) ssh() sshchan.Config {
	return sshchan.Config{Identity: c.Keys.ssh, Keepalive: c.Beat, OnAlive: c.OnAlive, Log: c.Log}
}

// Dial makes the near end of conn, which it takes over. ctx bounds the handshake only.
func (w Wire) Dial(ctx context.Context, conn net.Conn, cfg Config) (channel.Lane, error) {
	switch w {
	case TLS:
		return whole[channel.Lane](tlschan.Dial(ctx, conn, cfg.tls()))
	case SSH:
		return whole[channel.Lane](sshchan.Dial(ctx, conn, cfg.ssh()))
	}
	relay.Abort(conn, net.ErrClosed)
	return nil, w.unknown()
}

// whole keeps a nil pointer out of the interface.
func whole[I channel.Silent](c I, err error) (none I, _ error) {
	if err != nil {
		return none, err
	}
	return c, nil
}

// Serve is the far end on conn, which it takes over, until the wire is gone: see
// tlschan.Serve.
func (w Wire) Serve(ctx context.Context, conn net.Conn, cfg Config, n channel.Network) error {
	switch w {
	case TLS:
		return tlschan.Serve(ctx, conn, cfg.tls(), n)
	case SSH:
		return sshchan.Serve(ctx, conn, cfg.ssh(), n)
	}
	relay.Abort(conn, net.ErrClosed)
	return w.unknown()
}

func (w Wire) unknown() error { return fmt.Errorf("no wire is named %q", string(w)) }
