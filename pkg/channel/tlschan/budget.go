package tlschan

import (
	"errors"
	"sync/atomic"

	"github.com/libp2p/go-yamux/v5"
)

// mostGrown is by how much all windows of a wire may grow, together: it is what
// this end may have to hold of flows that nobody reads any more.
const mostGrown = 64 << 20

var errGrown = errors.New("the windows are large enough")

// budget is what is left for windows to grow by.
type budget struct{ left atomic.Int64 }

func newBudget() *budget {
	b := &budget{}
	b.left.Store(mostGrown)
	return b
}

// share makes a flow's share.
func (b *budget) share() (yamux.MemoryManager, error) { return &share{b: b}, nil }

// share is what the window of a flow has grown by.
type share struct {
	b    *budget
	size atomic.Int64
}

// first is the priority of the window that each flow begins with.
const first = 255

// ReserveMemory lets windows grow; those that flows begin with are theirs.
func (s *share) ReserveMemory(size int, priority uint8) error {
	if priority == first {
		return nil
	}
	if s.b.left.Add(-int64(size)) < 0 {
		s.b.left.Add(int64(size))
		return errGrown
	}
	s.size.Add(int64(size))
	return nil
}

// ReleaseMemory gives back a part.
func (s *share) ReleaseMemory(size int) {
	s.size.Add(-int64(size))
	s.b.left.Add(int64(size))
}

// Done gives back what is left of it, once.
func (s *share) Done() { s.b.left.Add(s.size.Swap(0)) }
