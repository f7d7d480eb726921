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

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/netstack"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// A wire is both ends of a channel, as its room has them.
type wire struct {
	dial  func(ctx context.Context, conn net.Conn, id identity) (channel.Channel, error)
	serve func(ctx context.Context, conn net.Conn, id identity, network channel.Network) error
}

// identity is the key of an end and the public one of its peer, as
// sshchan.GenerateKey wrote them.
type identity struct{ private, peer []byte }

var wires = map[string]wire{
	"ssh": {
		dial: func(ctx context.Context, conn net.Conn, id identity) (channel.Channel, error) {
			i, err := sshchan.ParseIdentity(id.private, id.peer)
			if err != nil {
				return nil, err
			}
			return sshchan.Dial(ctx, conn, sshchan.Config{Identity: i})
		},
		serve: func(ctx context.Context, conn net.Conn, id identity, network channel.Network) error {
			i, err := sshchan.ParseIdentity(id.private, id.peer)
			if err != nil {
				return err
			}
			return sshchan.Serve(ctx, conn, sshchan.Config{Identity: i}, network)
		},
	},
}

// writeKeys makes the keys of both ends, for OpenSSH and for ours.
func writeKeys() error {
	for _, name := range []string{"near", "far"} {
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

func readIdentity(dir, own, peer string) (id identity, err error) {
	if id.private, err = os.ReadFile(filepath.Join(dir, own)); err != nil {
		return id, err
	}
	id.peer, err = os.ReadFile(filepath.Join(dir, peer+".pub"))
	return id, err
}

func wireNamed(name string) (wire, error) {
	w, ok := wires[name]
	if !ok {
		return w, fmt.Errorf("no wire %q", name)
	}
	return w, nil
}

// farMain is the role "far": what the shadow serves, on a plain TCP port.
func farMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("far", flag.ContinueOnError)
	name, keys, listen := f.String("wire", "", "wire"), f.String("keys", "", "folder"), f.String("listen", "", "address")
	if err := f.Parse(args); err != nil {
		return err
	}
	w, err := wireNamed(*name)
	if err != nil {
		return err
	}
	id, err := readIdentity(*keys, "far", "near")
	if err != nil {
		return err
	}
	l, err := (&channel.Host{}).Listen(ctx, "tcp", *listen)
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
			if err := w.serve(ctx, c, id, &channel.Host{}); !errors.Is(err, net.ErrClosed) {
				fmt.Fprintln(os.Stderr, "far:", err)
			}
		})
	}
}

// nearMTU is what culvert connect gives its device.
const nearMTU = 65535

// nearMain is the role "near": what culvert connect does on the laptop with
// packets, and no more of it.
func nearMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("near", flag.ContinueOnError)
	name, keys, to, route := f.String("wire", "", "wire"), f.String("keys", "", "folder"), f.String("to", "", "address"), f.String("route", "", "prefix")
	if err := f.Parse(args); err != nil {
		return err
	}
	ch, err := dialWire(ctx, *name, *keys, *to)
	if err != nil {
		return err
	}
	defer ch.Close()
	stack, err := openStack(ch, *route)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return stack.Run(ctx) })
	g.Go(func() error {
		defer context.AfterFunc(ctx, func() { ch.Close() })()
		if err := ch.Wait(); ctx.Err() == nil {
			return err
		}
		return nil
	})
	return g.Wait()
}

func dialWire(ctx context.Context, name, keys, to string) (channel.Channel, error) {
	w, err := wireNamed(name)
	if err != nil {
		return nil, err
	}
	id, err := readIdentity(keys, "near", "far")
	if err != nil {
		return nil, err
	}
	conn, err := (&channel.Host{}).DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	return w.dial(ctx, conn, id)
}

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
	own, _ := tun.FreeAddrs([]netip.Prefix{to})
	link := tun.Link{Name: device.Name()}
	if err := errors.Join(link.Configure(nearMTU, own), link.SetRoutes([]netip.Prefix{to})); err != nil {
		return nil, errors.Join(err, device.Close())
	}
	stack, err := netstack.New(netstack.Config{Device: device, MTU: nearMTU, Network: network})
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	return stack, nil
}
