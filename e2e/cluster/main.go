// cluster brings up a real Kubernetes cluster on one Linux machine, without any
// container registry, and a laptop outside of it:
//
//	laptop 172.31.0.2 --veth-- router (172.31.0.1 | br0 172.30.0.1) --veth-- node1 172.30.0.11
//	                                                                \-veth-- node2 172.30.0.12
//	pods 10.244.0.0/16, Services 10.96.0.0/16, DNS 10.96.0.10, API server https://172.30.0.11:6443
//
// All of it has IPv6 too: hosts fd00:30::/64 and fd00:31::/64, pods fd00:10:244::/56,
// Services fd00:10:96::/112, for those that ask; IPv4 is the cluster's first family.
//
// A second laptop, laptop2, is 172.31.1.2: so two halves of the tests run at the
// same time. A laptop reaches the API server and NodePorts and nothing else of the
// cluster: pods and Services are refused at once. The router plays the world
// outside: a DNS server of its own (172.31.0.1), a web server on port 80, a
// CONNECT proxy on port 3128. Nothing is linked to the machine's own network.
//
// Every host is a machine of its own: network, mount, PID, UTS and IPC
// namespaces, whose PID 1 is this program again (machine.go). Killing that one
// process takes everything on the host with it, mounts included; so nothing has
// to be remembered, and taking the cluster down is a search (down.go). What a
// host writes goes to a tmpfs that only it sees.
//
// The cluster's programs are built from their Go modules, which is why this
// folder is a module of its own: the product's stays lean.
package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const usage = `usage: cluster COMMAND

  up                       a fresh cluster with the sample system; what was there is taken down first
                           (environment: NODES=1|2, PROXY_MODE=iptables|nftables, SAMPLE=0|1)
  down                     takes it down and leaves nothing
  status                   which hosts are up, and the pods
  build                    programs and images into the cache, Consul for tests too, no more
  exec [--uid N] HOST -- CMD ARG...
                           runs CMD on laptop, laptop2, router, node1 or node2
  kubectl ARG...           kubectl on the laptop, as cluster-admin
  load [NODE] IMAGE.tar    imports an image archive into every node, or one
  cut [HOST]               drops all packets from and to a host (default: laptop), links and routes stay
  heal [HOST]              undoes cut
  restart-apiserver        kills the API server and waits until its successor is ready`

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Print(usage)
		os.Exit(2)
	}
	err := start(os.Args[0], os.Args[1], os.Args[2:])
	var exit exitCode
	if errors.As(err, &exit) {
		os.Exit(int(exit))
	}
	if err != nil {
		log.Fatalf("cluster: error: %v", err)
	}
}

// exitCode is the error of a command that ran and failed by itself.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// start is run, or one of the parts that this program starts itself as.
func start(name, first string, rest []string) error {
	switch name {
	case machineMark:
		return machineMain(first)
	case hostMark:
		return hostMain(first)
	case execMark:
		return execMain(first, rest)
	}
	return run(first, rest)
}

func run(command string, args []string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s: must be root, for namespaces, mounts and cgroups", command)
	}
	if command == "exec" {
		return execCommand(args)
	}
	p, err := findPaths()
	if err != nil {
		return err
	}
	switch command {
	case "up":
		return locked(p, func() error { return up(p, false) })
	case "build":
		return locked(p, func() error { return up(p, true) })
	case "down":
		return locked(p, func() error { return down(p) })
	case "status":
		return status(p)
	case "kubectl":
		kubeconfig := filepath.Join(p.run, "kubeconfig")
		return execCommand(slices.Concat([]string{"laptop", "--", "kubectl", "--kubeconfig", kubeconfig}, args))
	case "load":
		return load(args)
	case "cut", "heal":
		return cut(command == "cut", args)
	case "restart-apiserver":
		return restartAPIServer(p)
	}
	return errors.New(usage)
}

// paths are the folders in use. Only run is inside the checkout, and it is
// there only while a cluster is.
type paths struct {
	root  string // the checkout
	run   string // state of the running cluster: keys, kubeconfigs
	cache string // what outlives a cluster: programs, images, logs
	logs  string // of the last cluster
	bin   string // programs of the running cluster: a link into the cache
}

func findPaths() (paths, error) {
	root, err := findRoot()
	if err != nil {
		return paths{}, err
	}
	base := os.Getenv("XDG_CACHE_HOME")
	if base == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return paths{}, err
		}
		base = filepath.Join(home, ".cache")
	}
	p := paths{root: root, run: filepath.Join(root, "e2e", ".run"), cache: filepath.Join(base, "culvert-e2e")}
	p.logs, p.bin = filepath.Join(p.cache, "logs"), filepath.Join(p.run, "bin")
	return p, nil
}

// findRoot looks for the checkout around the working directory, then around
// this program.
func findRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	for _, d := range []string{dir, filepath.Dir(self)} {
		for ; d != "/"; d = filepath.Dir(d) {
			if _, err := os.Stat(filepath.Join(d, "e2e", "cluster", "go.mod")); err == nil {
				return d, nil
			}
		}
	}
	return "", fmt.Errorf("no checkout of culvert around %s nor %s", dir, self)
}

// command runs a program quietly; its error carries what the program said.
func command(name string, args ...string) error {
	_, err := output(name, args...)
	return err
}

func output(name string, args ...string) (string, error) {
	b, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(b)))
	}
	return string(b), nil
}

// commands runs several, one a line, words parted by spaces.
func commands(lines string) error {
	for line := range strings.Lines(lines) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if err := command(words[0], words[1:]...); err != nil {
			return err
		}
	}
	return nil
}
