//go:build !linux

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

var errLinuxOnly = fmt.Errorf("run is for Linux so far, not %s: %w", runtime.GOOS, errors.ErrUnsupported)

// A Sandbox can't be had on this system yet.
type Sandbox struct{ Device *Device }

// A Device can't be had on this system yet.
type Device struct{}

// Check fails.
func Check() error { return errLinuxOnly }

// Start fails.
func Start(Config) (*Sandbox, error) { return nil, errLinuxOnly }

// Signals is only the one that there is on every system.
func Signals() []os.Signal { return []os.Signal{os.Interrupt} }

// Signal does nothing.
func (s *Sandbox) Signal(os.Signal) {}

// Wait fails.
func (s *Sandbox) Wait() error { return errLinuxOnly }

// Main fails.
func Main([]string) error { return errLinuxOnly }

// Name is "".
func (d *Device) Name() string { return "" }

// Offload is false.
func (d *Device) Offload() bool { return false }

// HeaderLen is 0.
func (d *Device) HeaderLen() int { return 0 }

// Readv fails.
func (d *Device) Readv([][]byte) (int, error) { return 0, errLinuxOnly }

// Writev fails.
func (d *Device) Writev([][]byte) (int, error) { return 0, errLinuxOnly }

// Close does nothing.
func (d *Device) Close() error { return nil }
