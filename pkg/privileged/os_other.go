//go:build !unix

package privileged

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
)

var errUnixOnly = fmt.Errorf("the privileged part is not implemented on %s: %w", runtime.GOOS, errors.ErrUnsupported)

// Main fails.
func Main(*slog.Logger) error { return errUnixOnly }

// Look sees little.
func Look() World { return World{Self: os.Args[0], EUID: -1} }

type rawFD int

func (rawFD) Close() error { return errUnixOnly }

func duplicate(*os.File) (rawFD, error) { return 0, errUnixOnly }
