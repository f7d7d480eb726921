//go:build !linux

package resolver

import (
	"context"
	"errors"
	"fmt"
	"runtime"
)

func look(context.Context, Config) World { return World{OS: runtime.GOOS} }

// open: what is to be written is known (see detect.go), but nothing here has
// been run on such a system yet.
func open(_ Config, p Plan) (place, error) {
	return nil, fmt.Errorf("%q is not implemented on %s: %w", p.Mode, runtime.GOOS, errors.ErrUnsupported)
}

func (r *Resolver) restore(context.Context) error { return nil }

// Leftovers lists the files that a session which died left behind.
func (r *Resolver) Leftovers() ([]string, error) { return nil, nil }
