package wgchan

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"

	"golang.zx2c4.com/wireguard/device"
)

// A tunnel is WireGuard between a UDP socket and a seam.
type tunnel struct {
	*seam
	device *device.Device
	bind   *bind
}

// newTunnel listens at a UDP port, or at any if that is 0.
func newTunnel(private any, port uint16, control func(string, string, syscall.RawConn) error) (*tunnel, error) {
	k, err := privateKey(private)
	if err != nil {
		return nil, err
	}
	t := &tunnel{seam: newSeam()}
	t.bind = &bind{control: control, left: t.left, received: t.received}
	t.device = device.NewDevice(t.seam, t.bind, device.NewLogger(device.LogLevelSilent, ""))
	err = t.device.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\n", k.hex(), port))
	if err == nil {
		err = t.device.Up()
	}
	if err != nil {
		t.device.Close()
		return nil, fmt.Errorf("listen at udp port %d: %w", port, err)
	}
	return t, nil
}

// admit lets a peer in that sends from these addresses.
func (t *tunnel) admit(peer key, from []netip.Prefix, at endpoint) error {
	var set strings.Builder
	fmt.Fprintf(&set, "public_key=%s\nreplace_allowed_ips=true\n", peer.hex())
	if len(at) > 0 {
		fmt.Fprintf(&set, "endpoint=%s\n", at)
	}
	for _, p := range from {
		fmt.Fprintf(&set, "allowed_ip=%s\n", p)
	}
	return t.device.IpcSet(set.String())
}

func (t *tunnel) expel(peer key) error {
	return t.device.IpcSet(fmt.Sprintf("public_key=%s\nremove=true\n", peer.hex()))
}

func (t *tunnel) close() { t.device.Close() }
