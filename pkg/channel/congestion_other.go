//go:build !linux

package channel

import "syscall"

// Congestion leaves sockets as they are: only Linux has a choice.
func Congestion(_, _ string, _ syscall.RawConn) error { return nil }

// CongestionName is not known.
func CongestionName() string { return "" }
