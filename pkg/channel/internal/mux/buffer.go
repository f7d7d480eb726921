package mux

import "sync"

// buffer holds what came for a stream and was not read yet. One goroutine fills
// it, and one empties it, both without a lock while they copy. Empty, it is nothing.
type buffer struct {
	head, tail *chunk
	size       int
	filling    bool // the tail: it must stay
}

// chunk is memory from a pool, with bytes from start to end.
type chunk struct {
	b          []byte
	start, end int
	next       *chunk
	from       *sync.Pool
}

// Each is four times the one before, so that what is held is never much more than
// what came. The largest holds two frames of a fast wire.
const leastChunk = 4 << 10

var chunks = [...]*sync.Pool{chunksOf(leastChunk), chunksOf(4 * leastChunk), chunksOf(16 * leastChunk)}

func chunksOf(size int) *sync.Pool {
	p := &sync.Pool{}
	p.New = func() any { return &chunk{b: make([]byte, size), from: p} }
	return p
}

func newChunk(atLeast int) *chunk {
	i := 0
	for size := leastChunk; size < atLeast && i < len(chunks)-1; size *= 4 {
		i++
	}
	return chunks[i].Get().(*chunk)
}

func (c *chunk) free() {
	c.start, c.end, c.next = 0, 0, nil
	c.from.Put(c)
}

// room is where to put up to n bytes, until filled says how many there are.
func (q *buffer) room(n int) []byte {
	t := q.tail
	if t == nil || t.end == len(t.b) {
		c := newChunk(n)
		if t == nil {
			q.head = c
		} else {
			t.next = c
		}
		q.tail, t = c, c
	}
	q.filling = true
	return t.b[t.end:min(t.end+n, len(t.b))]
}

func (q *buffer) filled(n int) {
	q.tail.end += n
	q.size += n
	q.filling = false
}

// next is what came first and lies together; it is good until it is dropped.
func (q *buffer) next() []byte {
	for q.head.start == q.head.end {
		q.shift()
	}
	return q.head.b[q.head.start:q.head.end]
}

// drop takes away n bytes of what next gave.
func (q *buffer) drop(n int) {
	q.head.start += n
	q.size -= n
	if q.size == 0 && !q.filling {
		q.shift()
	}
}

func (q *buffer) shift() {
	c := q.head
	if q.head = c.next; q.head == nil {
		q.tail = nil
	}
	c.free()
}
