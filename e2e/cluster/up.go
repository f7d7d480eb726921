package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// locked runs one command that changes the cluster at a time. The kernel
// unlocks for a process that is killed.
func locked(p paths, do func() error) error {
	if err := os.MkdirAll(p.cache, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(p.cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another up, down or build is at work (%s is locked)", f.Name())
	}
	return do()
}

type shape struct {
	nodes     []string
	proxyMode string
	sample    bool
}

func wanted() (shape, error) {
	s := shape{nodes: []string{"node1"}, proxyMode: "iptables", sample: os.Getenv("SAMPLE") != "0"}
	switch n := os.Getenv("NODES"); n {
	case "", "1":
	case "2":
		s.nodes = append(s.nodes, "node2")
	default:
		return s, fmt.Errorf("NODES=%s: 1 or 2", n)
	}
	switch m := os.Getenv("PROXY_MODE"); m {
	case "":
	case "iptables", "nftables":
		s.proxyMode = m
	default:
		return s, fmt.Errorf("PROXY_MODE=%s: iptables or nftables", m)
	}
	return s, nil
}

// programs are those of a cluster, and the images that it runs.
func programs(p paths) (bin string, images []string, err error) {
	if bin, err = build(p); err != nil {
		return "", nil, err
	}
	images, err = buildImages(p, bin)
	return bin, images, err
}

// up brings a fresh cluster up. What fails for free comes first.
func up(p paths, buildOnly bool) error {
	s, err := wanted()
	if err != nil {
		return err
	}
	said := newStopwatch()
	if err := install(needs); err != nil {
		return err
	}
	bin, images, err := programs(p)
	if err != nil {
		return err
	}
	said.done("programs and images built")
	if buildOnly {
		alsoTested(p)
		return nil
	}
	if err := down(p); err != nil {
		return err
	}
	// ---- From here on there is something to take down again.
	if err := prepare(p, s, bin, images); err != nil {
		return err
	}
	if err := boot(p, s, said); err != nil {
		return err
	}
	if err := deploy(p, s, said); err != nil {
		return err
	}
	log.Printf("cluster is up\n  kubectl:  KUBECONFIG=%s, on the laptop\n  laptop:   cluster exec laptop -- CMD, and another one, laptop2\n  logs:     %s",
		filepath.Join(p.run, "kubeconfig"), p.logs)
	return nil
}

func prepare(p paths, s shape, bin string, images []string) error {
	if err := os.RemoveAll(p.logs); err != nil {
		return err
	}
	for _, d := range []string{p.logs, p.run} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := os.Symlink(bin, p.bin); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(p.run, "images"), []byte(strings.Join(images, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	if err := makePKI(p, s.nodes); err != nil {
		return err
	}
	if err := makeNetwork(s.nodes); err != nil {
		return err
	}
	return makeCgroups(s.nodes)
}

func boot(p paths, s shape, said *stopwatch) error {
	for _, name := range slices.Concat(s.nodes, []string{"router"}, laptops) {
		if err := startMachine(p, name, []string{"PROXY_MODE=" + s.proxyMode}); err != nil {
			return err
		}
	}
	outside := func() error { return onHost("laptop", "getent", "ahosts", "www.example.com") }
	if err := waitFor(time.Minute, "DNS outside of the cluster", outside); err != nil {
		return explain(p, err, "router.coredns")
	}
	said.done("hosts up")
	if err := wait(p, 2*time.Minute, "API server", "node1.kube-apiserver", "get", "--raw", "/readyz"); err != nil {
		return err
	}
	said.done("API server ready")
	for _, node := range s.nodes {
		if err := wait(p, 2*time.Minute, node, node+".kubelet", "get", "node", node); err != nil {
			return err
		}
		if _, err := kubectl(p, "wait", "--for=condition=Ready", "node/"+node, "--timeout=120s"); err != nil {
			return explain(p, err, node+".kubelet")
		}
	}
	said.done(strings.Join(s.nodes, " and ") + " ready")
	return joinPods(p, s.nodes)
}

// deploy applies the cluster's DNS and the sample system, and waits until all
// of it answers.
func deploy(p paths, s shape, said *stopwatch) error {
	if err := wait(p, time.Minute, "default service account", "node1.kube-controller-manager", "get", "serviceaccount", "default"); err != nil {
		return err
	}
	manifest := filepath.Join(p.run, "coredns.yaml")
	if err := os.WriteFile(manifest, []byte(host{paths: p}.config("coredns.yaml")), 0o644); err != nil {
		return err
	}
	if _, err := kubectl(p, "apply", "--server-side", "-f", manifest); err != nil {
		return err
	}
	if s.sample {
		if err := applySample(p); err != nil {
			return err
		}
	}
	if _, err := kubectl(p, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s"); err != nil {
		return explainPods(p, err)
	}
	said.done("DNS ready")
	if !s.sample {
		return nil
	}
	if err := waitForSample(p); err != nil {
		return explainPods(p, err)
	}
	said.done("sample system ready")
	return nil
}

// applySample makes the sample system, and the mall.
func applySample(p paths) error {
	sample := filepath.Join(p.root, "e2e", "sample")
	if _, err := kubectl(p, "apply", "--server-side", "-f", sample); err != nil {
		return err
	}
	manifest, err := mall(sample)
	if err != nil {
		return err
	}
	file := filepath.Join(p.run, "mall.yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o644); err != nil {
		return err
	}
	_, err = kubectl(p, "apply", "--server-side", "-f", file)
	return err
}

// mall is most of shop once more, in a namespace of its own: for tests that run
// beside those in shop and change what they find.
func mall(sample string) (string, error) {
	var all []string
	for _, name := range []string{"app", "client", "db", "redis", "web"} {
		b, err := os.ReadFile(filepath.Join(sample, name+".yaml"))
		if err != nil {
			return "", err
		}
		all = append(all, string(b))
	}
	return strings.NewReplacer("namespace: shop", "namespace: mall", ".shop.", ".mall.", "nodePort: 30080", "nodePort: 30081").
		Replace(strings.Join(all, "---\n")), nil
}

func waitForSample(p paths) error {
	both := []string{"deployment/web", "deployment/app", "deployment/redis", "statefulset/db"}
	for namespace, workloads := range map[string][]string{
		"shop": append([]string{"deployment/echo", "deployment/pg"}, both...), "mall": both, "other": {"deployment/web"},
	} {
		for _, workload := range workloads {
			if _, err := kubectl(p, "-n", namespace, "rollout", "status", workload, "--timeout=120s"); err != nil {
				return err
			}
		}
		if _, err := kubectl(p, "-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s"); err != nil {
			return err
		}
	}
	// Until kube-proxy knows a Service, packets to it leave by the default route and are lost: ask with short limits.
	for _, namespace := range []string{"shop", "mall"} {
		if err := wait(p, time.Minute, "web by DNS and virtual address", "node1.kube-proxy",
			"-n", namespace, "exec", "client", "--", "kit", "-t", "500ms", "get", "http://web."+namespace+".svc.cluster.local/"); err != nil {
			return err
		}
	}
	return nil
}

// kubectl runs on the laptop, as cluster-admin.
func kubectl(p paths, args ...string) (string, error) {
	return outputOf("laptop", slices.Concat([]string{"kubectl", "--kubeconfig", filepath.Join(p.run, "kubeconfig")}, args)...)
}

// wait asks by kubectl until there is an answer.
func wait(p paths, limit time.Duration, what, component string, args ...string) error {
	err := waitFor(limit, what, func() error {
		_, err := kubectl(p, args...)
		return err
	})
	if err != nil {
		return explain(p, err, component)
	}
	return nil
}

// explain adds where to read on.
func explain(p paths, err error, component string) error {
	name := filepath.Join(p.logs, component+".log")
	return fmt.Errorf("%w\nread %s, which ends:\n%s", err, name, tail(name))
}

// explainPods adds what the pods and their events say.
func explainPods(p paths, err error) error {
	pods, _ := kubectl(p, "get", "pods", "-A", "-o", "wide")
	events, _ := kubectl(p, "get", "events", "-A", "--field-selector=type!=Normal")
	return explain(p, fmt.Errorf("%w\n%s\n%s", err, pods, events), "node1.kubelet")
}

// stopwatch says what is done, and how long after the start.
type stopwatch struct{ start time.Time }

func newStopwatch() *stopwatch { return &stopwatch{time.Now()} }

func (s *stopwatch) done(what string) {
	log.Printf("✓ %-28s %5.1fs", what, time.Since(s.start).Seconds())
}

// load imports an image archive into one node, or all.
func load(args []string) error {
	var nodes []string
	for _, m := range machines() {
		if strings.HasPrefix(m.name, "node") && (len(args) < 2 || args[0] == m.name) {
			nodes = append(nodes, m.name)
		}
	}
	if len(args) < 1 || len(args) > 2 {
		return errors.New("usage: cluster load [NODE] IMAGE.tar")
	}
	if len(nodes) == 0 {
		return errors.New("no such node: is the cluster up? (cluster status)")
	}
	archive, err := filepath.Abs(args[len(args)-1])
	if err != nil {
		return err
	}
	for _, node := range nodes {
		out, err := outputOf(node, "ctr", "-n", "k8s.io", "images", "import", archive)
		if err != nil {
			return err
		}
		log.Printf("✓ %s: %s", node, strings.TrimSpace(out))
	}
	return nil
}

func status(p paths) error {
	found := machines()
	if len(found) == 0 {
		return errors.New("the cluster is down")
	}
	for _, m := range found {
		fmt.Printf("%-8s up, pid %d\n", m.name, m.pid)
	}
	pods, err := kubectl(p, "get", "pods", "-A", "-o", "wide")
	fmt.Print(pods)
	return err
}

// restartAPIServer kills it; it is started again by its host.
func restartAPIServer(p paths) error {
	pid, err := apiServerPID()
	if err != nil {
		return err
	}
	said := newStopwatch()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return err
	}
	if err := wait(p, 2*time.Minute, "API server", "node1.kube-apiserver", "get", "--raw", "/readyz"); err != nil {
		return err
	}
	said.done("API server ready again")
	return nil
}

func apiServerPID() (int, error) {
	node := findMachine("node1")
	if node == 0 {
		return 0, errors.New("no node1: is the cluster up? (cluster status)")
	}
	home, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", node))
	if err != nil {
		return 0, err
	}
	for _, pid := range processes() {
		ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		program, _, _ := strings.Cut(string(cmdline), "\x00")
		if ns == home && filepath.Base(program) == "kube-apiserver" {
			return pid, nil
		}
	}
	return 0, errors.New("no API server runs on node1")
}
