package main

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
)

// nearWireGuard carries the device's packets over UDP, and else does as overTCP.
func nearWireGuard(ctx context.Context, e end) error {
	cfg, err := e.config("near", "far")
	if err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(e.far)
	if err != nil {
		return err
	}
	own, err := e.x25519("near")
	if err != nil {
		return err
	}
	ch, err := wires.DialUDP(ctx, []netip.AddrPort{to}, own, []netip.Addr{nearAddr}, cfg)
	if err != nil {
		return err
	}
	return throughStack(ctx, ch)
}

func farWireGuard(ctx context.Context, e end) error {
	cfg, err := e.config("far", "near")
	if err != nil {
		return err
	}
	at, err := netip.ParseAddrPort(e.far)
	if err != nil {
		return err
	}
	u, err := wires.ListenUDP(at.Port(), cfg)
	if err != nil {
		return err
	}
	defer u.Close()
	near, err := e.x25519("near")
	if err != nil {
		return err
	}
	if err := u.Serve(ctx, near.PublicKey(), []netip.Addr{nearAddr}, func() {}, &channel.Host{}); ctx.Err() == nil {
		return err
	}
	return nil
}

// WireGuard that ends in kernels is what a WireGuard that ends in flows is measured by:
// wireguard-go with a TUN device at either end, and no TCP but that of client and service.

const nearDevice = `
	ip addr add 10.211.3.1/24 dev wg
	ip link set wg up
	ip route add 10.211.2.0/24 dev wg src 10.211.3.1 congctl cubic`

// The far end forwards what comes out of the tunnel, and the answers; see world.go.
const (
	farDevice = `
	ip addr add 10.211.3.2/24 dev wg
	ip link set wg up
	sysctl -qw net.ipv4.conf.wg.forwarding=1
	sysctl -qw net.ipv4.conf.service.forwarding=1`

	farDeviceGone = `
	sysctl -qw net.ipv4.conf.service.forwarding=0`
)

func nearKernel(ctx context.Context, e end) error {
	return e.device(ctx, "near", "far", "endpoint="+e.far, nearDevice, "")
}

func farKernel(ctx context.Context, e end) error {
	return e.device(ctx, "far", "near", "", farDevice, farDeviceGone)
}

// device has WireGuard run until ctx ends, between one host's commands and others.
func (e end) device(ctx context.Context, own, peer, where, begin, end string) error {
	t, err := tun.CreateTUN("wg", device.DefaultMTU)
	if err != nil {
		return err
	}
	d := device.NewDevice(t, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, "wireguard-go: "))
	defer d.Close()
	config, err := e.uapi(own, peer, where)
	if err == nil {
		err = errors.Join(d.IpcSet(config), d.Up(), commands(begin))
	}
	if err == nil {
		<-ctx.Done()
	}
	return errors.Join(err, commands(end))
}

// x25519 makes a key of WireGuard of another: nothing here is a secret.
func (e end) x25519(name string) (*ecdh.PrivateKey, error) {
	b, err := os.ReadFile(filepath.Join(e.keys, name))
	if err != nil {
		return nil, err
	}
	seed := sha256.Sum256(b)
	return ecdh.X25519().NewPrivateKey(seed[:])
}

// uapi is how WireGuard is told of its keys, and of the other end.
func (e end) uapi(own, peer, where string) (string, error) {
	at, err := netip.ParseAddrPort(e.far)
	if err != nil {
		return "", err
	}
	var keys [2]*ecdh.PrivateKey
	for i, name := range []string{own, peer} {
		if keys[i], err = e.x25519(name); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("private_key=%x\nlisten_port=%d\npublic_key=%x\nallowed_ip=0.0.0.0/0\n%s\n",
		keys[0].Bytes(), at.Port(), keys[1].PublicKey().Bytes(), where), nil
}
