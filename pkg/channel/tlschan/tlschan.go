// Package tlschan is both ends of a channel over TLS 1.3, between ends of ours:
// Dial is the near end, a channel.Channel; Serve is the far end, which opens up
// any channel.Network. It does what sshchan does, which also talks to stock ends,
// in fewer round trips, and with windows that grow to what the path holds.
//
// Each end knows the other's public key beforehand, or an authority that has signed a
// certificate of SSH of it; those of X.509 only carry them, and nobody signs them. A handshake without the application protocol culvert/1 fails.
//
// Its streams are those of package mux; what they are for is said as package signalling
// has it.
//
// The far end greets: so the near end learns that its key was taken, which TLS 1.3
// by itself does not tell.
//
// What is whole ends with a FIN, before the RST that says that nobody reads any more;
// what was broken off ends with an RST alone, whose code tells why.
package tlschan

import (
	"time"
)

// Config is what both ends need to know.
type Config struct {
	Identity Identity

	// Beat is how often each end shows that it lives; after seven times of silence
	// the wire is dead, and a handshake has failed. Zero means 2 s.
	Beat time.Duration

	// DialTimeout bounds one dial or listen of Serve at its network, and Idle
	// the silence of a datagram flow there. Zero means 30 s and 2 min.
	DialTimeout, Idle time.Duration

	// OnAlive, if set, is called when the other end showed that it lives: after
	// the handshake, with every sign, and while data comes. It must return soon.
	OnAlive func()
}

// withDefaults fills in what was left zero.
func (c Config) withDefaults() Config {
	for _, d := range []struct {
		at *time.Duration
		or time.Duration
	}{{&c.Beat, 2 * time.Second}, {&c.DialTimeout, 30 * time.Second}, {&c.Idle, 2 * time.Minute}} {
		if *d.at <= 0 {
			*d.at = d.or
		}
	}
	if c.OnAlive == nil {
		c.OnAlive = func() {}
	}
	return c
}
