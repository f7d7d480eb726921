// Package signalling is what the ends of a wire between ends of ours ask each other
// for, whatever mux is below: Near dials and listens, Far does it for it at a
// channel.Network.
//
// Each flow has a stream of the mux, and so has each listener. A stream begins with a
// message (message.go) that says what it is for, which is answered by one; the rest
// belongs to the flow:
//
//	dial      near to far   answered when the far end has dialled
//	listen    near to far   a listener lives as long as its stream
//	accepted  far to near   a connection of a listener; answered by who accepts it
package signalling

import (
	"context"
	"io"
	"net"
	"time"
)

// Mux is a wire that opens streams to its other end.
type Mux interface {
	// Open opens a stream with its first words.
	Open(ctx context.Context, words []byte) (Stream, error)

	// Conn makes a stream a connection of its network.
	Conn(s Stream, network string, local, remote net.Addr) net.Conn

	LocalAddr() net.Addr
	RemoteAddr() net.Addr

	// Context ends with the wire, and Gone is the error of what is asked of it
	// then. Spawn runs what the end of the wire waits for.
	Context() context.Context
	Gone() error
	Spawn(part func())
}

// Stream is one of a mux. Its errors are those that its flow has.
type Stream interface {
	io.ReadWriter
	CloseWrite() error
	SetReadDeadline(t time.Time) error

	// Reset closes it both ways; who reads at the other end meets the reason.
	// Without one it is closed in good order, after CloseWrite.
	Reset(reason error)
}

// say gives a stream a message.
func say(s Stream, m message) error {
	b, err := m.append(nil)
	if err == nil {
		_, err = s.Write(b)
	}
	return err
}

// begin opens a stream with a message.
func begin(ctx context.Context, mux Mux, m message) (Stream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	words, err := m.append(nil)
	if err != nil {
		return nil, err
	}
	return mux.Open(ctx, words)
}

// answered waits for the answer to what a stream began with.
func answered(ctx context.Context, s Stream, name string) (message, error) {
	stop := context.AfterFunc(ctx, func() { s.Reset(ctx.Err()) })
	m, err := readMessage(s)
	if !stop() {
		return m, ctx.Err()
	}
	if err == nil {
		err = m.refused(name)
	}
	if err != nil {
		s.Reset(nil)
	}
	return m, err
}

// refuse answers no to what a stream began with; there is nothing more to say.
func refuse(s Stream, why error) {
	say(s, refusal(why))
	s.CloseWrite()
	s.Reset(nil)
}
