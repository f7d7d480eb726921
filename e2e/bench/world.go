package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Three hosts in a row. The far end forwards packets for nobody but the path that
// is without a tunnel, so that no other path can be taken by mistake.
const (
	prefix   = "cv-bench-"
	scratch  = "/run/cv-bench"
	netnsDir = "/run/netns/" + prefix

	laptop, far, service = "laptop", "far", "service"

	laptopIP   = "10.211.1.1"
	farIP      = "10.211.1.2" // as the laptop sees it
	serviceIP  = "10.211.2.2"
	serviceNet = "10.211.2.0/24"
)

// Congestion control is what most machines have, whatever this one has: on routes
// anybody may choose it, as a host's default it may be forbidden.
const network = `
	ip netns add cv-bench-laptop
	ip netns add cv-bench-far
	ip netns add cv-bench-service
	ip -n cv-bench-laptop link set lo up
	ip -n cv-bench-far link set lo up
	ip -n cv-bench-service link set lo up
	ip -n cv-bench-laptop link add eth0 type veth peer name laptop netns cv-bench-far
	ip -n cv-bench-service link add eth0 type veth peer name service netns cv-bench-far
	ip -n cv-bench-laptop addr add 10.211.1.1/32 dev eth0
	ip -n cv-bench-far addr add 10.211.1.2/32 dev laptop
	ip -n cv-bench-far addr add 10.211.2.1/32 dev service
	ip -n cv-bench-service addr add 10.211.2.2/32 dev eth0
	ip -n cv-bench-laptop link set eth0 up
	ip -n cv-bench-far link set laptop up
	ip -n cv-bench-far link set service up
	ip -n cv-bench-service link set eth0 up
	ip -n cv-bench-laptop route replace local 127.0.0.1 dev lo table local congctl cubic
	ip -n cv-bench-laptop route add 10.211.1.0/24 dev eth0 src 10.211.1.1 congctl cubic
	ip -n cv-bench-laptop route add default metric 2 via 10.211.1.2 congctl cubic
	ip -n cv-bench-far route add 10.211.1.0/24 dev laptop src 10.211.1.2 congctl cubic
	ip -n cv-bench-far route add 10.211.2.0/24 dev service src 10.211.2.1 congctl cubic
	ip -n cv-bench-service route add 10.211.2.0/24 dev eth0 src 10.211.2.2 congctl cubic
	ip -n cv-bench-service route add default via 10.211.2.1 congctl cubic`

// hostSettings are for many connections in a minute.
var hostSettings = []string{"net.ipv4.ip_local_port_range=10000 65000", "net.ipv4.tcp_tw_reuse=1"}

// lacksBBR tells whether the kernel lets a socket have it.
func lacksBBR(string) string {
	b, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if slices.Contains(strings.Fields(string(b)), "bbr") {
		return ""
	}
	return "the kernel has no BBR (modprobe tcp_bbr)"
}

// allowFiles lets what is started here open as many files as may be, for a
// thousand flows are two thousand of them at an end.
func allowFiles() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max // set, for what is not is put back in what is started
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
}

// build makes the hosts.
func build() error {
	if err := commands(network); err != nil {
		return err
	}
	for _, host := range []string{laptop, far, service} {
		for _, s := range hostSettings {
			if err := run("ip", "netns", "exec", prefix+host, "sysctl", "-qw", s); err != nil {
				return err
			}
		}
	}
	return privsepDir()
}

// privsepDir is a folder that sshd wants and Debian makes when it starts its own. It stays:
// somebody else may have one by now.
func privsepDir() error { return os.MkdirAll("/run/sshd", 0o755) }

// clean searches for what is ours and takes it away: it needs to remember nothing, and so also cleans up after a bench that was killed.
func clean(self string) error {
	var errs []error
	paths, _ := filepath.Glob(netnsDir + "*")
	for _, path := range paths {
		errs = append(errs, killAll(path), run("ip", "netns", "del", filepath.Base(path)))
	}
	return errors.Join(append(errs, cleanCluster(self), os.RemoveAll(scratch), os.RemoveAll(hostDisk))...)
}

// commands runs a command a line.
func commands(lines string) error {
	for line := range strings.Lines(lines) {
		if args := strings.Fields(line); len(args) > 0 {
			if err := run(args...); err != nil {
				return err
			}
		}
	}
	return nil
}

func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
