package hub

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const logins = 200

// A balancer leads clients and hosts to three hubs. While logins go on, some at a time, a hub
// that holds the host is killed, and comes back: no login fails but one that is under way
// through that hub, and of those that go by "culvert dial" only one that the host has begun
// to answer. One that goes through a hub that lives does not fail.
func TestHubKilled(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "ci": `permitopen="db-*:*"`, "anonymous": `from="127.0.0.1",permitopen="db-*:*"`})
	y.tool("haproxy")
	var addresses []string
	for range 4 {
		l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
		defer l.Close() // of a port that is in use by then
		addresses = append(addresses, l.Addr().String())
		l.Close()
	}
	front, hubs := addresses[3], addresses[:3]
	start := func(i int) *exec.Cmd {
		return y.background(y.program("hub", append([]string{hubs[i]}, hubs...)...), "listening")
	}
	var running []*exec.Cmd
	for i := range hubs {
		running = append(running, start(i))
	}
	y.write("haproxy.cfg", fmt.Sprintf(`defaults
  mode tcp
  timeout connect 2s
  timeout client 1m
  timeout server 1m
  option redispatch 1
  retries 3
listen hubs
  bind %s
  balance roundrobin
  server a %s check inter 200
  server b %s check inter 200
  server c %s check inter 200
`, front, hubs[0], hubs[1], hubs[2]))
	y.background(exec.Command("haproxy", "-db", "-f", y.path("haproxy.cfg")), "")
	_, y.port, _ = net.SplitHostPort(front)
	y.agent("one", "db-01", Reach(front), "22="+y.sshd)
	y.await("the host is there", func() bool { return y.proxied("nc -X connect -x HUB %h %p", "db-01").Run() == nil })
	y.await("at two hubs", func() bool { return len(y.holders(hubs)) == 2 })

	held := y.holders(hubs)
	dial := strings.Join(append(y.program("dial").Args, front, "ci", "%h:%p"), " ")
	ways := map[string]*way{
		"nc by the balancer":           {command: "nc -X connect -x " + front + " %h %p"},
		"culvert dial by the balancer": {command: dial},
		"nc by the hub that lives":     {command: "nc -X connect -x " + held[1] + " %h %p", spared: true},
	}
	var begun atomic.Int64
	var killed time.Time
	var all sync.WaitGroup
	for name, w := range ways {
		for range 2 {
			all.Go(func() {
				for begun.Add(1) <= logins {
					w.login(y, name)
				}
			})
		}
	}
	for begun.Load() < logins/4 {
		time.Sleep(10 * time.Millisecond)
	}
	i := slices.Index(hubs, held[0])
	_ = syscall.Kill(running[i].Process.Pid, syscall.SIGKILL)
	_, _ = running[i].Process.Wait() // which a busy machine takes its time for
	killed = time.Now()
	time.Sleep(2 * time.Second)
	running[i] = start(i)
	all.Wait()
	for name, w := range ways {
		for began, what := range w.failed {
			underWay := began.Before(killed.Add(200*time.Millisecond)) && killed.Before(began.Add(5*time.Second))
			if w.spared || !underWay {
				t.Errorf("%v before the kill: %s", killed.Sub(began), what)
			} else {
				t.Logf("under way when the hub was killed: %s", what)
			}
		}
		t.Logf("%s: %d logins, %d failed", name, w.begun, len(w.failed))
	}
	y.await("the host is at two hubs again", func() bool { return len(y.holders(hubs)) == 2 })
}

// A way is how logins go.
type way struct {
	command string
	spared  bool // it does not lead through what is killed

	mu     sync.Mutex
	begun  int
	failed map[time.Time]string // by when it began
}

func (w *way) login(y *yard, name string) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	one := y.ssh("-o", "ProxyCommand="+w.command, "db-01", "echo", "in")
	cmd := exec.CommandContext(ctx, one.Path, one.Args[1:]...)
	cmd.Env = append(os.Environ(), "CULVERT_HUB_TEST="+y.dir)
	cmd.WaitDelay = time.Second // nc outlives a hub that it goes through, and waits for its own side
	out, err := cmd.CombinedOutput()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.begun++; err == nil && strings.HasSuffix(strings.TrimSpace(string(out)), "in") {
		return
	}
	if w.failed == nil {
		w.failed = map[time.Time]string{}
	}
	w.failed[began] = fmt.Sprintf("%s, login %d: %v: %s", name, w.begun, err, out)
}

// holders are the hubs that a host is attached to, which they say to another hub.
func (y *yard) holders(hubs []string) (all []string) {
	y.t.Helper()
	key := must(ParseKey([]byte(y.read("hub"))))(y.t)
	h := must(New(Config{HostKey: key, Rights: y.rights.Load}))(y.t)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, address := range hubs {
		c, _, err := h.dialPeer(ctx, address)
		if err != nil {
			continue
		}
		if conn, err := c.DialContext(ctx, "tcp", "db-01:22"); err == nil {
			conn.Close()
			all = append(all, address)
		}
		c.Close()
		_ = c.Wait()
	}
	return all
}
