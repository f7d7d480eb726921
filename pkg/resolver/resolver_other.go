//go:build !linux

package resolver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
)

func look(context.Context, Config) World { return World{OS: runtime.GOOS} }

func mounted(string) bool { return false }

// open: what is to be written is known (see detect.go), but nothing here has
// been run on such a system yet.
func open(_ Config, p Plan) (place, error) {
	return nil, fmt.Errorf("%q is not implemented on %s: %w", p.Mode, runtime.GOOS, errors.ErrUnsupported)
}

// An entry is what one session wants.
type entry struct{ Settings }

func (r *Resolver) living() ([]entry, error) { return nil, nil }

type paths struct{ conf, kept string }

func pathsIn(cfg Config) paths {
	p := cfg.path("/etc/resolv.conf")
	return paths{conf: p, kept: p + origSuffix}
}

// Run follows what others do to what Set made.
func (r *Resolver) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Watch tells when the system ceases to ask server.
func (r *Resolver) Watch(ctx context.Context, _ netip.Addr, _ func(asked bool)) error {
	<-ctx.Done()
	return nil
}

// Restore undoes what sessions that died left behind.
func (r *Resolver) Restore(context.Context) error { return nil }

// Leftovers lists the files that sessions which died left behind.
func (r *Resolver) Leftovers() ([]string, error) { return nil, nil }
