package netstack

import (
	"context"
	"errors"
	"net"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A verdict is what the app is told of a dial that failed.
type verdict struct {
	silent  bool // nothing: it may ask again, or has left
	refused bool // nobody listens there: RST, or ICMP port unreachable
	code4   header.ICMPv4Code
	code6   header.ICMPv6Code
}

var (
	silence      = verdict{silent: true}
	refused      = verdict{refused: true, code4: header.ICMPv4PortUnreachable, code6: header.ICMPv6PortUnreachable}
	noNetwork    = verdict{code4: header.ICMPv4NetUnreachable, code6: header.ICMPv6NetworkUnreachable}
	noHost       = verdict{code4: header.ICMPv4HostUnreachable, code6: header.ICMPv6AddressUnreachable}
	notPermitted = verdict{code4: header.ICMPv4AdminProhibited, code6: header.ICMPv6Prohibited}
)

// judge says what to tell the app, so that its kernel makes the same errno of
// it again. A dial that timed out is answered as the network that swallowed it
// would: not at all, and the app's own patience decides. A Network that has
// closed is no network, and one that does not carry the protocol forbids it: of that a
// socket of UDP is told. What is not understood is a host that can't be reached,
// for an app should rather hear something than wait.
func judge(err error) verdict {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, context.Canceled), errors.As(err, &timeout) && timeout.Timeout():
		return silence
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return refused
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, net.ErrClosed):
		return noNetwork
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM), errors.Is(err, errors.ErrUnsupported):
		return notPermitted
	}
	return noHost
}
