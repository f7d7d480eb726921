// Hub is what its image runs: culvert's verbs of a hub, and nothing else.
package main

import (
	"os"
	"runtime/debug"

	_ "golang.org/x/crypto/x509roots/fallback" // the image has no roots of its own, and those who issue tokens are asked by HTTPS

	"github.com/culvert-dev/culvert/pkg/cgroup"
	"github.com/culvert-dev/culvert/pkg/cli/hubs"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

func main() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(cgroup.MemoryLimit(os.DirFS("/sys/fs/cgroup")))
	}
	os.Exit(hubs.Main(version, os.Args[1:]))
}
