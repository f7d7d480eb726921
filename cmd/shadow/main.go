// Shadow is the far end of a session; it runs in a pod.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

func main() {
	cfg := shadow.Config{Version: version, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flag.StringVar(&cfg.Listen, "listen", ":7465", "listen for wires on `address`")
	flag.StringVar(&cfg.KeysDir, "keys", "/etc/culvert", "`folder` with host_key and authorized_key")
	flag.DurationVar(&cfg.Grace, "grace", shadow.DefaultGrace, "how long the laptop may be silent")
	lease := flag.String("lease", "", "`name` of the Lease to delete at the end; none: just exit")
	namespace := flag.String("namespace", "", "`namespace` of that Lease")
	only := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *only {
		fmt.Println(version)
		return
	}
	if *lease != "" {
		cfg.Heal = func(ctx context.Context) error { return heal.Lease(ctx, *namespace, *lease) }
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := shadow.New(cfg).Run(ctx); err != nil {
		cfg.Log.Error("shadow ended", "err", err)
		os.Exit(1)
	}
	if ctx.Err() != nil {
		os.Exit(terminated) // a Job's pod that ends well is not replaced
	}
}

const terminated = 128 + int(syscall.SIGTERM)
