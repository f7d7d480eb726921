package privileged

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/fdpass"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// undoTime bounds the undo list, so that no daemon that hangs keeps the child.
const undoTime = 10 * time.Second

// child is what the requests have made so far: the undo list.
type child struct {
	log      *slog.Logger
	resolver *resolver.Resolver

	link   tun.Link
	index  int
	addrs  []netip.Addr
	routes []netip.Prefix
	keep   io.Closer // holds the device, and so its name, until the undo is done
}

// Serve answers the requests on conn until it ends, then undoes what they did.
// It returns the error of the undo; that conn ended, however, is none.
func Serve(ctx context.Context, conn *net.UnixConn, log *slog.Logger) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	c := &child{log: log, resolver: resolver.New(resolver.Config{Log: log})}
	err := c.serve(ctx, conn)
	undoErr := c.undo()
	if ended(err) {
		err = nil
	}
	return errors.Join(err, undoErr)
}

// serve answers, and follows what others write meanwhile.
func (c *child) serve(ctx context.Context, conn *net.UnixConn) error {
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	following.Go(func() {
		if err := c.resolver.Run(ctx); err != nil {
			c.log.Warn("what others write to resolv.conf is not followed", "error", err)
		}
	})
	defer following.Wait()
	defer cancel()
	return c.answer(ctx, conn)
}

func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// answer does one request after the other. A frame that cannot be read ends
// it: where the next would begin is not known.
func (c *child) answer(ctx context.Context, conn *net.UnixConn) error {
	if err := fdpass.Send(conn, answer{Greeting: protocol, Root: os.Geteuid() == 0}); err != nil {
		return err
	}
	for {
		var req request
		files, err := fdpass.Receive(conn, &req)
		fdpass.Close(files) // none is ever asked for
		if err != nil {
			return err
		}
		a, files, err := c.do(ctx, req)
		if err != nil {
			a = failed(err)
		}
		err = fdpass.Send(conn, a, files...)
		fdpass.Close(files)
		if err != nil {
			return err
		}
	}
}

func (c *child) do(ctx context.Context, req request) (answer, []*os.File, error) {
	switch req.Op {
	case opTUN:
		return c.openTUN(req.TUN)
	case opRoutes:
		return answer{}, nil, c.setRoutes(req.Routes)
	case opDNS:
		return c.setDNS(ctx, req.DNS)
	case opListen:
		return c.listen(ctx, req.Listen)
	case opRestore:
		return answer{}, nil, c.resolver.Restore(ctx)
	case opUndo:
		return answer{}, nil, c.undo()
	}
	return answer{}, nil, refuse("request %q", req.Op)
}

func (c *child) openTUN(want *TUN) (a answer, files []*os.File, err error) {
	if want == nil || c.keep != nil {
		return a, nil, refuse("one device, once")
	}
	if err := want.check(); err != nil {
		return a, nil, err
	}
	dev, err := tun.Open(want.Name)
	if err != nil {
		return a, nil, err
	}
	defer dev.Close()
	addrs := slices.Clone(want.Addrs)
	if !tun.HasIPv6() {
		addrs = slices.DeleteFunc(addrs, netip.Addr.Is6)
	}
	link := tun.Link{Name: dev.Name()}
	if err := link.Configure(want.MTU, addrs...); err != nil {
		return a, nil, err
	}
	ifc, err := net.InterfaceByName(link.Name)
	if err != nil {
		return a, nil, fmt.Errorf("find %s: %w", link.Name, err)
	}
	give, err := c.hold(dev)
	if err != nil {
		return a, nil, err
	}
	c.link, c.index, c.addrs = link, ifc.Index, addrs
	return answer{Index: ifc.Index, Addrs: addrs}, []*os.File{give}, nil
}

// hold keeps a descriptor of the device and returns another to give away. The
// one that stays is not known to the runtime's poller, which would wake this
// process for every packet that the other process reads.
func (c *child) hold(dev *tun.Device) (*os.File, error) {
	keep, err := duplicate(dev.File())
	if err != nil {
		return nil, err
	}
	give, err := duplicate(dev.File())
	if err != nil {
		return nil, errors.Join(err, keep.Close())
	}
	c.keep = keep
	return os.NewFile(uintptr(give), dev.Name()), nil
}

func (c *child) setRoutes(all []netip.Prefix) error {
	if c.keep == nil {
		return refuse("no device")
	}
	if err := CheckRoutes(all); err != nil {
		return err
	}
	c.routes = all
	return c.link.SetRoutes(all)
}

// setDNS takes the names and the server from the request; the link is ours.
func (c *child) setDNS(ctx context.Context, want *resolver.Settings) (answer, []*os.File, error) {
	if want == nil || want.IsZero() {
		return answer{Plan: &resolver.Plan{}}, nil, c.resolver.Set(ctx, resolver.Settings{})
	}
	leads := want.Server.IsValid() && slices.Contains(c.routes, netip.PrefixFrom(want.Server, want.Server.BitLen()))
	if !leads && !slices.Contains(c.addrs, want.Server) {
		return answer{}, nil, refuse("server %v is not an address of the device, nor does a route to that alone lead there", want.Server)
	}
	s := *want
	s.Link, s.LinkIndex = c.link.Name, c.index
	if err := c.resolver.Set(ctx, s); err != nil {
		return answer{}, nil, err
	}
	plan := c.resolver.Plan()
	return answer{Plan: &plan}, nil, nil
}

// listen binds port 53, which needs root, of an address of the device only.
func (c *child) listen(ctx context.Context, addr netip.Addr) (a answer, files []*os.File, err error) {
	if !slices.Contains(c.addrs, addr) {
		return a, nil, refuse("%v is not an address of the device", addr)
	}
	at := netip.AddrPortFrom(addr, 53)
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(ctx, "udp", at.String())
	if err != nil {
		return a, nil, err
	}
	defer pc.Close()
	ln, err := lc.Listen(ctx, "tcp", at.String())
	if err != nil {
		return a, nil, err
	}
	defer ln.Close()
	udp, err := pc.(*net.UDPConn).File()
	if err != nil {
		return a, nil, err
	}
	tcp, err := ln.(*net.TCPListener).File()
	if err != nil {
		return a, nil, errors.Join(err, udp.Close())
	}
	return a, []*os.File{udp, tcp}, nil
}

// undo puts everything back, names first: they lead where routes then end. It
// may be called again, and then does what failed before.
func (c *child) undo() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTime)
	defer cancel()
	err := c.resolver.Set(ctx, resolver.Settings{})
	if c.keep == nil {
		return err
	}
	if routeErr := c.link.SetRoutes(nil); routeErr != nil && !c.gone() {
		err = errors.Join(err, routeErr)
	}
	if err == nil {
		err = c.keep.Close()
		c.keep, c.addrs = nil, nil
	}
	return err
}

// gone tells whether somebody deleted the device meanwhile.
func (c *child) gone() bool {
	_, err := net.InterfaceByIndex(c.index)
	return err != nil
}
