package relay

import (
	"errors"
	"syscall"

	"golang.org/x/sys/windows"
)

func notConnected(err error) bool {
	return errors.Is(err, windows.WSAENOTCONN) || errors.Is(err, windows.WSAESHUTDOWN) || errors.Is(err, syscall.EPIPE)
}

// lost knows the names that Windows has for what Lost does.
func lost(err error) bool {
	return errors.Is(err, windows.WSAEMSGSIZE) || errors.Is(err, windows.WSAENOBUFS)
}
