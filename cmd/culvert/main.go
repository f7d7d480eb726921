// Culvert joins a developer's machine to a Kubernetes cluster.
package main

import (
	"os"

	"github.com/culvert-dev/culvert/pkg/cli"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

func main() {
	os.Exit(cli.Main(version, os.Args[1:]))
}
