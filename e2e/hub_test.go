package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	hubSpace  = "hub"
	hubImage  = "localhost/culvert-hub:dev"
	hubPods   = "app.kubernetes.io/name=culvert-hub"
	theHost   = "db-01"
	underRule = `
apiVersion: v1
kind: Namespace
metadata:
  name: ` + hubSpace + `
  labels: {pod-security.kubernetes.io/enforce: restricted, pod-security.kubernetes.io/warn: restricted, pod-security.kubernetes.io/warn-version: latest}
`
)

// A hub as docs/hub.md has it made: hosts that nobody can dial are reached by name while
// its replicas are deleted, killed and replaced, and while its rights change.
func TestHub(t *testing.T) {
	t.Parallel() // it has a namespace and machines of its own
	together(t)
	w := newHubWorld(t)
	w.install()
	w.host()
	w.stranger()
	w.onePort()

	w.await("hubs that have started together know each other", func() error {
		for range 12 { // by all of them, most likely
			if err := w.login("ci"); err != nil {
				return err
			}
		}
		return nil
	})
	held := []*stream{w.hold("ci"), w.hold("ci"), w.hold("ci")}
	mallory := w.hold("mallory")
	l := w.logins(2)

	w.permit(theHost, "ci", "late")
	w.await("late gets in, and mallory is shown out", func() error {
		if mallory.alive() {
			return errors.New("mallory is still there")
		}
		return w.login("late")
	})
	l.fine("rights were changed")

	deleted := w.holders()[0]
	w.kubectl("delete", "pod", deleted, "--wait=false")
	w.await("another in its place", func() error { return w.ready(3, deleted) })
	w.await("the host is at two of those that stay", func() error { return w.heldBy(2, deleted) })
	l.fine("a pod was deleted")

	killed := w.holders(deleted)[0]
	l.patient.Store(true) // some find who was killed until the cluster has noticed
	l.spares(w.kill(killed))
	w.await("its death is noticed", func() error {
		if n := w.kubectl("get", "pod", killed, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"); n == "0" {
			return errors.New("it was never restarted")
		}
		return nil
	})
	w.await("it is started again", func() error { return w.ready(3, deleted) })
	w.await("the host is at two again", func() error { return w.heldBy(2, deleted) })
	l.fine("one was killed")
	l.patient.Store(false)

	for _, s := range slices.Clone(held) { // what went through who was killed, has ended with it
		if s.speak() != nil {
			held = slices.DeleteFunc(held, func(o *stream) bool { return o == s })
		}
	}
	held = append(held, w.hold("ci"), w.hold("ci"))
	before := w.pods()
	w.kubectl("rollout", "restart", "deployment/hub")
	w.kubectl("rollout", "status", "deployment/hub", "--timeout=2m")
	w.await("the host is at two of the new ones", func() error { return w.heldBy(2, before...) })
	l.fine("all were replaced")
	l.stop()
	for _, s := range held { // by those that are about to go
		if err := s.speak(); err != nil {
			t.Errorf("a connection that was open has not outlived the restart: %v", err)
		}
		s.end()
	}
	w.await("those have gone as soon as nothing was open", func() error { return w.gone(before) })
}

// A hubWorld is a hub in the cluster, and outside of it a host and somebody who reaches it,
// each a network of its own behind the router.
type hubWorld struct {
	t       *testing.T
	dir     string
	address string // of the hub
}

func newHubWorld(t *testing.T) *hubWorld {
	w := &hubWorld{t: t, dir: t.TempDir()}
	w.plugIn(theHost, 20)
	w.plugIn("ci", 21)
	for _, name := range []string{"hub_key", theHost, "ci", "late", "mallory", "host_key"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", w.path(name)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, pod := range w.pods() {
				t.Logf("%s said:\n%s", pod, w.kubectl("logs", "--tail=40", pod))
			}
		}
		_, _ = nodeKubectl("delete", "namespace", hubSpace, "--wait=false")
		for _, pod := range w.pods() {
			_, _ = nodeKubectl("delete", "pod", "-n", hubSpace, pod, "--force", "--grace-period=0")
		}
		_, _ = nodeKubectl("delete", "namespace", hubSpace)
	})
	return w
}

func (w *hubWorld) path(name string) string { return filepath.Join(w.dir, name) }

func (w *hubWorld) read(name string) string { return string(must(os.ReadFile(w.path(name)))) }

func (w *hubWorld) write(name, text string) { writeFile(w.t, w.dir, name, text, 0o600) }

// plugIn makes a machine that is nothing but a network: it can dial NodePorts, and is not
// dialled by anybody.
func (w *hubWorld) plugIn(name string, n int) {
	w.t.Helper()
	ns, device := "culvert-"+name, "hub-"+name
	remove := func() { _ = exec.Command("ip", "netns", "del", ns).Run() }
	remove() // of a test that was killed
	if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
		w.t.Fatalf("ip netns add: %v: %s", err, out)
	}
	w.t.Cleanup(remove)
	hostIP(w.t, "router", "link add "+device+" type veth peer name eth0 netns "+ns, fmt.Sprintf("addr add 172.31.%d.1/24 dev %s", n, device), "link set "+device+" up")
	hostIP(w.t, name, "link set lo up", fmt.Sprintf("addr add 172.31.%d.2/24 dev eth0", n), "link set eth0 up", fmt.Sprintf("route add default via 172.31.%d.1", n))
}

// at is a command on one of them, with a /run of its own.
func (w *hubWorld) at(ctx context.Context, name, script string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", "culvert-" + name, "sh", "-c", "mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && " + script, name}, args...)...)
	c.Env, c.Dir, c.WaitDelay = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + w.dir}, w.dir, time.Second
	return c
}

func (w *hubWorld) kubectl(args ...string) string {
	w.t.Helper()
	out, err := nodeKubectl(append([]string{"-n", hubSpace}, args...)...)
	if err != nil {
		w.t.Error(err)
	}
	return out
}

func (w *hubWorld) await(what string, ok func() error) {
	w.t.Helper()
	eventually(w.t, patience, what, ok)
}

// install does what docs/hub.md says.
func (w *hubWorld) install() {
	w.t.Helper()
	w.write("namespace.yaml", underRule)
	w.write("hub.yaml", strings.Replace(string(must(os.ReadFile(filepath.Join(root, "manifests/hub/hub.yaml")))), "ghcr.io/culvert-dev/culvert-hub:dev", hubImage, 1))
	w.kubectl("apply", "-f", w.path("namespace.yaml"))
	w.kubectl("create", "secret", "generic", "hub-key", "--from-file="+w.path("hub_key"))
	w.permit(theHost, "ci", "mallory")
	if said := w.kubectl("apply", "-f", w.path("hub.yaml")); strings.Contains(said, "Warning") {
		w.t.Errorf("kubectl apply says %s", said)
	}
	w.address = nodeIP + ":" + w.kubectl("get", "service", "hub", "-o", "jsonpath={.spec.ports[0].nodePort}")
	w.await("three replicas", func() error { return w.ready(3) })
}

// permit lets in whom it names, and nobody else.
func (w *hubWorld) permit(names ...string) {
	w.t.Helper()
	text := ""
	for _, name := range names {
		may := `restrict,port-forwarding,permitopen="db-*:22",from="172.31.21.2"` // nobody's address but theirs
		if name == theHost {
			may = `permitlisten="` + theHost + `:*"`
		}
		text += may + " " + w.read(name+".pub")
	}
	w.write("authorized_keys", text)
	w.write("rights.yaml", w.kubectl("create", "configmap", "hub-rights", "--from-file="+w.path("authorized_keys"), "--dry-run=client", "-o", "yaml"))
	w.kubectl("apply", "-f", w.path("rights.yaml"))
}

// host runs a stock server, and the agent, on a machine that nobody dials.
func (w *hubWorld) host() {
	w.t.Helper()
	w.write("sshd_config", strings.NewReplacer("DIR", w.dir).Replace(`
		Port 22
		HostKey DIR/host_key
		AuthorizedKeysFile DIR/ci.pub
		PidFile none
		UsePAM no
		LogLevel ERROR
		StrictModes no
		PasswordAuthentication no
		MaxStartups 100
		PermitRootLogin yes
	`))
	startAs(w.t, w.at(context.Background(), theHost, "exec /usr/sbin/sshd -D -e -f sshd_config"))
	agent := startAs(w.t, w.at(context.Background(), theHost, `exec "$@"`, culvertBin, "agent", "-v", "--hub", w.address, "--name", theHost, "--offer", "22", "--key", theHost, "--hub-key", strings.TrimSpace(w.read("hub_key.pub"))))
	w.await("the host is there", func() error {
		if text := agent.talk.String(); !strings.Contains(text, "offered as "+theHost) {
			return errors.New(text)
		}
		return w.heldBy(2)
	})
	for _, key := range []string{"ci", "late", "mallory"} {
		lines := must(w.at(context.Background(), "ci", `exec "$@"`, culvertBin, "ssh-config", "--key", w.path(key), "--hub-key", w.read("hub_key.pub"), w.address, "db-*").Output())
		known, config, _ := strings.Cut(string(lines), "\n")
		w.write("known_hosts", strings.TrimPrefix(known, "# known_hosts: ")+"\n"+theHost+" "+w.read("host_key.pub"))
		w.write("config-"+key, config+"  IdentityFile "+w.path("ci")+"\n  User root\nHost *\n  ServerAliveInterval 2\n  BatchMode yes\n  IdentitiesOnly yes\n"+
			"  UserKnownHostsFile "+w.path("known_hosts")+"\n  StrictHostKeyChecking yes\n")
	}
	w.write("config-patient", w.read("config-ci")+"  ConnectionAttempts 10\n")
	w.await("and is reached", func() error { return w.login("ci") })
}

// login is one by way of the hub, with nothing but OpenSSH.
func (w *hubWorld) login(key string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c := w.at(ctx, "ci", `exec "$@"`, "ssh", "-F", w.path("config-"+key), theHost, "echo", "in")
	var said bytes.Buffer
	c.Stderr = &said
	out, err := c.Output()
	if err == nil && strings.TrimSpace(string(out)) != "in" {
		err = fmt.Errorf("it answered %q", out)
	}
	if err != nil {
		return fmt.Errorf("login: %w: %s", err, said.String())
	}
	return nil
}

// stranger is not let in, and finds no other way to the host; what is audited has addresses
// of clients, not those of nodes.
func (w *hubWorld) stranger() {
	w.t.Helper()
	if err := w.login("late"); err == nil {
		w.t.Error("late is in, without a line")
	}
	if out, err := w.at(w.t.Context(), "ci", "exec nc -z -w 2 172.31.20.2 22").CombinedOutput(); err == nil {
		w.t.Errorf("the host was dialled: %s", out)
	}
	var audit string
	for _, pod := range w.pods() {
		audit += w.kubectl("logs", pod)
	}
	for _, want := range []string{`"who":"ci","key"`, `"from":"172.31.21.2"`, `"from":"172.31.20.2"`, `"verdict":"refused"`} {
		if !strings.Contains(audit, want) {
			w.t.Errorf("the audit log has no %s:\n%s", want, audit)
		}
	}
}

// onePort scans a pod.
func (w *hubWorld) onePort() {
	w.t.Helper()
	ip := w.kubectl("get", "pod", w.pods()[0], "-o", "jsonpath={.status.podIP}")
	var mu sync.Mutex
	var open []int
	ports := make(chan int)
	var all sync.WaitGroup
	dial := dialFrom("node1")
	for range 16 {
		all.Go(func() {
			for port := range ports {
				ctx, cancel := context.WithTimeout(w.t.Context(), time.Second)
				if c, err := dial(ctx, "tcp", net.JoinHostPort(ip, fmt.Sprint(port))); err == nil {
					c.Close()
					mu.Lock()
					open = append(open, port)
					mu.Unlock()
				}
				cancel()
			}
		})
	}
	for port := 1; port < 1<<16; port++ {
		ports <- port
	}
	close(ports)
	all.Wait()
	if len(open) != 1 || open[0] != 8443 {
		w.t.Errorf("open ports: %v", open)
	}
}

// pods are those of the hub, perhaps about to go.
func (w *hubWorld) pods() []string {
	out, err := nodeKubectl("get", "pods", "-n", hubSpace, "-l", hubPods, "-o", "jsonpath={.items[*].metadata.name}")
	if err != nil {
		return nil
	}
	return strings.Fields(out)
}

// ready wants so many, besides those.
func (w *hubWorld) ready(n int, besides ...string) error {
	out, err := nodeKubectl("get", "pods", "-n", hubSpace, "-l", hubPods, "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
	if err != nil {
		return err
	}
	have := 0
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) == 2 && f[1] == "True" && !slices.Contains(besides, f[0]) {
			have++
		}
	}
	if have < n {
		return fmt.Errorf("%d are ready:\n%s", have, out)
	}
	return nil
}

func (w *hubWorld) gone(pods []string) error {
	for _, pod := range w.pods() {
		if slices.Contains(pods, pod) {
			return fmt.Errorf("%s is still there", pod)
		}
	}
	return nil
}

// holders are the replicas that the host is attached to, as their logs have it.
func (w *hubWorld) holders(besides ...string) (all []string) {
	for _, pod := range w.pods() {
		if slices.Contains(besides, pod) {
			continue
		}
		logs, _ := nodeKubectl("logs", "-n", hubSpace, pod)
		if strings.Count(logs, `"verdict":"attached"`) > strings.Count(logs, `"verdict":"detached"`) {
			all = append(all, pod)
		}
	}
	return all
}

func (w *hubWorld) heldBy(n int, besides ...string) error {
	if all := w.holders(besides...); len(all) < n {
		return fmt.Errorf("the host is at %v", all)
	}
	return nil
}

// kill ends a replica as a crash does, some time between the two.
func (w *hubWorld) kill(pod string) (from, to time.Time) {
	w.t.Helper()
	f := strings.Fields(w.kubectl("get", "pod", pod, "-o", "jsonpath={.spec.nodeName} {.status.containerStatuses[0].containerID}"))
	from = time.Now()
	if out, err := on(f[0], "ctr", "-n", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", strings.TrimPrefix(f[1], "containerd://")).CombinedOutput(); err != nil {
		w.t.Fatalf("ctr tasks kill: %v: %s", err, out)
	}
	return from, time.Now()
}

// A stream is a connection to the host that stays open.
type stream struct {
	cmd *exec.Cmd
	in  *os.File
	out lockedBuffer
	n   int
	ctx context.Context // done when it has ended
}

func (w *hubWorld) hold(key string) *stream {
	w.t.Helper()
	s := &stream{cmd: w.at(context.Background(), "ci", `exec "$@"`, "ssh", "-F", w.path("config-"+key), theHost, "cat")}
	r, in, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	s.in, s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = in, r, &s.out, &s.out
	if err := s.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	r.Close()
	ctx, ended := context.WithCancel(context.Background())
	s.ctx = ctx
	go func() { _ = s.cmd.Wait(); ended() }()
	w.t.Cleanup(s.end)
	if err := s.speak(); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// speak wants to hear what was said.
func (s *stream) speak() error {
	s.n++
	line := fmt.Sprintf("line %d\n", s.n)
	if _, err := s.in.WriteString(line); err != nil {
		return fmt.Errorf("%w: %s", err, s.out.String())
	}
	for end := time.Now().Add(15 * time.Second); !strings.Contains(s.out.String(), line); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) || !s.alive() {
			return fmt.Errorf("no %s in %s", line, s.out.String())
		}
	}
	return nil
}

func (s *stream) alive() bool { return s.ctx.Err() == nil }

func (s *stream) end() {
	s.in.Close()
	_ = s.cmd.Process.Kill()
	<-s.ctx.Done()
}

// A loop logs in again and again.
type loop struct {
	t    *testing.T
	end  context.CancelFunc
	over sync.WaitGroup

	patient atomic.Bool // a connection that is refused is tried again

	mu       sync.Mutex
	n        int
	failed   []failure
	from, to time.Time // when a hub was killed
}

type failure struct {
	from, to time.Time
	err      error
}

func (w *hubWorld) logins(beside int) *loop {
	ctx, cancel := context.WithCancel(context.Background())
	l := &loop{t: w.t, end: cancel}
	for range beside {
		l.over.Go(func() {
			for ctx.Err() == nil {
				key := "ci"
				if l.patient.Load() {
					key = "patient"
				}
				began := time.Now()
				err := w.login(key)
				l.mu.Lock()
				l.n++
				if err != nil {
					l.failed = append(l.failed, failure{began, time.Now(), err})
				}
				l.mu.Unlock()
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
	w.t.Cleanup(l.stop)
	return l
}

func (l *loop) stop() {
	l.end()
	l.over.Wait()
}

// spares the logins that were under way when a hub was killed.
func (l *loop) spares(from, to time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.from, l.to = from, to
}

// fine wants that no other has failed since the last time.
func (l *loop) fine(after string) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t.Logf("%s: %d logins, %d failed", after, l.n, len(l.failed))
	for _, f := range l.failed {
		if f.from.Before(l.to.Add(100*time.Millisecond)) && f.to.After(l.from) {
			l.t.Logf("under way: %v", f.err)
			continue
		}
		l.t.Errorf("%s: began at %s, ended at %s: %v", after, f.from.Format(time.StampMilli), f.to.Format(time.StampMilli), f.err)
	}
	l.n, l.failed = 0, nil
}
