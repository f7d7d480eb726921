//go:build !linux

package hub

import (
	"net"
	"time"
)

// patience is only Linux's to have.
func patience(net.Conn, time.Duration) {}
