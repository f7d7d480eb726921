package main

import (
	"io/fs"
	"math"
	"strconv"
	"strings"
)

// memoryLimit is how much of its container's memory the program may use before it
// collects garbage more often: not all, since the kernel counts more than the heap.
// The container has its limit from whoever had the last word on it, so it is asked,
// and not the manifest.
func memoryLimit(cgroup fs.FS) int64 {
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
