//go:build !linux

package release

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
)

// Serve fails.
func Serve(_ context.Context, rw io.ReadWriteCloser, _ Options) error {
	rw.Close()
	return fmt.Errorf("a host must run Linux, not %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
