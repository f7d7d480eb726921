package mux

import (
	"testing"
	"time"
)

// TestTune: a window grows if what is read in a round trip is more than half of it.
func TestTune(t *testing.T) {
	const ms = time.Millisecond
	for _, test := range []struct {
		name       string
		size, left int
		moved      int
		rtt, took  time.Duration
		want       int
	}{
		{"nobody knows the path", 256 << 10, mostGrown, 256 << 10, 0, 100 * ms, 256 << 10},
		{"a window a round trip", 256 << 10, mostGrown, 256 << 10, 100 * ms, 100 * ms, 512 << 10},
		{"half of one, at once", 256 << 10, mostGrown, 128 << 10, 100 * ms, 0, 512 << 10},
		{"a third", 256 << 10, mostGrown, 80 << 10, 100 * ms, 100 * ms, 256 << 10},
		{"too early to tell", 256 << 10, mostGrown, 100 << 10, 100 * ms, 50 * ms, 256 << 10},
		{"a short path, in a hurry", 256 << 10, mostGrown, 1 << 20, ms / 10, 4 * ms, 256 << 10},
		{"a short path", 256 << 10, mostGrown, 5 << 20, ms / 10, 5 * ms, 256 << 10},
		{"a short path that is fast", 256 << 10, mostGrown, 5 << 20, ms, 5 * ms, 512 << 10},
		{"as large as may be", mostWindow, mostGrown, mostWindow, 100 * ms, 100 * ms, mostWindow},
		{"little is left", 1 << 20, 100, 1 << 20, 100 * ms, 100 * ms, 1<<20 + 100},
		{"nothing is left", 1 << 20, 0, 1 << 20, 100 * ms, 100 * ms, 1 << 20},
	} {
		var b budget
		b.give(test.left)
		began := time.Now()
		w := window{size: test.size, began: began}
		w.read(test.moved)
		w.tune(began.Add(test.took), test.rtt, &b)
		grown := w.size - test.size
		if w.size != test.want || w.grown != grown || w.owed != test.moved+grown || b.left.Load() != int64(test.left-grown) {
			t.Errorf("%s: %+v, %d left; want %d", test.name, w, b.left.Load(), test.want)
		}
	}
}

func TestBeginWith(t *testing.T) {
	for streams, want := range map[int]int{0: firstWindow, firstStreams - 1: firstWindow, firstStreams: leastWindow, mostStreams: leastWindow} {
		if got := beginWith(streams); got != want {
			t.Errorf("beside %d streams a window of %d", streams, got)
		}
	}
}

func TestDue(t *testing.T) {
	for size, want := range map[int]int{leastWindow: 4 << 10, firstWindow: 64 << 10, mostWindow: mostOwed} {
		if got := (&window{size: size}).due(); got != want {
			t.Errorf("of a window of %d, %d are due, want %d", size, got, want)
		}
	}
}
