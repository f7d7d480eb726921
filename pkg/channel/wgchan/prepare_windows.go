package wgchan

import (
	"syscall"

	"golang.org/x/sys/windows"
)

// Of ws2ipdef.h.
const ipDontFragment, ipv6DontFragment = 14, 14

// prepare makes a socket one of both families, whose packets arrive whole or not at all.
func prepare(c syscall.RawConn) {
	c.Control(func(fd uintptr) {
		windows.SetsockoptInt(windows.Handle(fd), windows.IPPROTO_IPV6, windows.IPV6_V6ONLY, 0)
		windows.SetsockoptInt(windows.Handle(fd), windows.IPPROTO_IP, ipDontFragment, 1)
		windows.SetsockoptInt(windows.Handle(fd), windows.IPPROTO_IPV6, ipv6DontFragment, 1)
	})
}
