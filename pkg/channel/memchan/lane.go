package memchan

import (
	"io"
	"sync"
	"syscall"
)

// lane is one direction of a stream. What is written is copied once, into a
// block that the reader takes as it is, so that writer and reader work at the
// same time and meet only for the exchange. There are blocks only while data is
// on its way, small ones for little: most connections say nothing most of the time.
type lane struct {
	mu    sync.Mutex
	block []byte // written, not yet taken; nil: nothing
	end   error  // what the reader finds after it; nothing more is written then
	deaf  error  // what the writer finds, because nobody reads

	more chan struct{} // tells the reader of a change
	room chan struct{} // tells the writer
}

func newLane() *lane {
	return &lane{more: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

const (
	smallBlock = 4 << 10
	largeBlock = 64 << 10
)

var small = sync.Pool{New: func() any { return new([smallBlock]byte) }}
var large = sync.Pool{New: func() any { return new([largeBlock]byte) }}

func newBlock(size int) []byte {
	if size <= smallBlock {
		return small.Get().(*[smallBlock]byte)[:0]
	}
	return large.Get().(*[largeBlock]byte)[:0]
}

func free(block []byte) {
	switch cap(block) {
	case smallBlock:
		small.Put((*[smallBlock]byte)(block[:smallBlock]))
	case largeBlock:
		large.Put((*[largeBlock]byte)(block[:largeBlock]))
	}
}

// put writes what there is room for: nothing, where the writer has to wait.
func (l *lane) put(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.deaf != nil:
		return 0, l.deaf
	case l.end != nil:
		return 0, syscall.EPIPE
	}
	l.fit(len(p))
	n := min(len(p), cap(l.block)-len(l.block))
	l.block = append(l.block, p[:n]...)
	if n > 0 {
		signal(l.more)
	}
	return n, nil
}

// fit makes room for size bytes, as far as a large block has it.
func (l *lane) fit(size int) {
	if l.block == nil {
		l.block = newBlock(size)
	} else if cap(l.block) == smallBlock && cap(l.block)-len(l.block) < size {
		grown := append(newBlock(largeBlock), l.block...)
		free(l.block)
		l.block = grown
	}
}

// take gives the reader all that was written: nil, where it has to wait. The
// block is freed by the reader.
func (l *lane) take() ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.block == nil {
		return nil, l.end
	}
	block := l.block
	l.block = nil
	signal(l.room)
	return block, nil
}

// finish lets the reader come to an end after what was written.
func (l *lane) finish() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.end == nil {
		l.end = io.EOF
		signal(l.more)
	}
}

// deafen tells the writer that nobody reads any more.
func (l *lane) deafen(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop()
	if l.deaf == nil {
		l.deaf = err
		signal(l.room)
	}
}

// sever takes from the reader what it has not read, and tells it why.
func (l *lane) sever(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop()
	l.end = err
	signal(l.more)
}

func (l *lane) drop() {
	if l.block != nil {
		free(l.block)
		l.block = nil
	}
}
