//go:build !linux

package tun

import "context"

// Watch sees nothing yet on this system.
func Watch(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return nil
}
