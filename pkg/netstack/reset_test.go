package netstack

import (
	"errors"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TestResetIsNoEnd: a Write that hears of the reset first does not leave an end
// of file to the Read.
func TestResetIsNoEnd(t *testing.T) {
	ip := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	defer ip.Destroy()
	addr := tcpip.AddrFrom4([4]byte{127, 0, 0, 1})
	if err := ip.CreateNIC(nic, loopback.New()); err != nil {
		t.Fatal(err)
	}
	own := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: addr.WithPrefix()}
	if err := ip.AddProtocolAddress(nic, own, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	ip.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})

	app, c := connected(t, ip, tcpip.FullAddress{NIC: nic, Addr: addr, Port: 80})
	app.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
	app.Close()
	for end := time.Now().Add(10 * time.Second); c.state() != tcp.StateError; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no reset in 10 s")
		}
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("write: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
}

// connected is a connection from both sides.
func connected(t *testing.T, ip *stack.Stack, at tcpip.FullAddress) (app tcpip.Endpoint, c *tcpConn) {
	t.Helper()
	var lq, aq waiter.Queue
	l, err := ip.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &lq)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	lq.EventRegister(&entry)
	if err := l.Bind(at); err != nil {
		t.Fatal(err)
	}
	if err := l.Listen(1); err != nil {
		t.Fatal(err)
	}
	if app, err = ip.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &aq); err != nil {
		t.Fatal(err)
	}
	if err := app.Connect(at); err != nil {
		if _, started := err.(*tcpip.ErrConnectStarted); !started {
			t.Fatal(err)
		}
	}
	<-ready
	ep, wq, err := l.Accept(nil)
	if err != nil {
		t.Fatal(err)
	}
	return app, &tcpConn{TCPConn: gonet.NewTCPConn(wq, ep), wq: wq, ep: ep, count: new(counter)}
}
