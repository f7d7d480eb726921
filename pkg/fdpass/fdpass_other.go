//go:build !unix

package fdpass

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
)

var errUnixOnly = fmt.Errorf("no descriptor can be handed over on %s: %w", runtime.GOOS, errors.ErrUnsupported)

// Pair fails.
func Pair() (*net.UnixConn, *os.File, error) { return nil, nil, errUnixOnly }

// Lend fails.
func Lend(*os.File, func(fd int) error) error { return errUnixOnly }

func sendFiles(*net.UnixConn, []byte, []*os.File) (int, error) { return 0, errUnixOnly }

func receiveFiles(*net.UnixConn, []byte) (int, []*os.File, error) { return 0, nil, errUnixOnly }
