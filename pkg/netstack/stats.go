package netstack

import "sync/atomic"

// Stats of the flows of each kind.
type Stats struct{ TCP, UDP, Ping Flows }

// Flows counts what is open now and what has been carried since the Stack is:
// bytes of payload, sent by apps and received by them, and dials that failed.
type Flows struct {
	Open           int64
	Sent, Received uint64
	DialFailures   uint64
}

// Stats may be called at any time.
func (s *Stack) Stats() Stats {
	return Stats{TCP: s.tcp.flows(), UDP: s.udp.flows(), Ping: s.pings.flows()}
}

type counter struct {
	open                   atomic.Int64
	sent, received, failed atomic.Uint64
}

func (c *counter) flows() Flows {
	return Flows{Open: c.open.Load(), Sent: c.sent.Load(), Received: c.received.Load(), DialFailures: c.failed.Load()}
}

// enter counts a flow, unless there are limit of them.
func (c *counter) enter(limit int) bool {
	if c.open.Add(1) <= int64(limit) {
		return true
	}
	c.open.Add(-1)
	return false
}
