package wiring

import (
	"io"
	"sync"
)

// ahead reads what there is, for who reads a head first and then what it tells of. Most
// wires say little most of the time: a hub has thousands of them. So its buffer is small
// until a read has filled it, and again when reads were small for a while.
type ahead struct {
	src   io.Reader
	small [leastAhead]byte
	large *[readAhead]byte // while much comes
	calm  int              // small reads since then
	rest  []byte           // not yet taken
	err   error            // that came with it
}

const (
	leastAhead = 2 << 10
	readAhead  = 64 << 10 // holds a whole packet
	calmReads  = 16
)

var larges = sync.Pool{New: func() any { return new([readAhead]byte) }}

func (a *ahead) Read(p []byte) (int, error) {
	if len(a.rest) == 0 && a.err == nil {
		a.fill()
	}
	if len(a.rest) == 0 {
		return 0, a.taken()
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// taken is an error once: the next read is another.
func (a *ahead) taken() error {
	err := a.err
	a.err = nil
	return err
}

// fill reads, and learns from that how large the next read should be.
func (a *ahead) fill() {
	buf := a.small[:]
	if a.large != nil {
		buf = a.large[:]
	}
	n, err := a.src.Read(buf)
	a.rest, a.err = buf[:n], err
	switch {
	case n > leastAhead:
		a.calm = 0
	case a.large != nil:
		a.calm++
	case n == leastAhead:
		a.large, a.calm = larges.Get().(*[readAhead]byte), 0
	}
	if a.calm == calmReads { // what was read lies in it
		a.rest = a.small[:copy(a.small[:], a.rest)]
		larges.Put(a.large)
		a.large, a.calm = nil, 0
	}
}
