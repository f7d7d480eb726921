package resume

import (
	"sync"
	"sync/atomic"
)

const (
	firstWindow = 256 << 10
	mostWindow  = 16 << 20

	// mostUnsent is written and waits for the connection: more would only wait here rather
	// than at who writes.
	mostUnsent = 256 << 10

	firstKept = 64 << 10 // of one stream, beyond which it needs budget
	mostKept  = mostWindow + mostUnsent

	// mostGrown is what all streams of an end may hold beyond what each begins with.
	mostGrown  = 64 << 20
	leastGrown = 64 << 10 // at a time
)

// budget is what is left to grow by.
type budget struct{ left atomic.Int64 }

func newBudget() *budget {
	b := &budget{}
	b.left.Store(mostGrown)
	return b
}

// take takes up to so much, and no more than a quarter of what is left, so that there is some for
// who comes later; or nothing, where that is not worth its while.
func (b *budget) take(most int64) int64 {
	for {
		left := b.left.Load()
		n := min(most, left/4)
		if n < leastGrown {
			return 0
		}
		if b.left.CompareAndSwap(left, left-n) {
			return n
		}
	}
}

func (b *budget) give(n int64) { b.left.Add(n) }

// outgoing is what was written: that which is not acknowledged is kept.
type outgoing struct {
	chunks [][]byte // from base on
	base   int64    // where the first begins

	acked, sent, written int64
	limit                int64 // may be sent
	most                 int64 // may be kept
	ended                bool  // nothing follows what is written
	arrived              bool  // all of it, and the end
	deaf                 bool  // nobody reads it any more
}

// room is how much more may be written now.
func (o *outgoing) room(b *budget) (room, grown int64) {
	kept := o.written - o.acked
	if want := min(o.limit-o.acked+mostUnsent, mostKept); kept >= o.most && want > o.most {
		grown = b.take(want - o.most)
		o.most += grown
	}
	return min(mostUnsent-(o.written-o.sent), o.most-kept), grown
}

// shrink is how much less may be kept, as nothing is any more.
func (o *outgoing) shrink() (n int64) {
	if o.acked == o.written && !o.deaf {
		n, o.most = o.most-firstKept, firstKept
	}
	return n
}

const (
	smallChunk = 4 << 10
	largeChunk = 64 << 10
)

// chunks are large ones, of what has arrived.
var chunks = sync.Pool{New: func() any { return new([largeChunk]byte) }}

func (o *outgoing) append(p []byte) {
	o.written += int64(len(p))
	for len(p) > 0 {
		last := len(o.chunks) - 1
		if last < 0 || len(o.chunks[last]) == cap(o.chunks[last]) {
			if len(p) > smallChunk || last >= 0 {
				o.chunks = append(o.chunks, chunks.Get().(*[largeChunk]byte)[:0])
			} else {
				o.chunks = append(o.chunks, make([]byte, 0, smallChunk))
			}
			last++
		}
		c := o.chunks[last]
		n := min(len(p), cap(c)-len(c))
		o.chunks[last] = append(c, p[:n]...)
		p = p[n:]
	}
}

// next adds to dst what is to be sent next, up to a frame of it.
func (o *outgoing) next(dst []byte) []byte {
	n := min(o.written, o.limit, o.sent+mostData) - o.sent
	if n <= 0 || o.deaf {
		return dst
	}
	dst = frame{kindData, o.sent, uint32(n)}.append(dst)
	skip := o.sent - o.base
	o.sent += n
	for _, c := range o.chunks {
		if skip >= int64(len(c)) {
			skip -= int64(len(c))
			continue
		}
		part := c[skip:min(int64(len(c)), skip+n)]
		dst, n, skip = append(dst, part...), n-int64(len(part)), 0
		if n == 0 {
			break
		}
	}
	return dst
}

// ack forgets what has arrived; begins says that what is not acknowledged is to be sent again.
func (o *outgoing) ack(f frame, begins bool) error {
	said := o.sent
	if o.ended && o.sent == o.written {
		said++ // the end
	}
	if f.at > said || f.at < o.acked {
		return broken("what was not said is acknowledged, or what was is not any more", f)
	}
	o.arrived = o.arrived || f.at > o.written
	o.acked = min(f.at, o.written)
	o.limit = max(o.limit, o.acked+int64(f.value))
	if begins {
		o.sent = o.acked
	}
	for len(o.chunks) > 0 && o.acked-o.base >= int64(len(o.chunks[0])) && (len(o.chunks) > 1 || o.acked == o.written) {
		o.base += int64(len(o.chunks[0]))
		if c := o.chunks[0]; cap(c) == largeChunk {
			chunks.Put((*[largeChunk]byte)(c[:largeChunk]))
		}
		o.chunks[0] = nil
		o.chunks = o.chunks[1:]
	}
	return nil
}

// drop keeps nothing any more.
func (o *outgoing) drop() { o.deaf, o.chunks = true, nil }

// incoming is what was received and not read yet.
type incoming struct {
	queue    [][]byte
	size     int64 // of what is in it
	received int64 // and with it all that was read
	window   int64
	grownTo  int64 // the limit since which it has this size
	end      error // what comes after all this; nil: it is not known
	deaf     bool  // nobody reads it
}

// limit is how far the other end may send.
func (i *incoming) limit() int64 { return i.received - i.size + i.window }

// counted is what is acknowledged.
func (i *incoming) counted() int64 {
	if i.end != nil {
		return i.received + 1
	}
	return i.received
}

// take takes in data, of which a part may have come before.
func (i *incoming) take(f frame, data []byte) error {
	end := f.at + int64(f.value)
	switch {
	case f.at > i.received:
		return broken("something was left out", f)
	case end > i.limit():
		return broken("more data than the window has", f)
	case end <= i.received:
		return nil
	case i.end != nil:
		return broken("data after its end", f)
	}
	data = data[i.received-f.at:]
	i.received = end
	if !i.deaf {
		i.add(data)
	}
	return nil
}

// add queues data. Of what comes in little pieces and is not read meanwhile, many have one slice:
// each of its own would cost many times what the window counts.
func (i *incoming) add(data []byte) {
	i.size += int64(len(data))
	if last := len(i.queue) - 1; last >= 0 {
		c := i.queue[last]
		n := min(len(data), cap(c)-len(c))
		i.queue[last], data = append(c, data[:n]...), data[n:]
		if 0 < len(data) && len(data) < smallChunk {
			data = append(make([]byte, 0, smallChunk), data...)
		}
	}
	if len(data) > 0 {
		i.queue = append(i.queue, data)
	}
}

func (i *incoming) finish(f frame, why error) error {
	if f.at != i.received {
		return broken("an end where there is none", f)
	}
	if i.end == nil {
		i.end = why
	}
	return nil
}

func (i *incoming) read(p []byte) (n int) {
	for n < len(p) && len(i.queue) > 0 {
		m := copy(p[n:], i.queue[0])
		n += m
		if i.queue[0] = i.queue[0][m:]; len(i.queue[0]) == 0 {
			i.queue[0] = nil
			i.queue = i.queue[1:]
		}
	}
	i.size -= int64(n)
	return n
}

func (i *incoming) drop() { i.deaf, i.queue, i.size = true, nil, 0 }

// wanted lets the window grow, if who reads is as fast as what comes: then it is that which
// holds up the other end. Of what was asked before it has grown the last time nothing is made, nor
// of what is said to hold it up and has not come.
func (i *incoming) wanted(f frame, b *budget) (grown int64) {
	if i.deaf || f.at != i.received || f.at < i.grownTo || i.size > i.window/2 {
		return 0
	}
	grown = b.take(min(i.window, mostWindow-i.window))
	i.window += grown
	i.grownTo = i.limit()
	return grown
}
