// Package netstack ends the flows that come out of a TUN device: packets become
// flows, and each flow becomes a dial on a Network.
//
// The files are in the order of a packet's way. link.go takes it from the device
// and puts answers back. packet.go reads just enough of it to know whose it is.
// tcp.go, udp.go and ping.go each turn theirs into dials; verdict.go says what
// the app is told when a dial fails.
//
// Two rules shape it. First, nothing is faked: a SYN is answered when the dial
// has succeeded, refused when it was refused, and an echo request has an answer
// when the far end sent one, so echo never reaches gVisor, which would answer
// for any address. Second, what the app's own kernel would have said, it says:
// errors of a dial come back as the RST or the ICMP message that makes the same
// errno of them.
//
// Where the Network carries packets as they are, flows go by it so (pass.go), and end at
// its far end, in a stack of the same kind.
//
// Where the device leads to another machine, by a tunnel, a stack may have addresses
// of its own there, at which it dials and listens (own.go). What is on its way there is
// bounded by what the path holds (flight.go), and losses are told as gVisor listens to
// them (repeat.go).
//
// gVisor is used for what is hard, TCP and reassembly, behind a link endpoint of
// our own: its ready-made one can't take unsegmented TCP from a TUN, which is
// worth a factor of three.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A Device is where packets come from and go to: each Readv and each Writev is
// one of them, scattered over or gathered from the buffers.
type Device interface {
	Readv(bufs [][]byte) (int, error)
	Writev(bufs [][]byte) (int, error) // from several goroutines at once

	// HeaderLen is the length of the virtio-net header before each packet,
	// or 0 where there is none.
	HeaderLen() int

	// Close ends Readv with net.ErrClosed.
	Close() error
}

// Config of a Stack. What is zero has a default, where one is named.
type Config struct {
	Device  Device          // closed when Run returns
	MTU     int             // of the device
	Network channel.Network // which every flow is dialed on; without one, each is refused
	Log     *slog.Logger    // default: discard

	DialTimeout time.Duration // how long a flow may wait for the Network: 60 s
	UDPIdle     time.Duration // a UDP flow without a datagram ends: 60 s
	MaxDials    int           // SYNs being dialed for at once: 4096
	MaxTCP      int           // TCP flows at once: 65536
	MaxPing     int           // ping flows at once: 256

	// Own are the stack's own addresses, of which no flow is dialed. Remote tells
	// that the other end of the device is another machine, and not this one's kernel.
	Own    []netip.Addr
	Remote bool

	// Local tells that the Network is dialed for IPv4 addresses that lead nowhere but
	// to one machine or link (127.0.0.0/8, 169.254.0.0/16), as well.
	Local bool

	// Behind, if set, tells of addresses of what the Network leads to. What comes from
	// there was sent by it to this machine, which would send it there again: it is not
	// dialed, but told that nothing is to be reached here.
	Behind func(netip.Addr) bool

	// MaxUDP is how many UDP flows there are at once: 1024. Each holds a
	// buffer of 64 KiB for either way at the far end, idle or not, so that
	// these are 128 MiB of the 256 MiB that a shadow may have.
	MaxUDP int
}

const (
	nic = 1

	// shortIdle is for flows to port 53: a question, an answer, and no more.
	shortIdle = 10 * time.Second
	pingIdle  = 30 * time.Second

	receiveWindow = 4 << 20
	remoteWindow  = 8 << 20 // a Gbit/s, at 64 ms
	remoteFew     = 16      // flows that begin with it: those that nobody reads fill it
	crowdedWindow = 1 << 20
	remoteReceive = 12 << 20
	remoteSend    = 12 << 20 // see flight

	// Nothing strays between a kernel and its TUN.
	timeWait       = 20 * time.Millisecond
	remoteTimeWait = time.Second
)

// A Stack makes dials of a device's packets.
type Stack struct {
	cfg   Config
	begun chan struct{} // closed when run is set
	run   *run
	tcp   counter
	udp   counter
	pings counter
}

// New returns a Stack that does nothing yet.
func New(cfg Config) (*Stack, error) {
	switch {
	case cfg.Device == nil:
		return nil, errors.New("netstack: no device")
	case cfg.Network == nil && len(cfg.Own) == 0:
		return nil, errors.New("netstack: no network")
	case cfg.MTU < header.IPv6MinimumMTU || cfg.MTU > maxPacket:
		return nil, fmt.Errorf("netstack: mtu %d is not in %d to %d", cfg.MTU, header.IPv6MinimumMTU, maxPacket)
	case cfg.Device.HeaderLen() != 0 && cfg.Device.HeaderLen() != vnetHdrLen:
		return nil, fmt.Errorf("netstack: a virtio-net header of %d bytes is not known", cfg.Device.HeaderLen())
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	or(&cfg.DialTimeout, time.Minute)
	or(&cfg.UDPIdle, time.Minute)
	or(&cfg.MaxDials, 4096)
	or(&cfg.MaxTCP, 65536)
	or(&cfg.MaxUDP, 1024)
	or(&cfg.MaxPing, 256)
	return &Stack{cfg: cfg, begun: make(chan struct{})}, nil
}

func or[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Run serves the device until ctx ends, and returns nil, or until the device
// fails, and returns why: net.ErrClosed where somebody closed it. Flows that
// are open then are reset, as long as there is a device to say so on.
func (s *Stack) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &run{Stack: s, ctx: ctx, dialing: map[stack.TransportEndpointID]*attempt{}, echoes: map[echoKey]*echo{}}
	r.life, r.kill = context.WithCancel(ctx)
	if err := r.build(); err != nil {
		return errors.Join(err, s.cfg.Device.Close())
	}
	s.run = r
	close(s.begun)
	ended := make(chan error, 1)
	go func() { ended <- r.link.run() }()

	var err error
	select {
	case err = <-ended:
		cancel()
		r.drain()
	case <-ctx.Done():
		r.drain()
		err = s.cfg.Device.Close()
		<-ended
	}
	r.ip.Destroy()
	return errors.Join(err, s.closeDevice())
}

// closeDevice is for the second time too.
func (s *Stack) closeDevice() error {
	if err := s.cfg.Device.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Reset resets all flows that are open, and what is being dialed for: who began them
// is gone. Those of the stack's own go on.
func (s *Stack) Reset() {
	<-s.begun
	s.run.mu.Lock()
	defer s.run.mu.Unlock()
	s.run.kill()
	s.run.life, s.run.kill = context.WithCancel(s.run.ctx)
}

// alive is the life of a flow that begins now.
func (r *run) alive() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.life
}

// A run is what lives no longer than Run.
type run struct {
	*Stack
	ctx  context.Context
	ip   *stack.Stack
	link *link

	flight *flight // nil: all flows end on this machine

	mu      sync.Mutex
	over    bool
	flows   sync.WaitGroup
	life    context.Context // of all flows that begin now
	kill    context.CancelFunc
	dialing map[stack.TransportEndpointID]*attempt
	echoes  map[echoKey]*echo
}

// dial is what becomes of a flow that an app at src has begun.
func (r *run) dial(ctx context.Context, src netip.Addr, network, address string) (net.Conn, error) {
	if r.cfg.Behind != nil && r.cfg.Behind(src) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.EHOSTUNREACH}
	}
	return r.cfg.Network.DialContext(ctx, network, address)
}

// begin counts a flow that is about to be served, or says that it's too late.
func (r *run) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.over {
		r.flows.Add(1)
	}
	return !r.over
}

// drain waits until the flows are gone, for which ctx has ended.
func (r *run) drain() {
	r.mu.Lock()
	r.over = true
	r.mu.Unlock()
	r.flows.Wait()
}

// build makes the gVisor stack, whose goroutines run from then on.
func (r *run) build() error {
	r.ip = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: r.cfg.Local}), ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	r.link = &link{device: r.cfg.Device, local: r.cfg.Local, echo: r.echoRequest, own: r.own, reopen: r.reopen, pass: newPassage(r).pass}
	r.link.mtu.Store(uint32(r.cfg.MTU))
	if r.cfg.Remote {
		r.flight, r.link.repeats = newFlight(), repeats{}
	}
	if err := r.configure(); err != nil {
		r.ip.Destroy()
		return err
	}
	r.ip.SetTransportProtocolHandler(tcp.ProtocolNumber, r.tcpHandler())
	r.ip.SetTransportProtocolHandler(udp.ProtocolNumber, r.udpPacket)
	r.ip.SetTransportProtocolHandler(icmp.ProtocolNumber4, r.assembledEcho)
	return nil
}

// configure lets the stack be every address there is, and sets its TCP up for
// a peer that is this machine, or far from it.
func (r *run) configure() error {
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 20, Max: 8 << 20}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 20, Max: 6 << 20}
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	options := []tcpip.SettableTransportProtocolOption{&sack, &moderate, &receive, &send, &wait}
	if r.cfg.Remote {
		// With RACK gVisor goes on one segment per timeout where a whole window
		// was lost, as it is when the path is away for a while. Its cubic lets the
		// window of one that has lost much fall to nothing, for good: the default
		// stays, which is reno.
		receive.Max, send.Max = remoteReceive, remoteSend
		wait = tcpip.TCPTimeWaitTimeoutOption(remoteTimeWait)
		recovery := tcpip.TCPRecovery(0)
		options = append(options, &recovery)
	}
	for _, opt := range options {
		if err := r.ip.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("netstack: set %T: %s", opt, err)
		}
	}
	// A datagram of 64 KiB must fit, and several must while a flow is dialed.
	if err := r.ip.SetOption(tcpip.ReceiveBufferSizeOption{Min: 4 << 10, Default: 1 << 20, Max: 8 << 20}); err != nil {
		return fmt.Errorf("netstack: set receive buffer: %s", err)
	}
	if err := r.ip.SetOption(tcpip.SendBufferSizeOption{Min: 4 << 10, Default: 1 << 20, Max: 8 << 20}); err != nil {
		return fmt.Errorf("netstack: set send buffer: %s", err)
	}
	if err := r.ip.CreateNIC(nic, r.link); err != nil {
		return fmt.Errorf("netstack: make nic: %s", err)
	}
	if err := r.ip.SetPromiscuousMode(nic, true); err != nil {
		return fmt.Errorf("netstack: take every address: %s", err)
	}
	if err := r.ip.SetSpoofing(nic, true); err != nil {
		return fmt.Errorf("netstack: answer from every address: %s", err)
	}
	if err := r.address(); err != nil {
		return err
	}
	r.ip.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic},
		{Destination: header.IPv6EmptySubnet, NIC: nic},
	})
	return nil
}
