// Shadow is the far end of a session; it runs in a pod.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/cgroup"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

func main() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(cgroup.MemoryLimit(os.DirFS("/sys/fs/cgroup")))
	}
	cfg := shadow.Config{Version: version, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flag.StringVar(&cfg.Listen, "listen", ":7465", "listen for wires on `address`")
	flag.StringVar(&cfg.KeysDir, "keys", "/etc/culvert", "`folder` with host_key and authorized_key; env: $CULVERT_HOST_KEY and $CULVERT_AUTHORIZED_KEY")
	flag.DurationVar(&cfg.Grace, "grace", shadow.DefaultGrace, "how long the laptop may be silent")
	lease := flag.String("lease", "", "`name` of the Lease to delete at the end; none: just exit")
	namespace := flag.String("namespace", "", "`namespace` of that Lease")
	flag.Var((*routes)(&cfg.Routes), "route", "`port` of a Service to stand in for: tcp/80,listen=:8080,original=10.96.1.2:80,protocol=http (repeatable)")
	service := flag.String("service", "", "`name` of that Service, to be put back before the Lease is deleted")
	selector := flag.String("selector", "", "`labels` that it selected its pods by: app=web,tier=front")
	workload := flag.String("workload", "", "`resource/name` of what was scaled to nothing, to be put back before the Service: deployments/web")
	flag.StringVar(&cfg.For, "for", "", "`claim` that it was scaled for: without this it is put back as well")
	name := flag.String("name", "", "`name` in its namespace that leads to this very pod: what still knows the pod by it is served after the end")
	before := flag.Bool("redirect", false, "take what comes for the routes from the program of this very pod; needs CAP_NET_ADMIN")
	only := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *only {
		fmt.Println(version)
		return
	}
	if cfg.KeysDir == fromEnvironment {
		cfg.Keys = environmentKeys()
	}
	if *before {
		if err := standBefore(&cfg); err != nil {
			cfg.Log.Error("redirect not made", "err", err)
			os.Exit(1)
		}
	}
	if *lease != "" {
		cfg.Heal = func(ctx context.Context) error { return heal.Lease(ctx, *namespace, *lease) }
	}
	if *service != "" {
		labels, err := parseSelector(*selector)
		if err != nil {
			cfg.Log.Error("wrong usage", "flag", "selector", "err", err)
			os.Exit(2)
		}
		cfg.Service = heal.Service{Namespace: *namespace, Name: *service, Session: session(*lease), Selector: labels}
	}
	if resource, name, ok := strings.Cut(*workload, "/"); ok {
		cfg.Workload = heal.Workload{Namespace: *namespace, Resource: resource, Name: name, Session: session(*lease)}
	}
	if *name != "" {
		cfg.TTL = shadow.TTLOf(*name)
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

// session is whose root the Lease is.
func session(lease string) string { return strings.TrimPrefix(lease, "culvert-") }

const terminated = 128 + int(syscall.SIGTERM)
