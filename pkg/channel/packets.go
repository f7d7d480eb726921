package channel

import "net/netip"

// Packets are carried as they are, beside the flows of a Channel: from addresses that
// this end has at the other, to any. Each is one of IP behind a virtio-net header, which
// says what is left to do on it; it is gathered from the buffers, the first of which is
// that header.
type Packets interface {
	// Send sends one. It is false where it isn't carried: it comes from elsewhere, or
	// the wire is gone. The buffers may be changed.
	Send(bufs [][]byte) bool

	// Receive has all that comes handed to f, which must not keep it.
	Receive(f func(bufs [][]byte))

	// Count tells of flows that have begun, or have ended where it is less than
	// none: a Channel that is Silent is not retired before the last of them ends.
	Count(more int)

	// Done is closed when the wire is gone.
	Done() <-chan struct{}
}

// A Carrier is a Channel that may carry packets to an address: Packets is nil while it
// doesn't.
type Carrier interface{ Packets(to netip.Addr) Packets }

var _ Carrier = (*Keep)(nil)

// Packets are those of the present wire.
func (k *Keep) Packets(to netip.Addr) Packets {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wire == nil {
		return nil
	}
	if c, ok := k.wire.Channel.(Carrier); ok {
		return c.Packets(to)
	}
	return nil
}
