//go:build unix

package relay

import (
	"errors"
	"syscall"
)

func notConnected(err error) bool {
	return errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.EPIPE)
}

func lost(error) bool { return false }
