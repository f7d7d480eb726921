package wgchan

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/channel/wiretest"
)

func TestMain(m *testing.M) { channeltest.Main(m) }

func newKey(t testing.TB) (ed25519.PublicKey, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

// site is a far end with one peer, at the end of a way of its own.
// laptopAddrs are those of a device, as a session chooses them.
var laptopAddrs = []netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd63:756c:7665:7274::1")}

type site struct {
	t       testing.TB
	network channel.Network
	port    *Port
	way     *way
	near    Config
	peer    Peer

	end    context.CancelFunc
	served chan error
}

// newSite makes one. Its way is through a relay only where it has to be.
func newSite(t testing.TB, b wiretest.Beats, w wiretest.Way, n channel.Network) wiretest.Site {
	return siteAt(t, b, newLane(w.Up, w.Buffer, w.Delay), newLane(w.Down, w.Buffer, w.Delay), n)
}

func siteAt(t testing.TB, b wiretest.Beats, up, down *lane, n channel.Network) *site {
	t.Helper()
	nearPublic, nearKey := newKey(t)
	farPublic, farKey := newKey(t)
	port, err := Listen(Config{Key: farKey, Beat: b.Every})
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, network: n, port: port, way: newWay(t, port.Number(), up, down), peer: Peer{Key: nearPublic, OnAlive: b.Far, Packets: laptopAddrs}}
	s.near = Config{Key: nearKey, Peer: farPublic, Beat: b.Every, OnAlive: b.Near, Endpoints: []netip.AddrPort{s.way.address()}, Packets: laptopAddrs}
	s.serve()
	return s
}

func (s *site) serve() {
	ctx, cancel := context.WithCancel(context.Background())
	s.end, s.served = cancel, make(chan error, 1)
	go func() { s.served <- s.port.Serve(ctx, s.peer, s.network) }()
}

func (s *site) stop() error {
	s.end()
	select {
	case err := <-s.served:
		return err
	case <-time.After(20 * time.Second):
		panic("Serve goes on")
	}
}

func (s *site) Open(ctx context.Context) (channel.Silent, error) {
	ch, err := Dial(ctx, s.near)
	if err != nil {
		return nil, err
	}
	return ch, nil
}

func (s *site) Cut() {
	s.stop()
	s.serve()
}

func (s *site) Hush() { s.way.hushed.Store(true) }

func (s *site) End() error {
	err := s.stop()
	s.port.Close()
	s.way.close()
	return err
}

func TestWire(t *testing.T) { wiretest.RunSites(t, newSite) }

// direct is a site without a relay between the ends.
func direct(t testing.TB, n channel.Network) *site {
	t.Helper()
	s := siteAt(t, wiretest.Beats{}, newLane(0, 0, 0), newLane(0, 0, 0), n)
	s.near.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), s.port.Number())}
	return s
}

func connect(t testing.TB, n channel.Network) *Channel {
	t.Helper()
	return direct(t, n).connect()
}

func (s *site) connect() *Channel {
	s.t.Helper()
	ch, err := Dial(context.Background(), s.near)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		ch.Close()
		ch.Wait()
		if err := s.End(); !errors.Is(err, net.ErrClosed) {
			s.t.Errorf("Serve: %v, want net.ErrClosed", err)
		}
	})
	return ch
}

// TestChannel is without a relay between the ends.
func TestChannel(t *testing.T) {
	channeltest.Run(t, func(t *testing.T, n channel.Network) channel.Channel { return connect(t, n) })
}

// translated gives the loopback an address that packets can be sent to: the channel
// is dialled there, and its far end here.
const translated = "192.0.2.7"

type translate struct {
	channel.Network
	from, to string
}

func (n translate) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := n.Network.DialContext(ctx, network, strings.Replace(address, n.from, n.to, 1))
	if err != nil {
		return nil, err
	}
	if _, ok := c.(channel.CloseWriter); ok {
		return translatedStream{c.(tcpFlow), address}, nil
	}
	return translatedFlow{c, network, address}, nil
}

type translatedStream struct {
	tcpFlow
	address string
}

type translatedFlow struct {
	net.Conn
	network, address string
}

func (c translatedFlow) RemoteAddr() net.Addr { return wiring.ParseAddr(c.network, c.address) }

// farTranslate is the other half.
type farTranslate struct{ channel.Host }

func (n *farTranslate) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return n.Host.DialContext(ctx, network, strings.Replace(address, translated, "127.0.0.1", 1))
}

// TestPackets: flows that nobody is asked for are such as any Network's.
func TestPackets(t *testing.T) {
	channeltest.RunNetwork(t, func(t *testing.T) channel.Network {
		return translate{connect(t, &farTranslate{}), "127.0.0.1", translated}
	})
}

// failing is a Network on which every dial fails.
type failing struct {
	channel.Host
	err atomic.Value // a SYN may come again
}

func (n *failing) DialContext(context.Context, string, string) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: n.err.Load().(error)}
}

// TestPacketErrors: who sent packets hears what who asked does.
func TestPacketErrors(t *testing.T) {
	n := &failing{}
	ch := connect(t, n)
	for _, want := range []error{
		syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EACCES,
	} {
		n.err.Store(want)
		for _, to := range []string{"192.0.2.7:80", "[2001:db8::7]:80"} {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			if _, err := ch.DialContext(ctx, "tcp", to); !errors.Is(err, want) {
				t.Errorf("dial %s: %v, want %v", to, err, want)
			}
			cancel()
		}
	}
}

// echoAll answers every connection with what it says, until l is closed.
func echoAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.Close()
		}()
	}
}
