package wiring

import (
	"context"
	"net"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// Join relays between a flow and what it leads to, until both ends are done or ctx,
// the wire's, ends. Datagrams end when there were none for idle.
func Join(ctx context.Context, network string, near, far net.Conn, idle time.Duration) {
	defer context.AfterFunc(ctx, func() { relay.Abort(far, net.ErrClosed) })()
	if network == "tcp" {
		relay.Join(near, far)
	} else {
		relay.Datagrams(near, far, idle)
	}
}

// Hand is Join for a flow to who has connected as far, and may wait for an answer.
func Hand(ctx context.Context, network string, near, far net.Conn, idle time.Duration) {
	if p, ok := far.(channel.Pending); ok {
		if err := p.Answer(nil); err != nil { // it has not waited
			relay.Abort(near, syscall.ECONNRESET)
			return
		}
	}
	Join(ctx, network, near, far, idle)
}

// Refuse tells who has connected what the other end said.
func Refuse(far net.Conn, err error) {
	if p, ok := far.(channel.Pending); ok {
		p.Answer(err)
	} else {
		relay.Abort(far, err)
	}
}
