package hub

import (
	"fmt"
	"testing"
)

// Of hosts that are away some are remembered, and never too many; who is there stays.
func TestRegistryForgets(t *testing.T) {
	var r Registry
	attach := func(name string) (leave func()) {
		l, err := r.listen(t.Context(), "key", "tcp", name, "22")
		if err != nil {
			t.Fatal(err)
		}
		return func() { l.Close() }
	}
	attach("there")
	for range 3 { // one that comes and goes is one
		attach("db-01")()
	}
	for n := range maxAway - 1 {
		attach(fmt.Sprint("host-", n))()
	}
	if n := len(r.hosts); n != maxAway+1 {
		t.Errorf("%d are remembered, want %d", n, maxAway+1)
	}
	attach("one too many")()
	if n := len(r.hosts); n != 1 || r.missing("tcp", "there", "22") != nil {
		t.Errorf("%d are remembered, want 1", n)
	}
}
