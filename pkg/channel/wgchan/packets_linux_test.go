package wgchan

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// Behind the far end, and where the laptop's device leads.
const (
	web4, web6   = "10.66.3.1", "fd66:3::1"
	webs4, webs6 = "10.66.3.0/24", "fd66:3::/64"
)

// device has the laptop's kernel reach what is behind the far end, by a TUN device and
// a netstack, over n.
func (w *world) device(n channel.Network) *netstack.Stack {
	w.t.Helper()
	w.must(w.address(farLink, far4+"/24", far6+"/64", web4+"/32", web6+"/128"))
	w.must(w.route(farLink, "10.66.2.254", "fd66:2::254"))
	var d *tun.Device
	w.must(in(w.laptop, func() (err error) {
		// As kernels come: windows of more are nobody's.
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_rmem", []byte("4096 131072 6291456"), 0); err != nil {
			return err
		}
		if d, err = tun.Open("cv-wg-tun"); err != nil {
			return err
		}
		l := tun.Link{Name: d.Name()}
		if err := l.Configure(maxPacket, laptopAddrs...); err != nil {
			return err
		}
		return l.SetRoutes([]netip.Prefix{netip.MustParsePrefix(webs4), netip.MustParsePrefix(webs6)})
	}))
	stack, err := netstack.New(netstack.Config{Device: d, MTU: maxPacket, Network: n})
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- stack.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			w.t.Errorf("netstack: %v", err)
		}
	})
	return stack
}

// kernel dials on the laptop.
func (w *world) kernel(network, address string) (c net.Conn, err error) {
	err = in(w.laptop, func() error {
		c, err = net.DialTimeout(network, address, 10*time.Second)
		return err
	})
	return c, err
}

// farSite is a site that is reached by a relay in front of the far end.
func (w *world) farSite(delay time.Duration) *site {
	return siteAt(w.t, wiretest.Beats{Every: 500 * time.Millisecond}, newLane(0, 0, delay), newLane(0, 0, delay), &channel.Host{})
}

// dialWay dials by the relay.
func (w *world) dialWay(s *site) *Channel {
	w.t.Helper()
	s.near.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(far4), s.way.address().Port())}
	return w.dialNear(s)
}

// flows hides that a Channel carries packets.
type flows struct{ channel.Network }

// served answers at an address behind the far end.
func (w *world) served(network, host string) string {
	w.t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket(network, net.JoinHostPort(host, "0"))
		w.must(err)
		w.t.Cleanup(func() { c.Close() })
		go func() {
			buf := make([]byte, maxPacket)
			for {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				c.WriteTo(buf[:n], from)
			}
		}()
		return c.LocalAddr().String()
	}
	l, err := net.Listen(network, net.JoinHostPort(host, "0"))
	w.must(err)
	w.t.Cleanup(func() { l.Close() })
	go echoAll(l)
	return l.Addr().String()
}

// echoes is a flow of the laptop's kernel.
func (w *world) echoes(t *testing.T, address string) *echoes {
	t.Helper()
	c, err := w.kernel("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	e := &echoes{t: t, c: c}
	t.Cleanup(func() {
		c.Close()
		e.wg.Wait()
	})
	return e
}

// TestDevice: the laptop's kernel reaches what is behind the far end, and no flow ends
// on the way.
func TestDevice(t *testing.T) {
	w := newWorld(t)
	s := w.site()
	ch := w.dial(s, far4)
	stack := w.device(ch)
	for _, host := range []string{web4, web6} {
		tcp, udp := w.served("tcp", host), w.served("udp", host)
		t.Run(host, func(t *testing.T) {
			before := ch.w.many()
			e := w.echoes(t, tcp)
			e.move(20 << 20)
			if n := ch.w.many(); n != before || stack.Stats().TCP.Open != 1 {
				t.Errorf("%d streams, %d flows", n, stack.Stats().TCP.Open)
			}
			w.mtu(w.router, toFar, 1400)
			e.move(4 << 20)
			w.mtu(w.router, toFar, 1500)
			e.c.(*net.TCPConn).CloseWrite()
			if n, err := e.c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("read %d, %v; want the end", n, err)
			}
			w.datagrams(t, udp)
			w.refused(t, host)
			w.ping(t, host)
		})
	}
}

// datagrams are of all sizes.
func (w *world) datagrams(t *testing.T, address string) {
	c, err := w.kernel("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, maxPacket)
	for _, size := range []int{0, 1, 1300, 1392, 1393, 1500, 9001, 65000, 65487, 65507} {
		sent := make([]byte, size)
		rand.Read(sent)
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write(sent); err != nil {
			t.Errorf("write %d: %v", size, err)
		}
		if n, err := c.Read(buf); err != nil || !bytes.Equal(buf[:n], sent) {
			t.Errorf("%d bytes of %d came back, %v", n, size, err)
		}
	}
}

func (w *world) refused(t *testing.T, host string) {
	began := time.Now()
	_, err := w.kernel("tcp", net.JoinHostPort(host, "1"))
	if took := time.Since(began); !errors.Is(err, syscall.ECONNREFUSED) || took > 500*time.Millisecond {
		t.Errorf("dial: %v after %v", err, took)
	}
}

func (w *world) ping(t *testing.T, host string) {
	var c net.Conn
	err := in(w.laptop, func() (err error) {
		os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0)
		c, err = (&channel.Host{}).DialContext(t.Context(), "ping", host)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	request := []byte{8, 0, 0, 0, 0, 1, 0, 1, 'h', 'i'}
	if strings.Contains(host, ":") {
		request[0] = 128
	}
	c.Write(request)
	if _, err := c.Read(make([]byte, 100)); err != nil {
		t.Errorf("ping %s: %v", host, err)
	}
}

// switched is a Carrier that is told whether it is one.
type switched struct {
	*Channel
	off atomic.Bool
}

func (s *switched) Packets(to netip.Addr) channel.Packets {
	if s.off.Load() {
		return nil
	}
	return s.Channel.Packets(to)
}

// TestDeviceWireChanges: what is open goes on where it began.
func TestDeviceWireChanges(t *testing.T) {
	w := newWorld(t)
	s := w.site()
	n := &switched{Channel: w.dial(s, far4)}
	w.device(n)
	tcp := w.served("tcp", web4)
	n.off.Store(true)
	first := w.echoes(t, tcp)
	first.move(1 << 20)
	n.off.Store(false)
	second := w.echoes(t, tcp)
	second.move(1 << 20)
	if many := n.w.many(); many != 1 {
		t.Errorf("%d streams, want that of the first flow", many)
	}
	first.move(1 << 20)
	n.off.Store(true)
	second.move(1 << 20)
	w.echoes(t, tcp).move(1 << 20)
	first.move(1 << 20)
}

// TestDeviceWireDies: what is open on it is reset, idle or not, and new flows go on
// over the next.
func TestDeviceWireDies(t *testing.T) {
	w := newWorld(t)
	s := w.site()
	s.near.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(far4), s.port.Number())}
	keep := channel.NewKeep(channel.KeepConfig{Open: func(ctx context.Context) (ch channel.Channel, err error) {
		err = in(w.laptop, func() error { ch, err = s.Open(ctx); return err })
		return ch, err
	}})
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- keep.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran; s.End() })
	if err := keep.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	stack := w.device(keep)
	tcp := w.served("tcp", web4)
	idle, busy := w.echoes(t, tcp), w.echoes(t, tcp)
	idle.move(1 << 10)
	wrote := make(chan error, 1)
	go func() {
		_, err := busy.c.Write(make([]byte, 64<<20))
		wrote <- err
	}()
	io.ReadFull(busy.c, make([]byte, 1<<20))
	s.Cut()
	for _, e := range []*echoes{idle, busy} {
		e.c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	if _, err := idle.c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want ECONNRESET", err)
	}
	_, err := io.Copy(io.Discard, busy.c)
	if werr := <-wrote; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(werr, syscall.ECONNRESET) { // one of them is told
		t.Errorf("read: %v, write: %v, want ECONNRESET", err, werr)
	}
	w.echoes(t, tcp).move(1 << 20)
	if open := stack.Stats().TCP.Open; open != 1 {
		t.Errorf("%d flows", open)
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkDevice measures a flow of the laptop's kernel, by packets and by flows.
func BenchmarkDevice(b *testing.B) {
	for _, rtt := range []time.Duration{0, 80 * time.Millisecond} {
		for _, up := range []bool{true, false} {
			for _, packets := range []bool{true, false} {
				b.Run(fmt.Sprintf("rtt=%v/up=%v/packets=%v", rtt, up, packets), func(b *testing.B) {
					w := newWorld(b)
					s := w.farSite(rtt / 2)
					var ch *Channel
					if rtt == 0 {
						ch = w.dial(s, far4)
					} else {
						ch = w.dialWay(s)
					}
					var n channel.Network = ch
					if !packets {
						n = flows{ch}
					}
					w.device(n)
					before := cpu()
					besides(b, up, web4, func(address string) (net.Conn, error) { return w.kernel("tcp", address) })
					b.ReportMetric((cpu()-before).Seconds()/float64(b.N)*1000*0.95, "cpu-s/GB")
				})
			}
		}
	}
}

// BenchmarkDeviceTurns measures questions and answers.
func BenchmarkDeviceTurns(b *testing.B) {
	for _, packets := range []bool{true, false} {
		b.Run(fmt.Sprintf("packets=%v", packets), func(b *testing.B) {
			w := newWorld(b)
			s := w.farSite(0)
			ch := w.dial(s, far4)
			var n channel.Network = ch
			if !packets {
				n = flows{ch}
			}
			w.device(n)
			l, err := net.Listen("tcp", web4+":0")
			w.must(err)
			defer l.Close()
			go func() {
				if c, err := l.Accept(); err == nil {
					io.Copy(c, c)
					c.Close()
				}
			}()
			c, err := w.kernel("tcp", l.Addr().String())
			w.must(err)
			defer c.Close()
			var took []time.Duration
			buf := make([]byte, 100)
			for b.Loop() {
				began := time.Now()
				c.Write(buf)
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
		})
	}
}
