package tun

import (
	"context"
	"fmt"

	"github.com/vishvananda/netlink"
)

// Watch calls changed whenever a route of this machine was made or removed, whoever did
// that, until ctx ends.
func Watch(ctx context.Context, changed func()) error {
	for ctx.Err() == nil {
		updates := make(chan netlink.RouteUpdate)
		if err := netlink.RouteSubscribeWithOptions(updates, ctx.Done(), netlink.RouteSubscribeOptions{}); err != nil {
			return fmt.Errorf("watch routes: %w", err)
		}
		for range updates {
			changed()
		}
		changed() // there were more than the kernel keeps (ENOBUFS, netlink(7))
	}
	return nil
}
