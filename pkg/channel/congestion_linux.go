package channel

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Congestion is the Control of a net.Dialer, or of a net.ListenConfig, for sockets
// that carry a wire: they use BBR where the kernel lets them (tcp(7), TCP_CONGESTION,
// and net.ipv4.tcp_allowed_congestion_control), and else what is usual there. Flows
// end at both ends of a wire, so that how it deals with loss is theirs, too.
func Congestion(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { useBBR(int(fd)) })
}

func useBBR(fd int) { _ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr") }

// CongestionName is what Congestion comes to on this machine, "" if that cannot be told.
func CongestionName() string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	useBBR(fd)
	name, _ := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	return strings.TrimRight(name, "\x00")
}
