package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// On the cluster of e2e/cluster culvert itself runs, on its laptop, beside what
// everybody has: by way of the API server, and past it. Who is asked is in a pod's network
// namespace, next to the pod's own program.
const (
	clusterNetns     = "/run/netns/culvert-laptop"
	clusterNamespace = "shop"
	clusterLabel     = "app=cv-bench"
)

const clusterPod = `
apiVersion: v1
kind: Service
metadata: {name: cv-bench, namespace: shop, labels: {app: cv-bench}}
spec:
  selector: {app: cv-bench}
  ports: [{name: iperf, port: 5201}, {name: echo, port: 7000}, {name: hello, port: 7001}]
---
apiVersion: v1
kind: Pod
metadata: {name: cv-bench, namespace: shop, labels: {app: cv-bench}}
spec:
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: pause
    image: localhost/client:1
    imagePullPolicy: IfNotPresent
    command: [sleep, "1000000000"]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
`

var clusterPaths = []path{
	{name: "port-forward", what: "kubectl port-forward, no TUN", crowd: true, open: openPortForward},
	{name: "culvert-forward", what: "culvert forward, no TUN", open: openForward},
	{name: "bare", what: "an upgraded stream of pods/proxy for each flow, no TUN", open: openBare},
	{name: "culvert", what: "culvert connect with its TUN", many: true, crowd: true, open: connect()},
	{name: "culvert-run", what: "culvert run, with a TUN in namespaces of its own and no root", open: openRun},
	{name: "culvert-proxy", what: "culvert proxy by SOCKS5, no TUN and no root", crowd: true, open: openProxy},
	{name: "culvert-wire-ssh", what: "culvert connect with --wire ssh", open: connect("--wire", "ssh")},
	{name: "culvert-endpoint", what: "the same with --endpoint auto, past the API server", open: past("tls")},
	{name: "culvert-endpoint-wireguard", what: "the same with --wire wireguard", open: past("wireguard", "--wire", "wireguard")},
}

// harness runs what is built beside self.
func harness(self string, args ...string) []string {
	return append([]string{filepath.Join(filepath.Dir(self), "cluster")}, args...)
}

// clusterLaptop is where the harness's exec leads to.
func clusterLaptop(self string) place {
	return place{netns: clusterNetns, stays: true, enter: harness(self, "exec", "laptop", "--",
		"env", "HOME=/root", "KUBECONFIG="+kubeconfig(self), "CULVERT_IMAGE=localhost/culvert-shadow:dev")}
}

// kubectl is that of the laptop.
func kubectl(ctx context.Context, self string, args ...string) (string, error) {
	out, err := output(ctx, clusterLaptop(self), append([]string{"kubectl", "-n", clusterNamespace}, args...)...)
	return strings.TrimSpace(string(out)), err
}

// onCluster measures on a cluster that is up.
func (b *bench) onCluster(ctx context.Context, o options) error {
	if !clusterIsUp(b.self) {
		b.report.note("the ways to a cluster are left out: none is up (make cluster-up)")
		return nil
	}
	pod, err := startPod(ctx, b.self)
	if err != nil {
		return err
	}
	b.service = pod
	server, err := start(pod, "serve", b.self, "serve")
	if err != nil {
		return err
	}
	defer server.stop()
	if err := listening(ctx, server, helloPort); err != nil {
		return err
	}
	visits := [][]probe{memory, slices.Concat(small[1:], after)}
	// port-forward ends with the first reset, as with that of a stream's end.
	for _, p := range slices.Concat(bulk, small[:1]) {
		visits = append(visits, []probe{p})
	}
	if o.cluster {
		of := choose(clusterPaths, o.paths, condition{})
		err = b.series(ctx, "a cluster, by way of its API server or past it", "cluster", "port-forward", of, visits, o.rounds, func() error { return nil })
	}
	if err == nil {
		err = b.amongCrowd(ctx, o)
	}
	return err
}

// startPod makes a pod, and tells the way into its network namespace.
func startPod(ctx context.Context, self string) (place, error) {
	apply := onHost(ctx, clusterLaptop(self), "kubectl", "apply", "-f", "-")
	apply.Stdin = strings.NewReader(clusterPod)
	if out, err := apply.CombinedOutput(); err != nil {
		return place{}, fmt.Errorf("make the pod: %w: %s", err, out)
	}
	if _, err := kubectl(ctx, self, "wait", "--for=condition=Ready", "--timeout=60s", "pod/cv-bench"); err != nil {
		return place{}, err
	}
	uid, err := kubectl(ctx, self, "get", "pod", "cv-bench", "-o", "jsonpath={.metadata.uid}")
	if err != nil {
		return place{}, err
	}
	pid, err := inPod(uid)
	if err != nil {
		return place{}, err
	}
	return inNetwork(pid), nil
}

// inNetwork is the place of a process.
func inNetwork(pid int) place {
	return place{netns: fmt.Sprintf("/proc/%d/ns/net", pid), enter: []string{"nsenter", "--target", strconv.Itoa(pid), "--net"}}
}

// inPod finds a process of a pod: its cgroup bears the pod's UID.
func inPod(uid string) (int, error) {
	paths, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, path := range paths {
		b, _ := os.ReadFile(path)
		if s := string(b); strings.Contains(s, uid) || strings.Contains(s, strings.ReplaceAll(uid, "-", "_")) {
			return strconv.Atoi(strings.Split(path, "/")[2])
		}
	}
	return 0, fmt.Errorf("no process of pod %s here", uid)
}

// clusterIsUp tells whether there is one that was made from here.
func clusterIsUp(self string) bool {
	for _, path := range []string{clusterNetns, kubeconfig(self), harness(self)[0]} {
		if _, err := os.Stat(path); err != nil {
			return false
		}
	}
	return true
}

func kubeconfig(self string) string {
	return filepath.Join(filepath.Dir(self), "../e2e/.run/kubeconfig")
}

// cleanCluster takes away pod and Service, the crowd, and what ran on the laptop and beside
// the pod.
func cleanCluster(self string) error {
	if !clusterIsUp(self) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // a crowd takes one
	defer cancel()
	err := endMarked()
	_, err2 := kubectl(ctx, self, "delete", "pod,svc", "-l", clusterLabel, "--force", "--grace-period=0", "--ignore-not-found")
	_, err3 := kubectl(ctx, self, "delete", "namespace", "-l", clusterLabel, "--ignore-not-found")
	return errors.Join(err, err2, err3)
}

// endMarked ends what an earlier bench started (see onHost). Only who has no parent
// among them is told: culvert puts back what it changed, and ends its own children.
func endMarked() error {
	all := stats()
	for _, pid := range marked(all) {
		if !slices.Contains(marked(all), all[pid].parent) {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
	}
	for deadline := time.Now().Add(2 * patience); len(marked(stats())) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v of an earlier bench do not end", marked(stats()))
		}
	}
	return nil
}

// marked are the processes that bear the mark.
func marked(all map[int]stat) (pids []int) {
	for pid := range all {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if slices.Contains(strings.Split(string(b), "\x00"), mark) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func openPortForward(ctx context.Context, self string) (*tunnel, error) {
	args := []string{"kubectl", "-n", clusterNamespace, "port-forward", "pod/cv-bench"}
	for _, port := range forwarded {
		args = append(args, strconv.Itoa(port))
	}
	return overAPI(self, "port-forward", onLoopback, args...)
}

func openForward(ctx context.Context, self string) (*tunnel, error) {
	args := []string{culvert(self), "forward", "-n", clusterNamespace, "svc/cv-bench"}
	for _, port := range forwarded {
		args = append(args, strconv.Itoa(port))
	}
	return overAPI(self, "forward", onLoopback, args...)
}

// openRun has the loads in the namespaces of a command that waits.
func openRun(ctx context.Context, self string) (*tunnel, error) {
	ip, err := serviceAddress(ctx, self)
	if err != nil {
		return nil, err
	}
	waits := []string{"sleep", "1000000000"}
	t, err := overAPI(self, "run", func(port int) (string, int) { return ip, port },
		append([]string{culvert(self), "run", "-n", clusterNamespace, "--"}, waits...)...)
	if err != nil {
		return t, err
	}
	return t, t.near[0].until(ctx, "a command of culvert run", func() (bool, error) {
		for _, pid := range t.near[0].family(stats()) {
			if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); string(b) == strings.Join(waits, "\x00")+"\x00" {
				t.at = inNetwork(pid)
				return true, nil
			}
		}
		return false, nil
	})
}

func openProxy(ctx context.Context, self string) (*tunnel, error) {
	ip, err := serviceAddress(ctx, self)
	if err != nil {
		return nil, err
	}
	t, err := overAPI(self, "proxy", func(port int) (string, int) { return ip, port },
		culvert(self), "proxy", "-n", clusterNamespace, "--socks", strconv.Itoa(socksPort), "--http", "off")
	if err == nil {
		err = bySOCKS(self, t, address("127.0.0.1", socksPort))
	}
	return t, err
}

// connect opens culvert's way, with these flags: it reaches the Service by its address.
func connect(flags ...string) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, self string) (*tunnel, error) {
		ip, err := serviceAddress(ctx, self)
		if err != nil {
			return nil, err
		}
		reach := func(port int) (string, int) { return ip, port }
		command := []string{culvert(self), "connect", "-n", clusterNamespace}
		return overAPI(self, "connect", reach, append(command, flags...)...)
	}
}

func serviceAddress(ctx context.Context, self string) (string, error) {
	return kubectl(ctx, self, "get", "svc", "cv-bench", "-o", "jsonpath={.spec.clusterIP}")
}

func culvert(self string) string { return filepath.Join(filepath.Dir(self), "culvert") }

// past is connect whose wire goes past the API server, as it does when that was seen to work.
func past(kind string, flags ...string) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, self string) (*tunnel, error) {
		t, err := connect(append(flags, "--endpoint", "auto")...)(ctx, self)
		if err != nil {
			return t, err
		}
		t.check = func(ctx context.Context) error {
			is, err := wireNow(ctx, self)
			if err == nil && !strings.HasPrefix(is, kind+" endpoint ") {
				err = fmt.Errorf("the wire is %q, not %s past the API server", is, kind)
			}
			return err
		}
		return t, nil
	}
}

// wireNow is what the wire is, and which way it goes.
func wireNow(ctx context.Context, self string) (string, error) {
	all, err := sessions(ctx, self)
	if err != nil || len(all) == 0 {
		return "", err
	}
	return all[0].Wire.Kind + " " + all[0].Wire.Way, nil
}

// A session is what "culvert status" tells of one.
type session struct {
	Wire struct{ Kind, Way string }
	DNS  struct {
		Server netip.Addr
		Whole  []string
	}
}

func sessions(ctx context.Context, self string) (all []session, err error) {
	out, err := output(ctx, clusterLaptop(self), culvert(self), "status", "-o", "json")
	if err != nil {
		return nil, err
	}
	return all, json.Unmarshal(out, &all)
}

func openBare(ctx context.Context, self string) (*tunnel, error) {
	return overAPI(self, "bare", onLoopback, self, "bare")
}

func overAPI(self, name string, reach func(int) (string, int), args ...string) (*tunnel, error) {
	t := &tunnel{at: clusterLaptop(self), reach: reach, several: 4, begun: time.Now()}
	p, err := start(t.at, name, args...)
	if err == nil {
		t.near = []*process{p}
	}
	return t, err
}
