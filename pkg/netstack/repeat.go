package netstack

import "gvisor.dev/gvisor/pkg/tcpip/header"

// repeats has gVisor count the acknowledgements that repeat another. It wants them to have
// the same window (RFC 5681); a receiver which has just made its buffer larger says so in
// each, and it's only SACK that tells of the loss (RFC 6675). Without three of them gVisor
// waits for its timeout, and again for that after each loss in the same window.
type repeats map[flowKey]repeated

type repeated struct {
	ack    uint32
	window uint16
}

// mostRepeated is how many flows with losses there are at once that are looked after.
const mostRepeated = 4096

// hold has a segment that repeats the window of the one before wait with its larger one.
func (r repeats) hold(p packet, b []byte) {
	if p.fragment || p.proto != protoTCP || len(b) < p.at+header.TCPMinimumSize {
		return
	}
	h := header.TCP(b[p.at:])
	if !hasSACK(h) {
		if len(r) > 0 {
			delete(r, flowKey{p.from(h), p.to(h)})
		}
		return
	}
	key := flowKey{p.from(h), p.to(h)}
	was, known := r[key]
	if known && was.ack == h.AckNumber() && was.window > 0 && was.window <= h.WindowSize() {
		h.SetWindowSize(was.window)
		return
	}
	if !known && len(r) >= mostRepeated {
		clear(r)
	}
	r[key] = repeated{h.AckNumber(), h.WindowSize()}
}

// hasSACK tells whether a segment says what it has beyond its acknowledgement (RFC 2018).
func hasSACK(h header.TCP) bool {
	if n := int(h.DataOffset()); n > len(h) || n < header.TCPMinimumSize {
		return false
	}
	for o := h.Options(); len(o) > 1; {
		switch {
		case o[0] == header.TCPOptionEOL:
			return false
		case o[0] == header.TCPOptionNOP:
			o = o[1:]
			continue
		case o[0] == header.TCPOptionSACK:
			return true
		}
		if o[1] < 2 || int(o[1]) > len(o) {
			return false
		}
		o = o[o[1]:]
	}
	return false
}
