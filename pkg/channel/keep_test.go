package channel

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	const least, most = 200 * time.Millisecond, 5 * time.Second
	for failures, want := range map[int]time.Duration{
		0: least, 1: 2 * least, 4: 16 * least, 5: most, 29: most, 1000: most,
	} {
		if d := backoff(failures, least, most, 0); d != want/2 {
			t.Errorf("after %d failures at least %v, want %v", failures, d, want/2)
		}
		if d := backoff(failures, least, most, 1); d != want {
			t.Errorf("after %d failures at most %v, want %v", failures, d, want)
		}
	}
}
