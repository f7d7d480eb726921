package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

const (
	maxFlows    = 256 // of one association
	flowQueue   = 32  // datagrams of a flow that wait, as while it is dialled
	maxDatagram = 65535
	udpHeader   = 3 // before an address: two bytes that are reserved, and the number of a fragment
)

// An association carries a program's datagrams, for as long as the connection is open
// that asked for it. Each address that the program writes to is a flow of its own.
type association struct {
	to relay.Dialer

	mu    sync.Mutex
	flows map[string]*flow
}

// A flow is what goes to one address, and what comes from there.
type flow struct {
	program net.Conn
	header  []byte // of its datagrams, as the program writes the address
	queue   chan []byte
}

// associate binds a port for the program on the address it has come to. wanted says where
// its datagrams will come from, if it knows that already.
func associate(ctx context.Context, c net.Conn, to relay.Dialer, wanted address) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	here, there := addrPort(c.LocalAddr()), addrPort(c.RemoteAddr())
	l, err := (&channel.Host{}).Listen(ctx, "udp", netip.AddrPortFrom(here.Addr(), 0).String())
	if err != nil {
		leave(c, reply(replies[failed], netip.AddrPort{}))
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a := &association{to: to, flows: map[string]*flow{}}
		a.serve(ctx, l, netip.AddrPortFrom(there.Addr().Unmap(), wanted.port()))
	}()
	if _, err := c.Write(reply(succeeded, addrPort(l.Addr()))); err == nil {
		io.Copy(io.Discard, c)
	}
	cancel()
	<-ended
}

// serve takes datagrams of the program alone: from its address, and of its ports the first.
func (a *association) serve(ctx context.Context, l net.Listener, program netip.AddrPort) {
	var all sync.WaitGroup
	defer all.Wait()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		from := addrPort(c.RemoteAddr())
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if program.Port() == 0 && from.Addr() == program.Addr() {
			program = from
		}
		if from == program {
			a.read(ctx, c, &all) // until it was silent for long
		}
		c.Close()
	}
}

// read takes the program's datagrams to their flows.
func (a *association) read(ctx context.Context, program net.Conn, all *sync.WaitGroup) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := program.Read(buf)
		if err != nil {
			return
		}
		to, data, err := cutDatagram(buf[:n])
		if err != nil {
			continue
		}
		f, begun := a.flow(program, to)
		if begun {
			host := to.String()
			all.Go(func() { a.run(ctx, f, host) })
		}
		if f == nil {
			continue
		}
		select {
		case f.queue <- append([]byte(nil), data...):
		default: // as where a path is full
		}
	}
}

// cutDatagram splits what a program sends. A fragment is left out, as is allowed.
func cutDatagram(b []byte) (to address, data []byte, err error) {
	if len(b) < udpHeader {
		return nil, nil, io.ErrUnexpectedEOF
	}
	if b[2] != 0 {
		return nil, nil, errors.New("a fragment")
	}
	return cutAddress(b[udpHeader:])
}

// flow finds that of an address, or begins one; nil is that there are too many.
func (a *association) flow(program net.Conn, to address) (f *flow, begun bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if f := a.flows[string(to)]; f != nil || len(a.flows) == maxFlows {
		return f, false
	}
	f = &flow{program: program, header: append(make([]byte, udpHeader), to...), queue: make(chan []byte, flowQueue)}
	a.flows[string(to)] = f
	return f, true
}

// run carries a flow until it is silent, fails, or ctx ends.
func (a *association) run(ctx context.Context, f *flow, host string) {
	defer a.forget(f)
	far, err := dial(ctx, ctx, a.to, "udp", host)
	if err != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	var out sync.WaitGroup
	defer out.Wait()
	defer cancel()
	defer far.Close()
	defer context.AfterFunc(ctx, func() { far.Close() })()
	far.SetReadDeadline(time.Now().Add(relay.DefaultIdle))
	out.Go(func() {
		defer far.Close()
		f.write(ctx, far)
	})
	f.answer(far)
}

// write takes what waits to far. What goes out keeps the flow, as what comes in does.
func (f *flow) write(ctx context.Context, far net.Conn) {
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-f.queue:
			far.SetReadDeadline(time.Now().Add(relay.DefaultIdle))
			if _, err := far.Write(b); err != nil && !relay.Lost(err) {
				return
			}
		}
	}
}

// answer takes what comes from far to the program.
func (f *flow) answer(far net.Conn) {
	buf := make([]byte, len(f.header)+maxDatagram)
	n := copy(buf, f.header)
	for {
		m, err := far.Read(buf[n:])
		if err != nil {
			return
		}
		far.SetReadDeadline(time.Now().Add(relay.DefaultIdle))
		if _, err := f.program.Write(buf[:n+m]); errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

func (a *association) forget(f *flow) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.flows, string(f.header[udpHeader:]))
}
