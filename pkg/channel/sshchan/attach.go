package sshchan

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// Attach makes a channel of the connection that a stock client has open. conn leads
// to its control socket (ssh -M), where OpenSSH passes packets on that are not
// encrypted yet (PROTOCOL.mux, "proxy mode"); it is taken over. ctx bounds the
// beginning only.
//
// There are "tcp" dials only: OpenSSH lets no listener be given up on this way. And
// it keeps a place for every dial that was refused, of which it has some 16,000 (10,000
// before version 7.5), so that a wire on which many were should be renewed.
func Attach(ctx context.Context, conn net.Conn, cfg Config) (*Channel, error) {
	cfg = cfg.withDefaults()
	c := &Channel{attached: true}
	var session ssh.Channel
	shake := func(conn net.Conn) (ssh.Conn, <-chan ssh.NewChannel, <-chan *ssh.Request, error) {
		narrow := &narrowed{Conn: conn}
		client, chans, reqs, err := ssh.NewControlClientConn(narrow)
		if err == nil {
			session, err = openSession(client)
		}
		if ask := keepaliveOf(session); err == nil && ask != nil {
			began := time.Now()
			err = ask(true)
			narrow.window.Store(windowFor(time.Since(began)))
		}
		return client, chans, reqs, err
	}
	_, err := handshake(ctx, conn, cfg, shake, ssh.Conn.ServerVersion, func(w *wire) handler {
		c.w = w
		w.keepalive = keepaliveOf(session)
		if session == nil {
			w.Beat = 0 // the client has keepalives of its own
		}
		return c
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// openSession opens one to be asked for signs of life: OpenSSH passes no such requests
// on that are of no channel. A server may allow no sessions, and yet be there for others.
func openSession(client ssh.Conn) (ssh.Channel, error) {
	session, reqs, err := client.OpenChannel("session", nil)
	var refused *ssh.OpenChannelError
	if errors.As(err, &refused) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open a session: %w", err)
	}
	go ssh.DiscardRequests(reqs)
	return session, nil
}

func keepaliveOf(session ssh.Channel) func(ask bool) error {
	if session == nil {
		return nil
	}
	return func(ask bool) error {
		_, err := session.SendRequest(keepalive, ask, nil)
		return err
	}
}

// narrowed opens channels with smaller windows than x/crypto has. What the client cannot
// hand over at once it keeps in a buffer that it copies whenever that must grow: where
// some fast flows may send 2 MiB each, ten times slower than without.
type narrowed struct {
	net.Conn
	window atomic.Uint32 // 0: as it is
}

const (
	narrowest, widest = 256 << 10, 2 << 20
	narrowFor         = 250 << 20 // bytes/s: what a flow may have; a faster way is a short one
)

// windowFor is enough for a round trip of such a length.
func windowFor(trip time.Duration) uint32 {
	return uint32(min(max(trip.Seconds()*narrowFor, narrowest), widest))
}

// Write is called with one packet: its length, no padding, its type.
func (n *narrowed) Write(packet []byte) (int, error) {
	const head, channelOpen = 6, 90
	if window := n.window.Load(); window != 0 && len(packet) > head+4 && packet[head-1] == channelOpen {
		at := head + 4 + int(binary.BigEndian.Uint32(packet[head:])) + 4 // kind and sender
		if at+4 <= len(packet) && binary.BigEndian.Uint32(packet[at:]) > window {
			packet = bytes.Clone(packet)
			binary.BigEndian.PutUint32(packet[at:], window)
		}
	}
	return n.Conn.Write(packet)
}
