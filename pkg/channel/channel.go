// Package channel holds the one word culvert is made of: a Network, something
// that can dial and listen. This machine is one (Host); so is whatever the far
// end of a wire serves (a Channel). A Keep is a Channel that opens its wire again;
// Spread makes one Channel of several wires to the same end. The wires themselves
// are the packages below this one, each with both of its ends in one folder;
// package channeltest holds them all to what is said here.
//
// Three networks are spoken: "tcp", a stream; "udp", a flow of datagrams to one
// address, where each Write is one datagram and each Read returns one; and
// "ping", a flow of ICMP (or ICMPv6) echo messages to one address without a
// port: each Write is one echo request, each Read one echo reply, both from the
// ICMP header on (RFC 792, RFC 4443). Identifier and checksum of a ping are the
// host's own affair: what is read back carries the identifier that was written.
//
// Addresses are "host:port" as in package net; the host is resolved where the
// connection is made, so a Channel resolves it at its far end.
package channel

import (
	"context"
	"net"
)

// A Network dials and listens.
//
// The error of a failed dial tells, by errors.Is, what a kernel would have
// said, wherever the connection was tried: syscall.ECONNREFUSED,
// syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT, syscall.EACCES
// (forbidden by policy), or context.DeadlineExceeded. A Network that is closed
// answers net.ErrClosed.
//
// DialContext returns when the connection is established: a "tcp" connection
// that is returned has been accepted by the far side. ctx bounds the dial only.
//
// Connections of "tcp" have CloseWrite (half-close) as *net.TCPConn does.
// A listener of "udp" accepts flows: one net.Conn for each remote address.
type Network interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
	Listen(ctx context.Context, network, address string) (net.Listener, error)
}

// A Channel is a Network at the other end of a wire.
type Channel interface {
	Network

	// Wait blocks until the wire is gone and says why: net.ErrClosed after
	// Close, otherwise the wire's own error.
	Wait() error

	// Close ends the wire and all that runs over it; open connections then
	// fail with net.ErrClosed. It may be called more than once.
	Close() error
}

// Pending is a connection that was accepted here and not yet answered: its far
// side still waits to hear whether it is taken. Listeners of a Channel give such
// connections for "tcp", so that who forwards them can dial first and let the
// answer be what that dial met.
//
// What needs the far side, as Read, Write and CloseWrite do, takes it if nobody
// answered before. Close refuses it then, and so does an Abort, with its reason.
type Pending interface {
	net.Conn

	// Answer takes the connection if err is nil; net.ErrClosed says that its
	// far side has not waited. Otherwise it closes it: the dial at the far side
	// fails with err, as if its kernel had said so, or what was taken before is
	// broken off.
	Answer(err error) error
}

// CloseWriter is the half of a stream that can be closed alone.
type CloseWriter interface {
	CloseWrite() error
}
