package tun

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	cloneDevice = "/dev/net/tun"

	// vnetHdrLen is the size of the virtio-net header before each packet.
	vnetHdrLen = 10
)

// A Device is a TUN device whose descriptor this process holds: one Readv or
// Writev is one packet, behind its virtio-net header.
type Device struct {
	name    string
	offload bool
	file    *os.File
	raw     syscall.RawConn
	closed  atomic.Bool
}

// Node is the file that devices are made by.
func Node() (fs.FileInfo, error) { return os.Stat(cloneDevice) }

// Open makes a TUN device of that name, or of the first free one of culvert0,
// culvert1, ... where name is "". It is down and has no address: see Link.
func Open(name string) (*Device, error) {
	if name == "" {
		name = "culvert%d" // the kernel counts, and so two at once get two
	}
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", cloneDevice, err)
	}
	if err := attach(fd, name); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make tun %s: %w", name, err)
	}
	// From here on the runtime polls it, which it can't before it is a device.
	return fromFile(os.NewFile(uintptr(fd), cloneDevice))
}

// attach makes fd the device's queue.
func attach(fd int, name string) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
}

// FromFile makes a Device of the descriptor of one, as another process opened
// it and handed it over. It owns file from then on, even when it fails.
func FromFile(file *os.File) (*Device, error) {
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("take tun: %w", err)
	}
	// How the descriptor came to be an os.File decides whether it is polled,
	// so one of our own is made.
	var fd int
	var dupErr error
	err = raw.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("take tun: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("take tun: %w", err)
	}
	return fromFile(os.NewFile(uintptr(fd), file.Name()))
}

func fromFile(file *os.File) (*Device, error) {
	d := &Device{file: file}
	err := d.inquire()
	if err != nil {
		file.Close()
		return nil, err
	}
	return d, nil
}

// inquire learns from the descriptor what device it is, and asks for offloads.
func (d *Device) inquire() (err error) {
	if d.raw, err = d.file.SyscallConn(); err != nil {
		return fmt.Errorf("take tun: %w", err)
	}
	req, _ := unix.NewIfreq("")
	var ioErr error
	err = d.raw.Control(func(fd uintptr) {
		if ioErr = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, req); ioErr == nil {
			d.offload = offload(int(fd))
		}
	})
	if err = errors.Join(err, ioErr); err != nil {
		return fmt.Errorf("take tun: %w", err)
	}
	if req.Uint16()&(unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR) != unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR {
		return fmt.Errorf("take tun %s: it was opened without IFF_NO_PI or IFF_VNET_HDR", req.Name())
	}
	d.name = req.Name()
	return nil
}

// offload asks that the kernel hand over TCP unsegmented and without sums.
// Where it refuses, every packet is whole and small, and all works as well,
// at a third of the speed.
func offload(fd int) bool {
	return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6) == nil
}

// Name is what the kernel calls the device.
func (d *Device) Name() string { return d.name }

// Offload tells whether the kernel agreed to hand over TCP unsegmented.
func (d *Device) Offload() bool { return d.offload }

// HeaderLen is the length of the virtio-net header before each packet.
func (d *Device) HeaderLen() int { return vnetHdrLen }

// File is the device's descriptor, to be handed to another process. It stays
// the Device's own.
func (d *Device) File() *os.File { return d.file }

// Readv waits for a packet and scatters it into bufs. One that is longer than
// they are is cut off.
func (d *Device) Readv(bufs [][]byte) (n int, err error) {
	wait := d.raw.Read(func(fd uintptr) bool {
		n, err = again(func() (int, error) { return unix.Readv(int(fd), bufs) })
		return err != unix.EAGAIN
	})
	return n, d.failure("read", wait, err)
}

// Writev gathers a packet from bufs. It may be called from several goroutines.
func (d *Device) Writev(bufs [][]byte) (n int, err error) {
	// Control, unlike Write, lets more than one in at a time: a write is the
	// way up the kernel's own stack, as far as the reader's socket.
	wait := d.raw.Control(func(fd uintptr) {
		n, err = again(func() (int, error) { return unix.Writev(int(fd), bufs) })
	})
	return n, d.failure("write", wait, err)
}

// again does f again while a signal cuts it short.
func again(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); err != unix.EINTR {
			return n, err
		}
	}
}

func (d *Device) failure(what string, wait, err error) error {
	if wait != nil {
		err = wait
	}
	switch {
	case err == nil:
		return nil
	case d.closed.Load():
		return net.ErrClosed // what os says of it has no name
	case errors.Is(err, unix.EBADFD):
		// The device was deleted under us: there is no more to come.
		return fmt.Errorf("%s tun %s: the device is gone: %w", what, d.name, net.ErrClosed)
	}
	return fmt.Errorf("%s tun %s: %w", what, d.name, err)
}

// Close gives the descriptor back; Readv ends with net.ErrClosed. The last one
// to close it takes the device with it, its addresses and its routes.
func (d *Device) Close() error {
	d.closed.Store(true)
	if err := d.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close tun %s: %w", d.name, err)
	}
	return nil
}
