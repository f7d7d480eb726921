package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

const kubeVersion = "v1.34.4" // as in go.mod

// components are the programs that the one binary kube is.
var components = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy",
}

// needs are files and the Debian packages that bring them.
var needs = []need{
	{"/usr/bin/containerd", "containerd"},
	{"/usr/sbin/runc", "runc"},
	{"/usr/lib/cni/bridge", "containernetworking-plugins"},
	{"/usr/sbin/iptables", "iptables"},
	{"/usr/sbin/nft", "nftables"},
	{"/usr/sbin/conntrack", "conntrack"},
	{"/usr/share/doc/busybox-static", "busybox-static"},
	{"/usr/bin/redis-server", "redis-server"},
	{"/usr/bin/redis-cli", "redis-tools"},
	{"/usr/lib/postgresql/*/bin/postgres", "postgresql"},
	{"/usr/lib/postgresql/*/bin/psql", "postgresql-client"},
	{"/usr/sbin/sshd", "openssh-server"},
	{"/usr/bin/ssh", "openssh-client"},
	{"/usr/bin/nc.openbsd|/bin/nc.openbsd", "netcat-openbsd"},
	{"/usr/bin/ansible", "ansible-core"},
	{"/usr/bin/cap", "capistrano"},
	{"/usr/bin/curl", "curl"},
	{"/usr/bin/sudo", "sudo"},
	{"/usr/bin/wg-quick", "wireguard-tools"},
	{"/usr/bin/wireguard-go", "wireguard-go"},
	{"/usr/bin/dig", "bind9-dnsutils"},
	{"/usr/bin/ping", "iputils-ping"},
	{"/usr/sbin/ip|/usr/bin/ip|/bin/ip|/sbin/ip", "iproute2"},
}

// A need is a program of a Debian package.
type need struct{ glob, pkg string }

// tried are those that no cluster needs, but tests of releases.
var tried = []need{
	{"/usr/bin/supervisord", "supervisor"},
	{"/usr/bin/node|/usr/local/bin/node", "nodejs"},
}

// alsoTested brings what tests are skipped without.
func alsoTested(p paths) {
	for _, also := range []struct {
		what string
		get  func() error
	}{
		{"supervisor and node", func() error { return install(tried) }},
		{"pm2", func() error { return installPM2(p) }},
		{"Consul", func() error { return buildConsul(p) }},
	} {
		if err := also.get(); err != nil {
			log.Printf("  no %s, whose tests are skipped: %v", also.what, err)
		}
	}
}

// missingPackages names those that are not there yet.
func missingPackages(needs []need) []string {
	var missing []string
	for _, n := range needs {
		found := false
		for glob := range strings.SplitSeq(n.glob, "|") {
			m, _ := filepath.Glob(glob)
			found = found || len(m) > 0
		}
		if !found {
			missing = append(missing, n.pkg)
		}
	}
	return missing
}

// install installs what is missing, without starting any of it.
func install(needs []need) error {
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // as Debian's service would: tests of sshd need it
		return err
	}
	missing := missingPackages(needs)
	if len(missing) == 0 {
		return nil
	}
	names := strings.Join(missing, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("missing programs, and no apt-get to install them: the Debian packages are: %s", names)
	}
	log.Printf("  installing %s", names)
	forget, err := startNothing()
	if err != nil {
		return err
	}
	defer forget()
	if err := aptInstall(missing); err != nil {
		if err := command("apt-get", "update", "-q"); err != nil {
			return err
		}
		if err := aptInstall(missing); err != nil {
			return err
		}
	}
	if still := missingPackages(needs); len(still) > 0 {
		return fmt.Errorf("packages installed, but not what they should bring: %s", strings.Join(still, " "))
	}
	return nil
}

func aptInstall(pkgs []string) error {
	cmd := exec.Command("apt-get", append([]string{"install", "-q", "-y", "--no-install-recommends"}, pkgs...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	b, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("apt-get install %s: %w\n%s", strings.Join(pkgs, " "), err, b)
	}
	return nil
}

// Debian asks this program before it starts a service; 101 is "forbidden".
const (
	policyPath = "/usr/sbin/policy-rc.d"
	policy     = "#!/bin/sh\n# culvert e2e: packages start nothing while they are installed\nexit 101\n"
)

// startNothing forbids packages to start services. A policy of somebody else's
// stays as it is.
func startNothing() (forget func(), err error) {
	f, err := os.OpenFile(policyPath, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString(policy)
	return removePolicy, errors.Join(err, f.Close())
}

// removePolicy removes ours, also one that a killed run has left.
func removePolicy() {
	if b, err := os.ReadFile(policyPath); err == nil && string(b) == policy {
		_ = os.Remove(policyPath)
	}
}

// installPM2 brings pm2 into the cache, as its lock file has it. Debian has no
// pm2, and its npm is hundreds of packages: one has to be there.
func installPM2(p paths) error {
	from, to := filepath.Join(p.root, "e2e", "cluster", "pm2"), filepath.Join(p.cache, "pm2")
	lock, err := os.ReadFile(filepath.Join(from, "package-lock.json"))
	if err != nil {
		return err
	}
	done := filepath.Join(to, "done")
	if have, err := os.ReadFile(done); err == nil && bytes.Equal(have, lock) {
		return nil
	}
	if _, err := exec.LookPath("npm"); err != nil {
		return err
	}
	log.Printf("  installing pm2 into %s", to)
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	if err := command("npm", "ci", "--prefix="+to, "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--no-update-notifier", "--fetch-timeout=20000", "--fetch-retries=1"); err != nil {
		return err
	}
	return os.WriteFile(done, lock, 0o644)
}

// build makes the programs, in the cache under a key of all that they are made
// of, and returns where they are. Only the first time takes minutes.
func build(p paths) (string, error) {
	key, err := buildKey(p)
	if err != nil {
		return "", err
	}
	bin := filepath.Join(p.cache, key)
	if _, err := os.Stat(filepath.Join(bin, "done")); err != nil {
		log.Printf("  building Kubernetes %s into %s (minutes, the first time)", kubeVersion, bin)
		if err := goBuild(filepath.Join(p.root, "e2e", "cluster"), bin, ldflags(), "./kube", "./coredns", "./kubectl"); err != nil {
			return "", err
		}
	}
	if err := linkComponents(bin); err != nil {
		return "", err
	}
	// These are small, and what they are made of is not in the key: go knows.
	if err := goBuild(p.root, bin, "-s -w", "./e2e/sample/pause"); err != nil {
		return "", err
	}
	if err := goBuild(filepath.Join(p.root, "e2e", "sample", "kit"), bin, "-s -w", "."); err != nil {
		return "", err
	}
	return bin, os.WriteFile(filepath.Join(bin, "done"), nil, 0o644)
}

func buildKey(p paths) (string, error) {
	goVersion, err := output("go", "version")
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, goVersion, runtime.GOARCH, ldflags())
	for _, name := range []string{"go.mod", "go.sum", "kube/main.go", "coredns/main.go", "kubectl/main.go"} {
		b, err := os.ReadFile(filepath.Join(p.root, "e2e", "cluster", name))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %x\n", name, sha256.Sum256(b))
	}
	return fmt.Sprintf("%s-%x", kubeVersion, sum.Sum(nil)[:6]), nil
}

// ldflags stamp the version, which clients and servers tell each other.
func ldflags() string {
	major, minor, _ := strings.Cut(strings.TrimPrefix(kubeVersion, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	flags := "-s -w"
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, set := range []string{
			"gitVersion=" + kubeVersion, "gitMajor=" + major, "gitMinor=" + minor, "gitTreeState=clean",
			"gitCommit=000000000000", "buildDate=2026-01-01T00:00:00Z",
		} {
			flags += " -X " + pkg + "." + set
		}
	}
	return flags
}

func goBuild(dir, bin, ldflags string, packages ...string) error {
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=" + ldflags, "-o", bin + "/"}
	cmd := exec.Command("go", append(args, packages...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly", "GOOS=linux", "GOARCH="+runtime.GOARCH)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build %s: %w", strings.Join(packages, " "), err)
	}
	return nil
}

func linkComponents(bin string) error {
	for _, c := range components {
		if err := os.Symlink("kube", filepath.Join(bin, c)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}
