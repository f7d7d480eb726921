package wgchan

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// BenchmarkBeside measures one flow from the laptop through a router, of this wire and
// of WireGuard between two kernels, which is as fast as packets can be.
func BenchmarkBeside(b *testing.B) {
	for _, up := range []bool{true, false} {
		name := map[bool]string{true: "Up", false: "Down"}[up]
		b.Run("Wire"+name, func(b *testing.B) {
			w := newWorld(b)
			ch := w.dial(w.site(), far4)
			besides(b, up, "127.0.0.1", func(address string) (net.Conn, error) {
				return ch.DialContext(context.Background(), "tcp", address)
			})
		})
		b.Run("Kernels"+name, func(b *testing.B) {
			w := newWorld(b)
			w.kernels(b)
			besides(b, up, "10.77.0.1", func(address string) (c net.Conn, err error) {
				err = in(w.laptop, func() error { c, err = net.Dial("tcp", address); return err })
				return c, err
			})
		})
	}
}

// besides moves b.N MiB.
func besides(b *testing.B, up bool, host string, dial func(string) (net.Conn, error)) {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	move := func(c net.Conn, send bool) {
		buf := make([]byte, 1<<20)
		if !send {
			io.Copy(io.Discard, c)
			c.Write(buf[:1])
			return
		}
		for range b.N {
			c.Write(buf)
		}
		c.(channel.CloseWriter).CloseWrite()
		c.Read(buf[:1])
	}
	go func() {
		if c, err := l.Accept(); err == nil {
			move(c, !up)
			c.Close()
		}
	}()
	c, err := dial(l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.SetBytes(1 << 20)
	b.ResetTimer()
	move(c, up)
}

// kernels has WireGuard between a TUN device here and one on the laptop.
func (w *world) kernels(b *testing.B) {
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		keys[i], _ = ecdh.X25519().GenerateKey(rand.Reader)
	}
	end := func(i int, endpoint string) error {
		d, err := tun.CreateTUN(fmt.Sprintf("cv-wg-%d", i), stockMTU)
		if err != nil {
			return err
		}
		wg := device.NewDevice(d, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
		b.Cleanup(wg.Close)
		err = wg.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=5182%d\npublic_key=%x\nallowed_ip=10.77.0.0/24\n%s",
			keys[i].Bytes(), i, keys[1-i].PublicKey().Bytes(), endpoint))
		if err == nil {
			err = wg.Up()
		}
		if err != nil {
			return err
		}
		return w.address(fmt.Sprintf("cv-wg-%d", i), fmt.Sprintf("10.77.0.%d/24", i+1))
	}
	w.must(end(0, ""))
	w.must(in(w.laptop, func() error { return end(1, "endpoint="+far4+":51820\n") }))
}
