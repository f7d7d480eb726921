package channel

import (
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// openPing makes an ICMP datagram socket. The kernel gives it an identifier,
// writes the checksum, and hands over replies to that identifier only; it is
// open to the groups in net.ipv4.ping_group_range, else EACCES.
func (h *Host) openPing(to netip.Addr) (net.Conn, error) {
	family, proto, sa := echoFamily(to)
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "ping")
	defer f.Close() // FileConn duplicates it
	if err := h.controlPing(f, to); err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, sa); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return &ping{Conn: c, remote: &net.IPAddr{IP: to.AsSlice(), Zone: to.Zone()}}, nil
}

func echoFamily(to netip.Addr) (family, proto int, sa unix.Sockaddr) {
	if to.Is4() {
		return unix.AF_INET, unix.IPPROTO_ICMP, &unix.SockaddrInet4{Addr: to.As4()}
	}
	in6 := &unix.SockaddrInet6{Addr: to.As16()}
	if ifi, err := net.InterfaceByName(to.Zone()); err == nil {
		in6.ZoneId = uint32(ifi.Index)
	}
	return unix.AF_INET6, unix.IPPROTO_ICMPV6, in6
}

func (h *Host) controlPing(f *os.File, to netip.Addr) error {
	if h.Control == nil {
		return nil
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return h.Control("ping", to.String(), raw)
}

// ping is a connected ICMP datagram socket.
type ping struct {
	net.Conn
	remote net.Addr
	ids    echoIDs
}

func (p *ping) Write(msg []byte) (int, error) {
	if len(msg) < echoHeader {
		return 0, &net.OpError{Op: "write", Net: "ping", Addr: p.remote, Err: syscall.EINVAL}
	}
	p.ids.out(msg)
	return p.Conn.Write(msg)
}

func (p *ping) Read(buf []byte) (int, error) {
	for {
		n, err := p.Conn.Read(buf)
		if err != nil || p.ids.in(buf[:n]) {
			return n, err
		}
	}
}

func (p *ping) LocalAddr() net.Addr {
	return &net.IPAddr{IP: p.Conn.LocalAddr().(*net.UDPAddr).IP}
}
func (p *ping) RemoteAddr() net.Addr { return p.remote }
