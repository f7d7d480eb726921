package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// What is written in a byte of SOCKS.
const (
	version4 = 4
	version5 = 5

	noPassword = 0
	noMethod   = 0xff

	toConnect   = 1
	toAssociate = 3

	asIPv4 = 1
	asName = 3
	asIPv6 = 4

	succeeded     = 0
	noSuchCommand = 7
	noSuchAddress = 8
	rejected      = 91 // in version 4
)

// replies are what a dial met.
var replies = map[reason]byte{failed: 1, forbidden: 2, noNetwork: 3, noHost: 4, refused: 5, silent: 4}

// SOCKS serves SOCKS5 to whoever ln accepts, and dials for them, until ctx ends or ln fails
// for good. It closes ln, and returns when all of it is gone.
func SOCKS(ctx context.Context, ln net.Listener, to relay.Dialer) error {
	return relay.Serve(ctx, ln, func(ctx context.Context, c net.Conn) { ServeSOCKS(ctx, c, to, Both) })
}

// Offered is what a proxy can be asked for.
type Offered int

const (
	Both    Offered = iota // streams and datagrams
	Streams                // no port is opened for anybody
)

// ServeSOCKS is SOCKS for one connection, which it takes over: what that is asked for decides
// how it goes on.
func ServeSOCKS(ctx context.Context, c net.Conn, to relay.Dialer, offered Offered) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	c.SetDeadline(time.Now().Add(helloLimit))
	command, address, err := greet(c)
	if err != nil {
		var refusal refusedError
		if errors.As(err, &refusal) {
			leave(c, refusal)
		}
		return
	}
	c.SetDeadline(time.Time{})
	switch {
	case command == toConnect:
		connect(ctx, c, to, address.String())
	case offered == Streams:
		leave(c, reply(noSuchCommand, netip.AddrPort{}))
	default:
		associate(ctx, c, to, address)
	}
}

// A refusedError is what the program is told before its connection ends.
type refusedError []byte

func (e refusedError) Error() string { return fmt.Sprintf("refused with % x", []byte(e)) }

// leave says why, and waits for the program to have heard it: to close with something
// unread is to reset, and a reset takes back what was said.
func leave(c net.Conn, last []byte) {
	if _, err := c.Write(last); err != nil {
		return
	}
	if half, ok := c.(channel.CloseWriter); ok && half.CloseWrite() == nil {
		c.SetReadDeadline(time.Now().Add(time.Second))
		io.Copy(io.Discard, c)
	}
}

// greet agrees that there is no password, and reads what is wanted.
func greet(c io.ReadWriter) (command byte, a address, err error) {
	var b [2 + 255]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return 0, nil, err
	}
	switch {
	case b[0] == version4:
		return 0, nil, refusedError{0, rejected, 0, 0, 0, 0, 0, 0}
	case b[0] != version5:
		return 0, nil, fmt.Errorf("version %d of SOCKS", b[0])
	}
	methods := b[2 : 2+int(b[1])]
	if _, err := io.ReadFull(c, methods); err != nil {
		return 0, nil, err
	}
	if !strings.ContainsRune(string(methods), noPassword) {
		return 0, nil, refusedError{version5, noMethod}
	}
	if _, err := c.Write([]byte{version5, noPassword}); err != nil {
		return 0, nil, err
	}
	return readRequest(c)
}

// readRequest reads what is wanted, and of whom.
func readRequest(c io.Reader) (command byte, a address, err error) {
	var b [3]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return 0, nil, err
	}
	if b[0] != version5 {
		return 0, nil, fmt.Errorf("version %d of SOCKS", b[0])
	}
	a, err = readAddress(c)
	switch {
	case errors.Is(err, errAddress):
		return 0, nil, reply(noSuchAddress, netip.AddrPort{})
	case err != nil:
		return 0, nil, err
	case b[1] != toConnect && b[1] != toAssociate:
		return 0, nil, reply(noSuchCommand, netip.AddrPort{})
	}
	return b[1], a, nil
}

// reply answers a request; at is where the program's connection or datagrams go on from.
func reply(code byte, at netip.AddrPort) refusedError {
	return append(refusedError{version5, code, 0}, addressFrom(at)...)
}

// connect dials, says what came of it, and joins the two.
func connect(ctx context.Context, c net.Conn, to relay.Dialer, host string) {
	far, err := dial(ctx, ctx, to, "tcp", host)
	if err != nil {
		leave(c, reply(replies[reasonOf(err)], netip.AddrPort{}))
		return
	}
	if _, err := c.Write(reply(succeeded, addrPort(far.LocalAddr()))); err != nil {
		relay.Abort(far, err)
		return
	}
	relay.Carry(ctx, "tcp", c, far)
}

// addrPort is the zero value for what is no address of IP, as within a wire.
func addrPort(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.AddrPort()
	case *net.UDPAddr:
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// An address is as SOCKS writes it: its kind, itself, and a port.
type address []byte

var errAddress = errors.New("no address")

// length is that of the address that begins with these two bytes.
func length(kind, first byte) (int, error) {
	switch kind {
	case asIPv4:
		return 1 + 4 + 2, nil
	case asIPv6:
		return 1 + 16 + 2, nil
	case asName:
		return 1 + 1 + int(first) + 2, nil
	}
	return 0, fmt.Errorf("%w: it is of kind %d", errAddress, kind)
}

func readAddress(r io.Reader) (address, error) {
	a := make(address, 2, 1+1+255+2)
	if _, err := io.ReadFull(r, a); err != nil {
		return nil, err
	}
	n, err := length(a[0], a[1])
	if err != nil {
		return nil, err
	}
	a = a[:n]
	if _, err := io.ReadFull(r, a[2:]); err != nil {
		return nil, err
	}
	return a, a.check()
}

// cutAddress takes one from the beginning of b.
func cutAddress(b []byte) (a address, rest []byte, err error) {
	if len(b) < 2 {
		return nil, nil, io.ErrUnexpectedEOF
	}
	n, err := length(b[0], b[1])
	if err != nil {
		return nil, nil, err
	}
	if len(b) < n {
		return nil, nil, io.ErrUnexpectedEOF
	}
	a = address(b[:n])
	return a, b[n:], a.check()
}

// check refuses names that nothing can be called.
func (a address) check() error {
	if a[0] != asName {
		return nil
	}
	name := a.host()
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return fmt.Errorf("%w: %q", errAddress, name)
	}
	return nil
}

func (a address) host() string {
	if a[0] == asName {
		return string(a[2 : len(a)-2])
	}
	ip, _ := netip.AddrFromSlice(a[1 : len(a)-2])
	return ip.Unmap().String()
}

func (a address) port() uint16 { return binary.BigEndian.Uint16(a[len(a)-2:]) }

// String is host:port.
func (a address) String() string { return net.JoinHostPort(a.host(), strconv.Itoa(int(a.port()))) }

func addressFrom(at netip.AddrPort) address {
	ip := at.Addr().Unmap()
	if !ip.IsValid() {
		ip = netip.IPv4Unspecified()
	}
	kind := byte(asIPv4)
	if ip.Is6() {
		kind = asIPv6
	}
	return binary.BigEndian.AppendUint16(append(address{kind}, ip.AsSlice()...), at.Port())
}
