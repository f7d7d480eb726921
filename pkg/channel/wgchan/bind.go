package wgchan

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

// A bind is WireGuard's UDP socket, for both families. WireGuard brings one, which
// lets the kernel fragment what does not fit into the path: then nobody finds out
// what does. It also tells what has come and gone.
type bind struct {
	control  func(network, address string, c syscall.RawConn) error // may be nil
	left     func(packets [][]byte)
	received *pace

	mu     sync.Mutex
	socket *socket  // nil while closed
	to     endpoint // where packets went last
}

var _ conn.Bind = (*bind)(nil)

// socketBuffer is for what comes at once when flows begin. It is asked for; without
// CAP_NET_ADMIN the kernel allows less of it, mostly.
const socketBuffer = 4 << 20

// Open implements conn.Bind.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.socket != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	c, err := b.listen("udp6", port)
	if err != nil { // there is no IPv6 here
		c, err = b.listen("udp4", port)
	}
	if err != nil {
		return nil, 0, err
	}
	c.SetReadBuffer(socketBuffer)
	c.SetWriteBuffer(socketBuffer)
	s := newSocket(c)
	b.socket = s
	r := &receiver{socket: s, received: b.received}
	return []conn.ReceiveFunc{r.receive}, s.port(), nil
}

// receiver tells the pace of what WireGuard has kept, to hand it to the seam. The rest
// it drops at once, and leaves the buffers where they were.
type receiver struct {
	*socket
	received *pace
	data     []*byte // buffers that were given data with the last call, or nil
}

func (r *receiver) receive(packets [][]byte, sizes []int, from []conn.Endpoint) (int, error) {
	kept := 0
	for i, b := range r.data {
		if b != nil && b != &packets[i][0] {
			kept++
		}
	}
	r.data = r.data[:0]
	r.received.enter(kept)
	r.received.wait(0)
	n, err := r.socket.receive(packets, sizes, from)
	for i := range n {
		r.data = append(r.data, nil)
		if sizes[i] > device.MessageKeepaliveSize && packets[i][0] == device.MessageTransportType {
			r.data[i] = &packets[i][0]
		}
	}
	return n, err
}

func (s *socket) port() uint16 { return uint16(s.conn.LocalAddr().(*net.UDPAddr).Port) }

// listen opens a socket; that of IPv6 is for IPv4 as well.
func (b *bind) listen(network string, port uint16) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(network, address string, c syscall.RawConn) error {
		prepare(c)
		if b.control == nil {
			return nil
		}
		return b.control(network, address, c)
	}}
	pc, err := lc.ListenPacket(context.Background(), network, fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, err
	}
	return pc.(*net.UDPConn), nil
}

// port is the number of the open socket's port.
func (b *bind) port() uint16 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.socket.port()
}

// peer is where the only one is: where packets went last. To WireGuard that is where
// its last packet came from.
func (b *bind) peer() netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.to[0]
}

// Close implements conn.Bind.
func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.socket == nil {
		return nil
	}
	err := b.socket.conn.Close()
	b.socket = nil
	return err
}

// Send implements conn.Bind.
func (b *bind) Send(packets [][]byte, to conn.Endpoint) error {
	defer b.left(packets)
	b.mu.Lock()
	s := b.socket
	b.to = to.(endpoint)
	b.mu.Unlock()
	if s == nil {
		return net.ErrClosed
	}
	var err error
	for _, at := range to.(endpoint) {
		if e := s.send(packets, at); e != nil {
			err = e
		}
	}
	return err
}

// SetMark implements conn.Bind: there is Control for that.
func (*bind) SetMark(uint32) error { return nil }

// BatchSize implements conn.Bind.
func (*bind) BatchSize() int { return batchSize }

// An endpoint is where a peer is, or may be: until the first answer comes from one
// of the addresses, everything goes to each of them.
type endpoint []netip.AddrPort

var _ conn.Endpoint = endpoint{}

// ParseEndpoint implements conn.Bind.
func (*bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	var e endpoint
	for _, text := range strings.Split(s, ",") {
		a, err := netip.ParseAddrPort(text)
		if err != nil {
			return nil, err
		}
		e = append(e, a)
	}
	return e, nil
}

// String is what ParseEndpoint parses.
func (e endpoint) String() string {
	all := make([]string, len(e))
	for i, a := range e {
		all[i] = a.String()
	}
	return strings.Join(all, ",")
}

func (e endpoint) DstToString() string { return e.String() }
func (e endpoint) DstIP() netip.Addr   { return e[0].Addr() }

func (e endpoint) DstToBytes() []byte {
	b, _ := e[0].MarshalBinary()
	return b
}

// The source is the kernel's choice, for every packet: it is the one who knows when
// the machine has moved.

func (endpoint) ClearSrc()           {}
func (endpoint) SrcToString() string { return "" }
func (endpoint) SrcIP() netip.Addr   { return netip.Addr{} }
