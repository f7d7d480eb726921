package sandbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/fdpass"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// A Device is the TUN, but for packets between two sockets inside: see "127.0.0.1" above.
type Device struct {
	*tun.Device
	inside *sockets
}

// Readv is a tun.Device's where the first of the buffers is as long as the header before
// a packet, and the second has room for those of the packet.
func (d *Device) Readv(bufs [][]byte) (int, error) {
	for {
		n, err := d.Device.Readv(bufs)
		if err != nil || !d.stays(bufs[1][:min(len(bufs[1]), max(0, n-len(bufs[0])))]) {
			return n, err
		}
		_, _ = d.Writev(cut(bufs, n))
	}
}

// Close closes both.
func (d *Device) Close() error { return errors.Join(d.Device.Close(), d.inside.Close()) }

// cut is the first n bytes of the buffers.
func cut(bufs [][]byte, n int) (first [][]byte) {
	for _, b := range bufs {
		b = b[:min(n, len(b))]
		first, n = append(first, b), n-len(b)
	}
	return first
}

const (
	minIPv4 = 20
	minTCP  = 20
	minUDP  = 8
)

// stays tells whether a packet is for a socket inside. A listener gets only what begins a
// connection: one to the machine's own port may be older than it is.
func (d *Device) stays(b []byte) bool {
	if len(b) < minIPv4 || b[0]>>4 != 4 || b[16] != 127 {
		return false
	}
	proto, at := b[9], int(b[0]&15)*4
	if at < minIPv4 || len(b) < at+minUDP || proto == unix.IPPROTO_TCP && len(b) < at+minTCP {
		return false
	}
	end := func(addr, port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[addr:])), binary.BigEndian.Uint16(b[port:]))
	}
	remote, local := end(12, at), end(16, at+2)
	switch proto {
	case unix.IPPROTO_TCP:
		const syn, ack = 2, 16
		begins := b[at+13]&(syn|ack) == syn
		state, err := d.inside.state(proto, local, remote)
		return err == nil && (begins || state != unix.BPF_TCP_LISTEN)
	case unix.IPPROTO_UDP:
		_, err := d.inside.state(proto, local, remote)
		return err == nil
	}
	return false
}

// sockets is the namespace's table of them.
type sockets struct{ file *os.File }

// newSockets owns file, even when it fails. It asks once, since there are kernels without
// an answer.
func newSockets(file *os.File) (*sockets, error) {
	s := &sockets{file}
	nowhere := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 9)
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		if _, err := s.state(proto, nowhere, nowhere); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, errors.Join(fmt.Errorf("ask for sockets by sock_diag: %w", err), s.Close())
		}
	}
	return s, nil
}

// Close may be called more than once.
func (s *sockets) Close() error {
	if err := s.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

const (
	sockDiagByFamily = 20 // of linux/sock_diag.h
	requestLen       = unix.SizeofNlMsghdr + 56
	stateAt          = unix.SizeofNlMsghdr + 1
)

// state is that of the socket that gets what comes from remote for local, ENOENT where
// there is none.
func (s *sockets) state(proto uint8, local, remote netip.AddrPort) (state uint8, err error) {
	if proto == unix.IPPROTO_UDP { // inet_diag has these the other way round
		local, remote = remote, local
	}
	request, reply := question(proto, local, remote), [512]byte{}
	var n int
	lendErr := fdpass.Lend(s.file, func(fd int) error {
		if err = unix.Sendto(fd, request[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err == nil {
			n, _, err = unix.Recvfrom(fd, reply[:], unix.MSG_DONTWAIT) // it is there when the question is sent
		}
		return err
	})
	switch {
	case lendErr != nil:
		return 0, lendErr
	case n < unix.SizeofNlMsghdr+4:
		return 0, unix.EBADMSG
	case binary.NativeEndian.Uint16(reply[4:]) == unix.NLMSG_ERROR:
		return 0, unix.Errno(-int32(binary.NativeEndian.Uint32(reply[unix.SizeofNlMsghdr:])))
	}
	return reply[stateAt], nil
}

// question is a struct inet_diag_req_v2 behind its header.
func question(proto uint8, local, remote netip.AddrPort) (b [requestLen]byte) {
	const noCookie, anyState = ^uint64(0), ^uint32(0)
	native, id := binary.NativeEndian, b[unix.SizeofNlMsghdr+8:]
	native.PutUint32(b[0:], requestLen)
	native.PutUint16(b[4:], sockDiagByFamily)
	native.PutUint16(b[6:], unix.NLM_F_REQUEST)
	b[unix.SizeofNlMsghdr], b[unix.SizeofNlMsghdr+1] = unix.AF_INET, proto
	native.PutUint32(b[unix.SizeofNlMsghdr+4:], anyState)
	binary.BigEndian.PutUint16(id[0:], local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	copy(id[4:], local.Addr().AsSlice())
	copy(id[20:], remote.Addr().AsSlice())
	native.PutUint64(id[40:], noCookie)
	return b
}
