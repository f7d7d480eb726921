package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	exchangedLine = "is exchanged"
	exposedLine   = "is exposed"
	laptopName    = "laptop" // whom the kit on the laptop says it is
)

// The protocols of "kit check", by how a router can tell requests apart.
var (
	byRequest    = []string{"http/1.1", "h2c", "h2c upgrade", "post", "post h2c", "download", "events", "websocket", "hints", "grpc unary", "grpc bidi", "grpc error"}
	byConnection = []string{"https", "https h2", "banner", "line", "udp"}
)

// appPorts leads every port of the Service app to a kit on the laptop.
func appPorts(offset int) (to []string) {
	for name, port := range map[string]int{"http": 8080, "grpc": 9090, "tls": 8443, "banner": 7001, "line": 7002, "udp": 7003} {
		to = append(to, "--to", fmt.Sprintf("%s=%d", name, port+offset))
	}
	return to
}

// laptopApp runs the sample's server on the laptop under a name.
func laptopApp(t testing.TB, name string, offset int) *running {
	t.Helper()
	s := startAs(t, on(laptopHost, kit(t), "serve", "-name", name, "-offset", fmt.Sprint(offset)))
	eventually(t, 10*time.Second, name+" listens", func() error {
		_, talk, err := try("curl", "-sS", "--max-time", "1", fmt.Sprintf("http://127.0.0.1:%d/", 8080+offset))
		if err != nil {
			return fmt.Errorf("%w: %s%s", err, talk, s.talk.String())
		}
		return nil
	})
	return s
}

// seenBy is what a kit on the laptop counted.
func seenBy(t testing.TB, offset int) map[string]int {
	t.Helper()
	seen := map[string]int{}
	out := laptop(t, "curl", "-sS", "--max-time", "5", fmt.Sprintf("http://127.0.0.1:%d/seen", 8080+offset))
	if err := json.Unmarshal([]byte(out), &seen); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return seen
}

// exchange starts "culvert exchange" and waits until the traffic comes.
func exchange(t testing.TB, args ...string) *running {
	t.Helper()
	s := start(t, append([]string{"exchange", "-n", namespace}, args...)...)
	s.says(exchangedLine)
	return s
}

// typeAt starts culvert on a terminal, at whose other end one types.
func typeAt(t testing.TB, args ...string) (s *running, keys *os.File) {
	t.Helper()
	return typeAs(t, on(laptopHost, append([]string{"setsid", "--ctty", culvertBin}, args...)...))
}

// typeAs starts a command there that takes its input for its terminal.
func typeAs(t testing.TB, cmd *exec.Cmd) (s *running, keys *os.File) {
	t.Helper()
	keys, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(keys.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(keys.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	t.Cleanup(func() { keys.Close() })
	s = startAs(t, cmd)
	go func() { _, _ = io.Copy(&s.talk, keys) }() // until nobody has the other end
	return s, keys
}

// says waits until culvert has said it.
func (s *running) says(line string) {
	s.t.Helper()
	eventually(s.t, patience, "culvert says that it "+line, func() error {
		if strings.Contains(s.talk.String(), line) {
			return nil
		}
		if !s.alive() {
			s.t.Fatalf("culvert ended: %v\n%s", s.err, s.talk.String())
		}
		return errors.New(s.talk.String())
	})
}

// exchangeStatus is what "culvert status -o json" says of an exchange.
type exchangeStatus struct {
	Kind, Session, Owner, Since string
	PID                         int
	Shadow                      struct{ Kind, Pod string }
	Wire                        struct {
		Up        bool
		Kind, Way string
		Reopened  int
	}
	Exchange struct {
		Service, Target, Match string
		Method                 string
		Mirror                 bool
		Workload               struct {
			Name     string
			Replicas int
		}
		Requests, Connections, Open uint64
	}
	Missing []string
}

// exchangesHere are those of this machine, whose Service is so named.
func exchangesHere(t testing.TB, service string) (found []exchangeStatus) {
	t.Helper()
	var all []exchangeStatus
	out := laptop(t, culvertBin, "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("culvert status -o json: %v in %s", err, out)
	}
	for _, s := range all {
		if s.Exchange.Service == service {
			found = append(found, s)
		}
	}
	return found
}

// heldElsewhere is what another machine sees that is held of our namespace; no test
// cuts that one off.
func heldElsewhere(t testing.TB) (found []exchangeStatus) {
	t.Helper()
	eventually(t, patience, "another machine sees who holds what", func() error {
		out, err := on("router", culvertBin, "status", "--cluster", "-n", namespace, "-o", "json").Output()
		if err != nil {
			return err
		}
		return json.Unmarshal(out, &found)
	})
	return slices.DeleteFunc(found, func(s exchangeStatus) bool { return s.PID > 0 }) // theirs
}

func theExchange(t testing.TB, service string) exchangeStatus {
	t.Helper()
	all := exchangesHere(t, service)
	if len(all) != 1 {
		t.Fatalf("%d exchanges of %s, want 1", len(all), service)
	}
	return all[0]
}

// nodeKubectl asks the API server from within the cluster, whatever happens to
// the laptop.
func nodeKubectl(args ...string) (string, error) {
	out, err := on("node1", append([]string{filepath.Join(root, "e2e/.run/bin/kubectl")}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// clientPod is the node of the client pod, and the process there that keeps it.
var clientPod = sync.OnceValues(func() (found [2]string, err error) {
	text, err := nodeKubectl("get", "pod", "-n", namespace, "client", "-o", "jsonpath={.spec.nodeName} {.status.containerStatuses[0].containerID}")
	if err != nil {
		return found, err
	}
	node, container, _ := strings.Cut(text, " containerd://")
	pid, err := taskOf(node, container)
	return [2]string{node, pid}, err
})

// taskOf is the process of a container.
func taskOf(node, container string) (pid string, err error) {
	out, err := on(node, "ctr", "-n", "k8s.io", "tasks", "ls").Output()
	if err != nil {
		return "", fmt.Errorf("ctr tasks ls: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == container {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("no task of container %s:\n%s", container, out)
}

// fromPod is kit within the client pod, for which no API server is needed.
func fromPod(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	return kitFrom(t, []string{"--net", "--mount"}, args...)
}

// fromNode is a command that runs kit on the client pod's node, with an address of
// the node.
func fromNode(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	return kitFrom(t, []string{"--mount"}, args...)
}

func kitFrom(t testing.TB, namespaces []string, args ...string) *exec.Cmd {
	t.Helper()
	found, err := clientPod()
	if err != nil {
		t.Fatalf("find the client pod: %v", err)
	}
	return on(found[0], slices.Concat([]string{"nsenter", "--target", found[1]}, namespaces, []string{"--", "/bin/kit"}, args)...)
}

// kitInPod runs kit in the client pod and reads its JSON.
func kitInPod[T any](t testing.TB, args ...string) (result T) {
	t.Helper()
	var talk lockedBuffer
	c := fromPod(t, args...)
	c.Stderr = &talk
	out, err := c.Output()
	if err == nil {
		err = json.Unmarshal(out, &result)
	}
	if err != nil {
		t.Fatalf("kit %v in the client pod: %v\n%s%s", args, err, out, talk.String())
	}
	if said := talk.String(); said != "" {
		t.Logf("kit %v: %s", args, said[:min(len(said), 1000)]) // when, and how long it took
	}
	return result
}

// verdict is what one protocol of "kit check" says.
type verdict struct{ By, Err string }

// who answers at a host, over each protocol, as the client pod sees it.
func who(t testing.TB, args ...string) map[string]verdict {
	t.Helper()
	return kitInPod[map[string]verdict](t, append([]string{"-t", "15s", "check"}, args...)...)
}

// want looks whether each of the protocols was answered by whom.
func want(t testing.TB, found map[string]verdict, by string, protocols ...[]string) {
	t.Helper()
	for _, p := range slices.Concat(protocols...) {
		if v, ok := found[p]; !ok || v.Err != "" || v.By != by {
			t.Errorf("%s: answered by %q, want %q; %s", p, v.By, by, v.Err)
		}
	}
}

// comes waits until the nodes have heard to whom a Service leads now: what asks
// it, with these flags, is answered by whom.
func comes(t testing.TB, by string, flagsAndHost ...string) {
	t.Helper()
	eventually(t, 5*time.Second, "traffic comes to "+by, func() error {
		for range 3 { // there may be more nodes or pods than one
			if v := who(t, append(flagsAndHost, "http/1.1")...)["http/1.1"]; v.By != by {
				return fmt.Errorf("%+v", v)
			}
		}
		return nil
	})
}

// loadOutcome is what "kit load" prints.
type loadOutcome struct {
	Requests, Failures int
	By, Errors         map[string]int
	Bytes              int64
	Seconds            float64
	P50ms, P99ms       float64
}

// under runs "kit load" in the client pod for as long as do takes, and a little
// before and after it.
func under(t testing.TB, loads [][]string, url string, do func()) (all []loadOutcome) {
	t.Helper()
	all = make([]loadOutcome, len(loads))
	var running sync.WaitGroup
	end := make(chan struct{})
	for i, args := range loads {
		running.Go(func() {
			for first := true; ; first = false {
				select {
				case <-end:
					if !first {
						return
					}
				default:
				}
				all[i].add(kitInPod[loadOutcome](t, slices.Concat([]string{"load", "-d", "1s"}, args, []string{url})...))
			}
		})
	}
	time.Sleep(500 * time.Millisecond) // of load on how it was
	do()
	time.Sleep(500 * time.Millisecond) // and on how it is
	close(end)
	running.Wait()
	return all
}

func (o *loadOutcome) add(more loadOutcome) {
	if o.By == nil {
		o.By, o.Errors = map[string]int{}, map[string]int{}
	}
	o.Requests += more.Requests
	o.Failures += more.Failures
	o.Seconds += more.Seconds
	for by, n := range more.By {
		o.By[by] += n
	}
	for text, n := range more.Errors {
		o.Errors[text] += n
	}
}

// A poller asks a Service from the client pod every 100 ms.
type poller struct {
	mu      sync.Mutex
	samples []sample
}

// sample is one request of a poll.
type sample struct {
	Start, Took int64 // ms
	By, Err     string
}

func (s sample) end() time.Time { return time.UnixMilli(s.Start + s.Took) }

func startPoll(t testing.TB, url string) *poller {
	t.Helper()
	c := fromPod(t, "poll", url)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p := &poller{}
	read := make(chan struct{})
	go func() { defer close(read); p.read(bufio.NewScanner(out)) }()
	t.Cleanup(func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		<-read
		_ = c.Wait()
	})
	return p
}

func (p *poller) read(lines *bufio.Scanner) {
	for lines.Scan() {
		var s sample
		if json.Unmarshal(lines.Bytes(), &s) == nil {
			p.mu.Lock()
			p.samples = append(p.samples, s)
			p.mu.Unlock()
		}
	}
}

// after are the requests that began, or had no answer yet, at a time.
func (p *poller) after(at time.Time) []sample {
	p.mu.Lock()
	defer p.mu.Unlock()
	var later []sample
	for _, s := range p.samples {
		if s.end().After(at) {
			later = append(later, s)
		}
	}
	return later
}

// steadily waits until somebody has answered everything for a second.
func (p *poller) steadily(by string, after time.Time, within time.Duration) error {
	for end := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		from := time.Now().Add(-time.Second)
		if from.Before(after) {
			from = after
		}
		last := p.after(from)
		other := slices.ContainsFunc(last, func(s sample) bool { return s.By != by })
		if len(last) >= 8 && !other {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not answer everything within %v: %v", by, within, summary(last))
		}
	}
}

// summary counts who answered, and the errors.
func summary(samples []sample) map[string]int {
	n := map[string]int{}
	for _, s := range samples {
		if s.Err != "" {
			n["error: "+s.Err]++
		} else {
			n[s.By]++
		}
	}
	return n
}

// outage is how a poll went after a moment: how long until every new request
// was answered soon, how many failed, and who answered.
type outage struct {
	open    time.Duration // from the moment to the end of the last request that failed, or took over a second
	lost    int
	slowest time.Duration
	by      map[string]int
}

func outageOf(samples []sample, at time.Time) outage {
	o := outage{by: summary(samples)}
	for _, s := range samples {
		took := time.Duration(s.Took) * time.Millisecond
		o.slowest = max(o.slowest, took)
		if s.Err != "" {
			o.lost++
		}
		if s.Err != "" || took > time.Second {
			o.open = max(o.open, s.end().Sub(at))
		}
	}
	return o
}

// dumpObjects is every object of the watched namespaces, less what may change
// when traffic goes elsewhere for a while and comes back: counters of the API
// server's, when a condition was last seen, and in which order a slice names its
// endpoints.
func dumpObjects() (string, error) {
	out, err := nodeKubectl("get", kinds, "-A", "-o", "json")
	if err != nil {
		return "", err
	}
	var list struct{ Items []map[string]any }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return "", err
	}
	var lines []string
	for _, o := range list.Items {
		meta := o["metadata"].(map[string]any)
		labels, _ := meta["labels"].(map[string]any)
		if session, _ := labels[sessionLabel].(string); isDead(session) {
			continue
		}
		if ns, _ := meta["namespace"].(string); !slices.Contains(watched, ns) || o["kind"] == "Lease" && ns == "kube-system" {
			continue
		}
		line, err := lineOf(o, meta)
		if err != nil {
			return "", err
		}
		lines = append(lines, line)
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n"), nil
}

func lineOf(object, meta map[string]any) (string, error) {
	forget(object, "resourceVersion", "generation", "observedGeneration", "managedFields", "lastTransitionTime", "lastUpdateTime", "lastProbeTime")
	if status, ok := object["status"].(map[string]any); ok {
		sortAny(status["conditions"])
	}
	name := meta["name"]
	if object["kind"] == "EndpointSlice" {
		// It may have been replaced by another one; its one annotation is a time.
		name = meta["generateName"]
		for _, key := range []string{"name", "uid", "creationTimestamp", "annotations"} {
			delete(meta, key)
		}
		sortAny(object["endpoints"])
		sortAny(object["ports"])
	}
	b, err := json.Marshal(object)
	return fmt.Sprintf("%v/%v/%v %s", object["kind"], meta["namespace"], name, b), err
}

// forget removes keys from a JSON value, however deep.
func forget(value any, keys ...string) {
	switch v := value.(type) {
	case []any:
		for _, e := range v {
			forget(e, keys...)
		}
	case map[string]any:
		for _, k := range keys {
			delete(v, k)
		}
		for _, e := range v {
			forget(e, keys...)
		}
	}
}

func sortAny(list any) {
	if all, ok := list.([]any); ok {
		slices.SortFunc(all, func(a, b any) int {
			return strings.Compare(string(must(json.Marshal(a))), string(must(json.Marshal(b))))
		})
	}
}

// asBefore remembers the laptop and the cluster, and returns a check that they
// are, within a while, as they were. Unlike noTrace it forgives what going and
// coming back does to EndpointSlices.
func asBefore(t testing.TB) (check func(within time.Duration)) {
	t.Helper()
	together(t)
	objects, err := dumpObjects()
	if err != nil {
		t.Fatal(err)
	}
	machine := dumpLaptop(t)
	return func(within time.Duration) {
		t.Helper()
		eventually(t, within, "laptop and cluster as before", func() error {
			now, err := dumpObjects()
			if err != nil {
				return err
			}
			if d := difference(objects, now); d != "" {
				return fmt.Errorf("the cluster changed:\n%s", d)
			}
			return nothing(difference(machine, dumpLaptop(t)))
		})
	}
}

// refused runs a culvert that must fail with one error line that names things.
func refused(t testing.TB, cmd *exec.Cmd, code int, says ...string) {
	t.Helper()
	s := startAs(t, cmd)
	got := s.wait(patience)
	text := s.talk.String()
	lines := talkOf(text, "culvert: error: ")
	if got != code || len(lines) != 1 {
		t.Errorf("%d error lines and exit code %d, want 1 and %d\n%s", len(lines), got, code, text)
		return
	}
	for _, part := range says {
		if !strings.Contains(lines[0], part) {
			t.Errorf("the error does not name %q\n%s", part, text)
		}
	}
}

// leave ends an exchange by "culvert leave", whose culvert then ends well.
func leave(t testing.TB, s *running, args ...string) {
	t.Helper()
	laptop(t, append([]string{culvertBin, "leave"}, args...)...)
	if code := s.wait(patience); code != 0 {
		t.Errorf("culvert ended with %d after leave, want 0\n%s", code, s.talk.String())
	}
}
