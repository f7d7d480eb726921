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
	"sync"
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
	Network channel.Network // which every flow is dialed on
	Log     *slog.Logger    // default: discard

	DialTimeout time.Duration // how long a flow may wait for the Network: 60 s
	UDPIdle     time.Duration // a UDP flow without a datagram ends: 60 s
	MaxDials    int           // SYNs being dialed for at once: 4096
	MaxPing     int           // ping flows at once: 256

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
	timeWait      = time.Second // nothing strays between a kernel and its TUN
)

// A Stack makes dials of a device's packets.
type Stack struct {
	cfg   Config
	tcp   counter
	udp   counter
	pings counter
}

// New returns a Stack that does nothing yet.
func New(cfg Config) (*Stack, error) {
	switch {
	case cfg.Device == nil:
		return nil, errors.New("netstack: no device")
	case cfg.Network == nil:
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
	or(&cfg.MaxUDP, 1024)
	or(&cfg.MaxPing, 256)
	return &Stack{cfg: cfg}, nil
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
	if err := r.build(); err != nil {
		return errors.Join(err, s.cfg.Device.Close())
	}
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

// A run is what lives no longer than Run.
type run struct {
	*Stack
	ctx  context.Context // of all flows
	ip   *stack.Stack
	link *link

	mu      sync.Mutex
	over    bool
	flows   sync.WaitGroup
	dialing map[stack.TransportEndpointID]*attempt
	echoes  map[echoKey]*echo
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
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	r.link = &link{device: r.cfg.Device, mtu: uint32(r.cfg.MTU), echo: r.echoRequest}
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
// a peer that is this machine.
func (r *run) configure() error {
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 20, Max: 8 << 20}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 20, Max: 6 << 20}
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	for _, opt := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &receive, &send, &wait} {
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
	r.ip.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic},
		{Destination: header.IPv6EmptySubnet, NIC: nic},
	})
	return nil
}
