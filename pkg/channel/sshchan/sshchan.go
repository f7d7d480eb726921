// Package sshchan is both ends of a channel over SSH: Dial is the near end, a
// channel.Channel; Serve is the far end, which opens up any channel.Network.
//
// What goes over the wire is plain RFC 4254 (direct-tcpip, tcpip-forward,
// keepalive@openssh.com), so that either part can be taken by a stock OpenSSH:
// ssh -L, -D, -W and -R against Serve, Dial against sshd. Names are sent as they
// are and resolved at the far end. Forwarding is written here and not taken
// from x/crypto's Client, which resolves addresses at the near end and knows no
// context.
//
// Attach is a near end over the connection of a stock client, by its control socket:
// whatever that client knows of configuration, keys, agents and ways to get there
// is then what counts.
//
// Beyond RFC 4254, and only ever said between two ends of ours, which know each
// other by their version strings:
//
//	direct-datagram@culvert.dev     channel: a flow of udp or ping, framed
//	datagram-forward@culvert.dev    request: listen for udp flows
//	forwarded-datagram@culvert.dev  channel: a flow that was accepted
//	fin@culvert.dev                 channel request: all has been sent
//	abort@culvert.dev               channel request: broken off, and why
//
// fin and abort are there because SSH alone ends a stream that was reset, and
// one whose wire broke, exactly as it ends one that is whole. With them, a
// connection that ends without fin was not whole, and a reset crosses the wire.
//
// Connections have deadlines, which SSH channels have not. Read waits for a
// goroutine that reads ahead, so a deadline never harms it. Write and WriteTo
// work on the caller's goroutine for speed; a deadline that is set while they
// already wait, and passes, costs the connection.
package sshchan

import (
	"log/slog"
	"runtime"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/cpu"
)

// Config is what both ends need to know.
type Config struct {
	Identity Identity

	// User is the name that Dial gives; empty means "culvert".
	User string

	// Keepalive is how often each end asks the other for a sign of life; after
	// seven times of silence the wire is dead, and a handshake has failed. Zero
	// means 2 s.
	Keepalive time.Duration

	// DialTimeout bounds one dial or listen of Serve at its network, and Idle
	// the silence of a datagram flow there. Zero means 30 s and 2 min.
	DialTimeout, Idle time.Duration

	// OnAlive, if set, is called when the other end showed that it lives: after
	// the handshake, with every request and reply, and while data comes. It must
	// return soon.
	OnAlive func()

	Log *slog.Logger // nil: nothing is logged
}

const (
	version = "SSH-2.0-culvert"

	directTCP       = "direct-tcpip"
	forwardTCP      = "tcpip-forward"
	cancelTCP       = "cancel-tcpip-forward"
	forwardedTCP    = "forwarded-tcpip"
	directDatagram  = "direct-datagram@culvert.dev"
	forwardDatagram = "datagram-forward@culvert.dev"
	cancelDatagram  = "cancel-datagram-forward@culvert.dev"
	forwardedDgram  = "forwarded-datagram@culvert.dev"
	keepalive       = "keepalive@openssh.com"
	finRequest      = "fin@culvert.dev"
	abortRequest    = "abort@culvert.dev"
)

// withDefaults fills in what was left zero.
func (c Config) withDefaults() Config {
	for _, d := range []struct {
		at *time.Duration
		or time.Duration
	}{{&c.Keepalive, 2 * time.Second}, {&c.DialTimeout, 30 * time.Second}, {&c.Idle, 2 * time.Minute}} {
		if *d.at <= 0 {
			*d.at = d.or
		}
	}
	if c.User == "" {
		c.User = "culvert"
	}
	if c.OnAlive == nil {
		c.OnAlive = func() {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// rekeyAfter is how many bytes go under one key. x/crypto would change keys after
// 1 GiB where the cipher is not AES, and all that writes meanwhile waits, its
// reading loop too, which under load can be for good. Ciphers with
// authentication built in bear far more; before the numbers of packets come
// round, x/crypto changes keys all the same.
const rekeyAfter = 1 << 40

// common is the part of the protocol's settings that both ends share.
func common() ssh.Config {
	return ssh.Config{Ciphers: ciphers(hasAES()), RekeyThreshold: rekeyAfter}
}

// ciphers are those with authentication built in, the cheapest first.
func ciphers(aes bool) []string {
	if aes {
		return []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305}
	}
	return []string{ssh.CipherChaCha20Poly1305, ssh.CipherAES128GCM, ssh.CipherAES256GCM}
}

// hasAES tells whether the processor does AES-GCM itself.
func hasAES() bool {
	switch runtime.GOARCH {
	case "amd64":
		return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ
	case "arm64":
		return runtime.GOOS != "linux" || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
	}
	return false
}
