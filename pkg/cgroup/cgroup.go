// Package cgroup is what a program is told of the container that it runs in.
package cgroup

import (
	"io/fs"
	"math"
	"strconv"
	"strings"
)

// MemoryLimit is how much of its container's memory the program may use before it
// collects garbage more often: not all, since the kernel counts more than the heap.
// The container has its limit from whoever had the last word on it, so it is asked,
// and not the manifest.
func MemoryLimit(cgroup fs.FS) int64 {
	for _, name := range []string{"memory.max", "memory/memory.limit_in_bytes"} { // of version 2, of version 1
		text, err := fs.ReadFile(cgroup, name)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && n > 0 {
			return n - n/10
		}
	}
	return math.MaxInt64
}
