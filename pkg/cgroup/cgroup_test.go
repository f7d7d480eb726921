package cgroup

import (
	"math"
	"testing"
	"testing/fstest"
)

func TestMemoryLimit(t *testing.T) {
	const v1, v2 = "memory/memory.limit_in_bytes", "memory.max"
	for _, test := range []struct {
		name, file, text string
		want             int64
	}{
		{"version 2", v2, "1073741824\n", 966367642},
		{"version 1", v1, "268435456\n", 241591911},
		{"no limit", v2, "max\n", math.MaxInt64},
		{"no limit in version 1", v1, "9223372036854771712\n", 8301034833169294541},
		{"nothing known", "other", "", math.MaxInt64},
		{"nonsense", v2, "-1\n", math.MaxInt64},
	} {
		got := MemoryLimit(fstest.MapFS{test.file: {Data: []byte(test.text)}})
		if got != test.want {
			t.Errorf("%s: %d, want %d", test.name, got, test.want)
		}
	}
}
