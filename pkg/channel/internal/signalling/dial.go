package signalling

import (
	"context"
	"net"
	"sync"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// Near is the end that asks. It is a channel.Network.
type Near struct {
	mux Mux

	mu        sync.Mutex
	listeners map[uint32]*listener
	last      uint32 // number of a listener
	leaving   map[*listener]bool
}

// NewNear makes the near end of a mux, whose streams from the other end go to Open.
func NewNear(mux Mux) *Near {
	return &Near{mux: mux, listeners: make(map[uint32]*listener), leaving: make(map[*listener]bool)}
}

// DialContext has the far end dial. The name is resolved there.
func (n *Near) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	s, err := n.dial(ctx, network, address)
	network, _ = channel.CutWords(network)
	if err != nil {
		return nil, opError("dial", network, address, err)
	}
	local := wiring.Addr{Net: network, Text: n.mux.LocalAddr().String()}
	return n.mux.Conn(s, network, local, wiring.ParseAddr(network, address)), nil
}

func opError(op, network, address string, err error) error {
	return &net.OpError{Op: op, Net: network, Addr: wiring.Addr{Net: network, Text: address}, Err: err}
}

func (n *Near) dial(ctx context.Context, network, address string) (Stream, error) {
	switch plain, _ := channel.CutWords(network); plain {
	case "tcp", "udp", "ping":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	s, err := begin(ctx, n.mux, message{kind: msgDial, a: network, b: address})
	if err == nil {
		_, err = answered(ctx, s, address)
	}
	return s, err
}
