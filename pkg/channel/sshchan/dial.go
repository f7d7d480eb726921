package sshchan

import (
	"context"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// Channel is the near end. It is a channel.Lane.
type Channel struct {
	w        *wire
	attached bool // by a stock client

	asking sync.RWMutex // held for writing while a Listen is asked for

	mu        sync.Mutex
	listeners map[bound]*listener
}

var _ channel.Lane = (*Channel)(nil)

// Dial makes a channel of conn, to the end that serves there, and takes conn
// over. ctx bounds the handshake only.
func Dial(ctx context.Context, conn net.Conn, cfg Config) (*Channel, error) {
	cfg = cfg.withDefaults()
	c := &Channel{listeners: make(map[bound]*listener)}
	shake := func(conn net.Conn) (ssh.Conn, <-chan ssh.NewChannel, <-chan *ssh.Request, error) {
		return ssh.NewClientConn(conn, conn.RemoteAddr().String(), cfg.client())
	}
	_, err := handshake(ctx, conn, cfg, shake, ssh.Conn.ServerVersion, func(w *wire) handler {
		c.w = w
		return c
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Wait blocks until the wire is gone and says why.
func (c *Channel) Wait() error { return c.w.Wait() }

// Close ends the wire.
func (c *Channel) Close() error { return c.w.Close() }

// Silence is how long nothing was read from the wire.
func (c *Channel) Silence() time.Duration { return c.w.Silence() }

// Retire closes the wire when the last connection over it is closed.
func (c *Channel) Retire() { c.w.Retire() }

// Flows is how many connections are open.
func (c *Channel) Flows() int { return c.w.Flows() }

// RTT is the round trip of the last keepalive; zero before the first.
func (c *Channel) RTT() time.Duration { return time.Duration(c.w.rtt.Load()) }

// target names both ends of a connection, as RFC 4254 does: where it goes, or
// was accepted, and where it comes from.
type target struct {
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

// dgramTarget is a target with the network before it.
type dgramTarget struct {
	Network    string
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

// payload is what a channel of the network begins with.
func (t target) payload(network string) []byte {
	if network == "tcp" {
		return ssh.Marshal(t)
	}
	return ssh.Marshal(dgramTarget{network, t.Host, t.Port, t.OriginHost, t.OriginPort})
}

// parsePayload is the other way round. The network is one that kind carries.
func parsePayload(kind string, payload []byte) (network string, t target, err error) {
	if kind == directTCP || kind == forwardedTCP {
		err = ssh.Unmarshal(payload, &t)
		return "tcp", t, err
	}
	var d dgramTarget
	err = ssh.Unmarshal(payload, &d)
	if err == nil && d.Network != "udp" && d.Network != "ping" {
		err = net.UnknownNetworkError(d.Network)
	}
	return d.Network, target{d.Host, d.Port, d.OriginHost, d.OriginPort}, err
}

// address is where the target is, as package net has it.
func (t target) address(network string) string {
	if network == "ping" {
		return t.Host
	}
	return net.JoinHostPort(t.Host, strconv.FormatUint(uint64(t.Port), 10))
}

// DialContext has the far end dial. The name is resolved there.
func (c *Channel) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	kind, payload, err := dialPayload(network, address)
	if err == nil {
		err = c.w.carries(network)
	}
	if err == nil {
		var conn net.Conn
		if conn, err = c.openChannel(ctx, kind, payload, network, address); err == nil {
			return conn, nil
		}
	}
	return nil, &net.OpError{Op: "dial", Net: network, Addr: wiring.Addr{Net: network, Text: address}, Err: err}
}

func dialPayload(network, address string) (kind string, payload []byte, err error) {
	t := target{Host: address, OriginHost: nowhere}
	switch network {
	case "tcp":
		t, err = parseTarget(address)
		return directTCP, t.payload(network), err
	case "udp":
		t, err = parseTarget(address)
		return directDatagram, t.payload(network), err
	case "ping":
		return directDatagram, t.payload(network), nil
	}
	return "", nil, net.UnknownNetworkError(network)
}

// nowhere stands for an originator that is not told.
const nowhere = "127.0.0.1"

func parseTarget(address string) (target, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return target{}, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return target{}, &net.AddrError{Err: "invalid port", Addr: address}
	}
	return target{Host: host, Port: uint32(port), OriginHost: nowhere}, nil
}

// openChannel opens an SSH channel. That cannot be interrupted, so when ctx ends it is
// closed as soon as it is there.
func (c *Channel) openChannel(ctx context.Context, kind string, payload []byte, network, address string) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.w.Context().Err() != nil {
		return nil, c.w.Gone()
	}
	res := make(chan opened, 1)
	go func() {
		ch, reqs, err := c.w.conn.OpenChannel(kind, payload)
		res <- opened{ch, reqs, err}
	}()
	select {
	case o := <-res:
		return c.flow(o, network, address)
	case <-c.w.Context().Done():
		return nil, c.w.Gone()
	case <-ctx.Done():
		go discard(res)
		return nil, ctx.Err()
	}
}

type opened struct {
	ch   ssh.Channel
	reqs <-chan *ssh.Request
	err  error
}

func discard(res <-chan opened) {
	if o := <-res; o.err == nil {
		o.ch.Close()
	}
}

func (c *Channel) flow(o opened, network, address string) (net.Conn, error) {
	if o.err != nil {
		return nil, c.w.notOpened(o.err, address)
	}
	return newConn(c.w, o.ch, o.reqs, network, wiring.Addr{Net: network, Text: c.w.conn.LocalAddr().String()}, wiring.ParseAddr(network, address)), nil
}

// newConn makes an SSH channel a connection of its network.
func newConn(w *wire, ch ssh.Channel, reqs <-chan *ssh.Request, network string, local, remote net.Addr) net.Conn {
	f := newFlow(w, ch, reqs, local, remote)
	if network == "tcp" {
		return stream{f}
	}
	return &wiring.Datagrams{Flow: f}
}

// request refuses what a far end may ask; hostkeys-00@openssh.com wants no answer.
func (c *Channel) request(r *ssh.Request) { r.Reply(false, nil) }
