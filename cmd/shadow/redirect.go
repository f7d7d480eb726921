package main

import (
	"context"
	"os"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/redirect"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// fromEnvironment is what --keys says where no Secret can be mounted: in a
// container that was added to a pod.
const fromEnvironment = "env"

func environmentKeys() *shadow.Keys {
	return &shadow.Keys{Host: []byte(os.Getenv("CULVERT_HOST_KEY")), Authorized: []byte(os.Getenv("CULVERT_AUTHORIZED_KEY"))}
}

// standBefore makes of a router one that stands before the program of its own pod.
// To put back what it took asks for no right, and so it ends by itself.
func standBefore(cfg *shadow.Config) error {
	n, err := redirect.Open(&channel.Host{})
	if err != nil {
		return err
	}
	cfg.Redirect, cfg.Service = n, standing{n}
	cfg.Heal = func(context.Context) error { return nil }
	return nil
}

// standing is a redirect as something to be watched and put back.
type standing struct{ *redirect.Network }

func (s standing) Look(context.Context) (string, error) {
	if s.Restored() {
		return heal.PutBack, nil
	}
	return heal.Ours, nil
}
