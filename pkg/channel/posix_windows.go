package channel

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/windows"
)

// posix adds to an error of Windows sockets the name that the rest of culvert
// knows it by: package syscall keeps the two apart.
func posix(err error) error {
	for from, to := range map[error]error{
		windows.WSAECONNREFUSED: syscall.ECONNREFUSED,
		windows.WSAECONNRESET:   syscall.ECONNRESET,
		windows.WSAEHOSTUNREACH: syscall.EHOSTUNREACH,
		windows.WSAENETUNREACH:  syscall.ENETUNREACH,
		windows.WSAETIMEDOUT:    syscall.ETIMEDOUT,
		windows.WSAEACCES:       syscall.EACCES,
		windows.WSAEADDRINUSE:   syscall.EADDRINUSE,
	} {
		if errors.Is(err, from) {
			return fmt.Errorf("%w (%w)", err, to)
		}
	}
	return err
}
