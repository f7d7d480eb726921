package main

import (
	"crypto/tls"
	"embed"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed config
var configs embed.FS

// node sets a node up and keeps its programs running. What can start at once
// does; images are imported while the API server boots.
func (h host) node() error {
	if err := h.ownSystem(); err != nil {
		return err
	}
	if err := h.nodeNetwork(); err != nil {
		return err
	}
	if err := h.nodeConfig(); err != nil {
		return err
	}
	h.ready()
	if h.name == "node1" {
		h.component("etcd")
		h.component("kube-apiserver")
	}
	h.supervise("containerd", "-c", "/etc/kubernetes/containerd.toml")
	if err := h.importImages(); err != nil {
		return err
	}
	if err := waitFor(2*time.Minute, "the API server", apiReady); err != nil {
		return err
	}
	if h.name == "node1" {
		h.component("kube-controller-manager")
		h.component("kube-scheduler")
	}
	kubeconfig := filepath.Join(h.run, "pki", "kubelet-"+h.name+".kubeconfig")
	h.supervise(h.bin+"/kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig="+kubeconfig,
		"--hostname-override="+h.name, "--node-ip="+nodeIP(h.name)+","+nodeIP6(h.name))
	h.supervise(h.bin+"/kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml")
	return nil
}

// component runs a part of the control plane with the arguments of its file.
func (h host) component(name string) {
	h.supervise(filepath.Join(h.bin, name), strings.Fields(h.config(name+".args"))...)
}

// config is a file of the folder config, its variables filled in. What is not
// ours to fill in stays.
func (h host) config(name string) string {
	b, err := configs.ReadFile("config/" + name)
	if err != nil {
		panic(err) // it is part of this program
	}
	return strings.NewReplacer(
		"$NODE_GATEWAY", nodeGateway, "$NODE", h.name, "$IP", nodeIP(h.name), "$PKI", filepath.Join(h.run, "pki"),
		"$CGROUP", cgroup, "$POD_CIDRS", podCIDR+","+podCIDR6, "$SERVICE_CIDRS", serviceCIDR+","+serviceCIDR6, "$DNS_IP", dnsIP,
		"$PROXY_MODE", os.Getenv("PROXY_MODE"), "$OUTSIDE_IP6", outsideIP6, "$OUTSIDE_IP", outsideIP, "$CONFIG", h.disk,
	).Replace(string(b))
}

// ownSystem gives a host a /sys of its network and an /etc and /run of its own,
// all on a tmpfs that goes with it; a node gets its own /var too.
func (h host) ownSystem() error {
	if err := os.MkdirAll(h.disk, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", h.disk, "tmpfs", 0, "mode=755,size=8g"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	for _, d := range []string{"run/lock", "var/lib", "var/log", "etc", "work", "cgroup"} {
		if err := os.MkdirAll(filepath.Join(h.disk, d), 0o755); err != nil {
			return err
		}
	}
	if err := h.ownSys(); err != nil {
		return err
	}
	bind := []string{"/run"}
	if strings.HasPrefix(h.name, "node") {
		bind = append(bind, "/var/lib", "/var/log")
	}
	for _, d := range bind {
		if err := unix.Mount(h.disk+d, d, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", d, err)
		}
	}
	layers := fmt.Sprintf("lowerdir=/etc,upperdir=%[1]s/etc,workdir=%[1]s/work", h.disk)
	if err := unix.Mount("overlay", "/etc", "overlay", 0, layers); err != nil {
		return fmt.Errorf("mount overlay on /etc: %w", err)
	}
	return nil
}

// ownSys mounts a /sys of this network namespace and puts the machine's cgroups
// back onto it.
func (h host) ownSys() error {
	aside := filepath.Join(h.disk, "cgroup")
	if err := unix.Mount("/sys/fs/cgroup", aside, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("move cgroups aside: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if err := unix.Mount(aside, "/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("put cgroups back: %w", err)
	}
	return unix.Unmount(aside, unix.MNT_DETACH)
}

func (h host) nodeNetwork() error {
	if err := sysctls("net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1"); err != nil {
		return err
	}
	if err := sysctls("net/bridge/bridge-nf-call-iptables=1", "net/bridge/bridge-nf-call-ip6tables=1"); err != nil {
		return fmt.Errorf("%w (try: modprobe br_netfilter)", err)
	}
	// What pods send out of the pod network leaves under the node's address.
	return commands(strings.NewReplacer("PODS4", podCIDR, "PODS6", podCIDR6).Replace(`
		iptables -w -t nat -A POSTROUTING -s PODS4 ! -d PODS4 -j MASQUERADE
		ip6tables -w -t nat -A POSTROUTING -s PODS6 ! -d PODS6 -j MASQUERADE`))
}

// nodeConfig writes the configuration files, and hides from the kubelet the
// settings that it would change for the whole machine.
func (h host) nodeConfig() error {
	for _, d := range []string{"/etc/kubernetes", "/etc/cni/net.d"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"containerd.toml", "cni.conflist", "kubelet.yaml", "kube-proxy.yaml"} {
		if err := os.WriteFile("/etc/kubernetes/"+name, []byte(h.config(name)), 0o644); err != nil {
			return err
		}
	}
	for path, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		fake := filepath.Join(h.disk, strings.ReplaceAll(path, "/", "."))
		if err := os.WriteFile(fake, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(fake, "/proc/sys/"+path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("hide %s: %w", path, err)
		}
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// importImages imports what the list that up wrote names.
func (h host) importImages() error {
	containerd := func() error { return command("ctr", "version") }
	if err := waitFor(time.Minute, "containerd", containerd); err != nil {
		return err
	}
	list, err := os.ReadFile(filepath.Join(h.run, "images"))
	if err != nil {
		return err
	}
	for image := range strings.Lines(string(list)) {
		if err := h.runLogged("images", "ctr", "-n", "k8s.io", "images", "import", strings.TrimSpace(image)); err != nil {
			return fmt.Errorf("import %s: %w", image, err)
		}
	}
	return nil
}

// apiReady only asks whether it is there, so any certificate will do.
func apiReady() error {
	client := http.Client{
		Timeout:   2 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	}
	res, err := client.Get("https://" + apiIP + ":6443/readyz")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("readyz: %s", res.Status)
	}
	return nil
}

// waitFor asks again and again until the answer is nil.
func waitFor(limit time.Duration, what string, ask func() error) error {
	end := time.Now().Add(limit)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: not ready after %s: %w", what, limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
