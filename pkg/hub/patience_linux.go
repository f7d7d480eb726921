package hub

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// patience is for how long the kernel sends again what is not acknowledged (tcp(7),
// TCP_USER_TIMEOUT) before it ends a connection, in place of a quarter of an hour: it finds a
// dead path also where this process is not heard from in time.
func patience(c net.Conn, limit time.Duration) {
	socket, ok := c.(syscall.Conn)
	if !ok {
		return // by way of a proxy: the beats of the wire find that
	}
	if raw, err := socket.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(limit.Milliseconds()))
		})
	}
}
