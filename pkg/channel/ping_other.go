//go:build !linux && !darwin

package channel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
)

func (h *Host) openPing(netip.Addr) (net.Conn, error) {
	return nil, fmt.Errorf("no echo sockets on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
