package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	hostBin = "/run/culvert-e2e/bin" // on the laptop: kubectl, for every user
	devUID  = 1000
	devHome = "/run/home/dev"
)

// laptop is a developer's machine: its own /etc (an overlay, so that
// resolv.conf and hosts can be written, renamed over and lost), /run, TUN
// device, and a user "dev" without privileges.
func (h host) laptop() error {
	if err := h.ownSystem(); err != nil {
		return err
	}
	// As distributions set it, so that ordinary users may ping.
	if err := sysctls("net/ipv4/ping_group_range=0 2147483647"); err != nil {
		return err
	}
	for _, step := range []func() error{h.laptopEtc, h.laptopUser, h.laptopTUN, h.laptopBin} {
		if err := step(); err != nil {
			return err
		}
	}
	h.ready()
	return nil
}

func (h host) laptopEtc() error {
	// It may be a link into /run, which is another one now.
	if err := os.Remove("/etc/resolv.conf"); err != nil && !os.IsNotExist(err) {
		return err
	}
	resolv := "nameserver " + outsideIP + "\nsearch corp.example\noptions timeout:1\n"
	if err := os.WriteFile("/etc/resolv.conf", []byte(resolv), 0o644); err != nil {
		return err
	}
	return os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 "+h.name+"\n"), 0o644)
}

func (h host) laptopUser() error {
	kube := filepath.Join(devHome, ".kube")
	if err := os.MkdirAll(kube, 0o755); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(h.run, "kubeconfig-dev"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(kube, "config"), config, 0o600); err != nil {
		return err
	}
	for _, path := range []string{devHome, kube, filepath.Join(kube, "config")} {
		if err := os.Chown(path, devUID, devUID); err != nil {
			return err
		}
	}
	user := fmt.Appendf(nil, "dev:x:%d:%[1]d::%s:/bin/sh\n", devUID, devHome)
	group := fmt.Appendf(nil, "dev:x:%d:\n", devUID)
	if err := prepend("/etc/passwd", user); err != nil {
		return err
	}
	return prepend("/etc/group", group)
}

func prepend(path string, lines []byte) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return os.WriteFile(path, bytes.Join([][]byte{lines, old}, nil), 0o644)
}

// laptopTUN makes /dev/net/tun, for a container may lack it.
func (h host) laptopTUN() error {
	if _, err := os.Stat("/dev/net"); err != nil {
		return fmt.Errorf("no TUN device (try: modprobe tun): %w", err)
	}
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /dev/net: %w", err)
	}
	if err := unix.Mknod("/dev/net/tun", unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return fmt.Errorf("make /dev/net/tun: %w", err)
	}
	return os.Chmod("/dev/net/tun", 0o666)
}

// laptopBin shows kubectl to users who may not look into root's cache.
func (h host) laptopBin() error {
	if err := os.MkdirAll(hostBin, 0o755); err != nil {
		return err
	}
	kubectl := filepath.Join(hostBin, "kubectl")
	if err := os.WriteFile(kubectl, nil, 0o755); err != nil {
		return err
	}
	return unix.Mount(filepath.Join(h.bin, "kubectl"), kubectl, "", unix.MS_BIND, "")
}

// router is the world outside of the cluster: the ways, DNS, the web.
func (h host) router() error {
	if err := h.ownSystem(); err != nil {
		return err
	}
	if err := firewall(); err != nil {
		return err
	}
	for _, name := range []string{"Corefile", "zone"} {
		if err := os.WriteFile(filepath.Join(h.disk, name), []byte(h.config(name)), 0o644); err != nil {
			return err
		}
	}
	h.ready()
	h.supervise(filepath.Join(h.bin, "coredns"), "-conf", filepath.Join(h.disk, "Corefile"))
	h.supervise(filepath.Join(h.bin, "kit"), "outside")
	return nil
}
