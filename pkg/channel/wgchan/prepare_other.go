//go:build !linux && !darwin && !windows

package wgchan

import "syscall"

// prepare does nothing: what does not fit into the path is fragmented here.
func prepare(syscall.RawConn) {}
