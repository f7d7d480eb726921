package tlschan

import "testing"

// TestBudget: windows grow while there is something left, and give it back.
func TestBudget(t *testing.T) {
	b := newBudget()
	one, _ := b.share()
	other, _ := b.share()
	for i, step := range []struct {
		do   func() error
		left int64
		fail bool
	}{
		{func() error { return one.ReserveMemory(1<<30, first) }, mostGrown, false},
		{func() error { return one.ReserveMemory(mostGrown, 128) }, 0, false},
		{func() error { return other.ReserveMemory(1, 128) }, 0, true},
		{func() error { one.ReleaseMemory(10); return nil }, 10, false},
		{func() error { return other.ReserveMemory(11, 128) }, 10, true},
		{func() error { return other.ReserveMemory(10, 128) }, 0, false},
		{func() error { one.Done(); one.Done(); return nil }, mostGrown - 10, false},
		{func() error { other.Done(); return nil }, mostGrown, false},
	} {
		if err := step.do(); (err != nil) != step.fail {
			t.Errorf("step %d: %v", i, err)
		}
		if left := b.left.Load(); left != step.left {
			t.Errorf("step %d leaves %d, want %d", i, left, step.left)
		}
	}
}
