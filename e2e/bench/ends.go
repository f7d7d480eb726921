package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/proxy"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// An end is what the roles "far" and "near" are told.
type end struct {
	keys       string // folder
	far        string // the address where the far end listens
	congestion string // of the wire's TCP; empty is the host's
}

// A wire is what its two ends do, until ctx ends.
type wire struct {
	near, far func(ctx context.Context, e end) error
}

var kinds = map[string]wire{
	"ssh":          overTCP(wires.SSH, throughStack),
	"tls":          overTCP(wires.TLS, throughStack),
	"tls-proxy":    overTCP(wires.TLS, throughProxy),
	"each":         {nearEach, farEach},
	"wireguard":    {nearWireGuard, farWireGuard},
	"wireguard-go": {nearKernel, farKernel},
}

// endMain is the role "far" or "near".
func endMain(pick func(wire) func(context.Context, end) error) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		var e end
		f := flag.NewFlagSet("end", flag.ContinueOnError)
		name := f.String("wire", "", "wire")
		f.StringVar(&e.keys, "keys", "", "folder of the keys")
		f.StringVar(&e.far, "far", "", "address of the far end")
		f.StringVar(&e.congestion, "congestion", "", "congestion control of the wire")
		if err := f.Parse(args); err != nil {
			return err
		}
		w, ok := kinds[*name]
		if !ok {
			return fmt.Errorf("no wire %q", *name)
		}
		return pick(w)(ctx, e)
	}
}

// congest sets the congestion control of a connection; while it is made its route
// would have the last word.
func (e end) congest(c net.Conn) (err error) {
	if e.congestion == "" {
		return nil
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, e.congestion)
	}), err)
}

// dial connects to the far end.
func (e end) dial(ctx context.Context) (net.Conn, error) {
	c, err := (&channel.Host{}).DialContext(ctx, "tcp", e.far)
	if err != nil {
		return nil, err
	}
	return c, e.congest(c)
}

// accept serves each connection to the far end, until ctx ends.
func (e end) accept(ctx context.Context, serve func(net.Conn) error) error {
	l, err := (&channel.Host{}).Listen(ctx, "tcp", e.far)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var served sync.WaitGroup
	defer served.Wait()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		served.Go(func() {
			if err := errors.Join(e.congest(c), serve(c)); err != nil && !errors.Is(err, net.ErrClosed) {
				fmt.Fprintln(os.Stderr, "far:", err)
			}
		})
	}
}

// writeKeys makes the keys of both ends, and of a hub, for OpenSSH and for ours.
func writeKeys() error {
	for _, name := range []string{"near", "far", "hub"} {
		private, public, err := sshchan.GenerateKey("culvert bench " + name)
		if err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(inScratch(name), private, 0o600), os.WriteFile(inScratch(name+".pub"), public, 0o600)); err != nil {
			return err
		}
	}
	return nil
}

// config has the key of an end, and the public one of its peer.
func (e end) config(own, peer string) (cfg wires.Config, err error) {
	private, err := os.ReadFile(filepath.Join(e.keys, own))
	if err != nil {
		return cfg, err
	}
	public, err := os.ReadFile(filepath.Join(e.keys, peer+".pub"))
	if err != nil {
		return cfg, err
	}
	cfg.Keys, err = wires.ParseKeys(private, public)
	return cfg, err
}

// overTCP makes a wire of a channel over TCP, or several. The far end is what the
// shadow serves; the near one does on the laptop with packets what culvert connect
// does, and no more of it, or with programs what culvert proxy does.
func overTCP(w wires.Wire, through func(context.Context, channel.Channel) error) wire {
	far := func(ctx context.Context, e end) error {
		cfg, err := e.config("far", "near")
		if err != nil {
			return err
		}
		return e.accept(ctx, func(c net.Conn) error { return w.Serve(ctx, c, cfg, &channel.Host{}) })
	}
	near := func(ctx context.Context, e end) error {
		cfg, err := e.config("near", "far")
		if err != nil {
			return err
		}
		another := func(ctx context.Context) (channel.Lane, error) {
			conn, err := e.dial(ctx)
			if err != nil {
				return nil, err
			}
			return w.Dial(ctx, conn, cfg)
		}
		first, err := another(ctx)
		if err != nil {
			return err
		}
		ch := channel.Spread(first, another)
		defer ch.Close()
		return through(ctx, ch)
	}
	return wire{near, far}
}

// throughStack carries what the device brings over a channel, while that lasts.
func throughStack(ctx context.Context, ch channel.Channel) error {
	stack, err := openStack(ch, serviceNet)
	if err != nil {
		return errors.Join(err, ch.Close())
	}
	return whileOpen(ctx, ch, stack.Run)
}

// throughProxy carries what programs bring that speak SOCKS5.
func throughProxy(ctx context.Context, ch channel.Channel) error {
	l, err := (&channel.Host{}).Listen(ctx, "tcp", address("127.0.0.1", socksPort))
	if err != nil {
		return errors.Join(err, ch.Close())
	}
	return whileOpen(ctx, ch, func(ctx context.Context) error { return proxy.SOCKS(ctx, l, ch) })
}

func whileOpen(ctx context.Context, ch channel.Channel, run func(context.Context) error) error {
	defer ch.Close()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return run(ctx) })
	g.Go(func() error {
		defer context.AfterFunc(ctx, func() { ch.Close() })()
		if err := ch.Wait(); ctx.Err() == nil {
			return err
		}
		return nil
	})
	return g.Wait()
}

// nearMTU is what culvert connect gives its device.
const nearMTU = 65535

// nearAddr is that of the device, which the far end of WireGuard is told.
var nearAddr = netip.MustParseAddr("198.18.0.1")

// openStack leads a route to what the far end dials.
func openStack(network channel.Network, route string) (*netstack.Stack, error) {
	to, err := netip.ParsePrefix(route)
	if err != nil {
		return nil, err
	}
	device, err := tun.Open("")
	if err != nil {
		return nil, err
	}
	link := tun.Link{Name: device.Name()}
	if err := errors.Join(link.Configure(nearMTU, nearAddr), link.SetRoutes([]netip.Prefix{to})); err != nil {
		return nil, errors.Join(err, device.Close())
	}
	stack, err := netstack.New(netstack.Config{Device: device, MTU: nearMTU, Network: network})
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	return stack, nil
}
