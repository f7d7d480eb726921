package channel

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// Congestion is the Control of a net.Dialer, or of a net.ListenConfig, for sockets
// that carry a wire: they use BBR where the kernel lets them (tcp(7), TCP_CONGESTION,
// and net.ipv4.tcp_allowed_congestion_control), and else what is usual there. Flows
// end at both ends of a wire, so that how it deals with loss is theirs, too.
func Congestion(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr")
	})
}
