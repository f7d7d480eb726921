//go:build !linux

package tun

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
)

var errLinuxOnly = fmt.Errorf("connect is for Linux so far, not %s: %w", runtime.GOOS, errors.ErrUnsupported)

// A Device can't be had on this system yet.
type Device struct{}

// Node fails.
func Node() (fs.FileInfo, error) { return nil, errLinuxOnly }

// Open fails.
func Open(string) (*Device, error) { return nil, errLinuxOnly }

// FromFile fails.
func FromFile(file *os.File) (*Device, error) {
	file.Close()
	return nil, errLinuxOnly
}

// Name is "".
func (d *Device) Name() string { return "" }

// Offload is false.
func (d *Device) Offload() bool { return false }

// HeaderLen is 0.
func (d *Device) HeaderLen() int { return 0 }

// File is nil.
func (d *Device) File() *os.File { return nil }

// Readv fails.
func (d *Device) Readv([][]byte) (int, error) { return 0, errLinuxOnly }

// Writev fails.
func (d *Device) Writev([][]byte) (int, error) { return 0, errLinuxOnly }

// Close does nothing.
func (d *Device) Close() error { return nil }

// A Link can't be changed on this system yet.
type Link struct{ Name string }

// Configure fails.
func (l Link) Configure(int, ...netip.Addr) error { return errLinuxOnly }

// SetRoutes fails.
func (l Link) SetRoutes([]netip.Prefix) error { return errLinuxOnly }

// TakeAll fails.
func (l Link) TakeAll() error { return errLinuxOnly }

// Existing fails.
func Existing(...string) ([]Route, error) { return nil, errLinuxOnly }

// Astray fails.
func Astray(string, []netip.Prefix) ([]Conflict, error) { return nil, errLinuxOnly }

// HasIPv6 is false.
func HasIPv6() bool { return false }
