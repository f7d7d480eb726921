package hub

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
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

// three are hubs that a balancer leads clients and hosts to, and that can be killed.
type three struct {
	*yard
	front string
	hubs  []string
	cmds  []*exec.Cmd
}

// newThree are there with a host at two of them.
func newThree(t *testing.T) *three {
	t.Helper()
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
	h := &three{yard: y, front: front, hubs: hubs}
	for i := range hubs {
		h.cmds = append(h.cmds, nil)
		h.start(i)
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
	h.settled()
	return h
}

func (h *three) start(i int) {
	h.t.Helper()
	h.cmds[i] = h.background(h.program("hub", append([]string{h.hubs[i]}, h.hubs...)...), "listening")
}

func (h *three) kill(i int) {
	_ = syscall.Kill(h.cmds[i].Process.Pid, syscall.SIGKILL)
	_, _ = h.cmds[i].Process.Wait() // which a busy machine takes its time for
}

// settled waits until the host is at two hubs.
func (h *three) settled() {
	h.t.Helper()
	h.await("the host is at two hubs", func() bool { return len(h.holders(h.hubs)) == 2 })
}

// dial is "culvert dial" as a ProxyCommand.
func (h *three) dial() string {
	return strings.Join(append(h.program("dial").Args, h.front, "ci", "%h:%p"), " ")
}

// While logins go on, some at a time, a hub that holds the host is killed, and comes back: no
// login fails but one of a stock client's that is under way through that hub. One that goes by
// "culvert dial" does not fail, nor does one that goes through a hub that lives.
func TestHubKilled(t *testing.T) {
	y := newThree(t)
	held := y.holders(y.hubs)
	ways := map[string]*way{
		"nc by the balancer":           {command: "nc -X connect -x " + y.front + " %h %p"},
		"culvert dial by the balancer": {command: y.dial(), spared: true},
		"nc by the hub that lives":     {command: "nc -X connect -x " + held[1] + " %h %p", spared: true},
	}
	var begun atomic.Int64
	var killed time.Time
	var all sync.WaitGroup
	for name, w := range ways {
		for range 2 {
			all.Go(func() {
				for begun.Add(1) <= logins {
					w.login(y.yard, name)
				}
			})
		}
	}
	for begun.Load() < logins/4 {
		time.Sleep(10 * time.Millisecond)
	}
	i := slices.Index(y.hubs, held[0])
	y.kill(i)
	killed = time.Now()
	time.Sleep(2 * time.Second)
	y.start(i)
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
	y.settled()
}

const (
	rounds    = 2       // in which each hub is killed
	perKill   = 4 << 20 // bytes that are sent, and come back, while one hub is killed
	perWrite  = 64 << 10
	longLimit = 2 * time.Minute
)

// What is copied there and back by one connection of ssh is the same, byte for byte, while the
// hubs are killed one after the other, and come back.
func TestGoesOnWhileHubsAreKilled(t *testing.T) {
	y := newThree(t)
	ctx, cancel := context.WithTimeout(t.Context(), longLimit)
	defer cancel()
	ssh := y.ssh("-o", "ProxyCommand="+y.dial(), "-o", "ServerAliveInterval=0", "db-01", "cat")
	cmd := exec.CommandContext(ctx, ssh.Path, ssh.Args[1:]...)
	cmd.Env = append(os.Environ(), "CULVERT_HUB_TEST="+y.dir)
	var said lines
	cmd.Stderr = &said
	in, out := must(cmd.StdinPipe())(t), must(cmd.StdoutPipe())(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	total := rounds * len(y.hubs) * perKill
	turn, back := make(chan int), make(chan bool) // a hub is to be killed; it is there again
	var sent, came [sha256.Size]byte
	var n int64
	var copying sync.WaitGroup
	copying.Go(func() {
		defer in.Close()
		h, r := sha256.New(), rand.New(rand.NewPCG(6, 6))
		b := make([]byte, perWrite)
		for at := 0; at < total; at += len(b) {
			if at > 0 && at%perKill == 0 {
				<-back
			}
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			h.Write(b)
			if _, err := in.Write(b); err != nil {
				t.Errorf("after %d bytes: %v", at, err)
				return
			}
			if at%perKill == perKill/2 {
				turn <- at / perKill % len(y.hubs)
			}
		}
		<-back
		h.Sum(sent[:0])
	})
	copying.Go(func() {
		h := sha256.New()
		n, _ = io.Copy(h, out) // how it ended ssh tells
		h.Sum(came[:0])
	})
	over := make(chan struct{})
	go func() { defer close(over); copying.Wait() }()
	kills := 0
	for going := true; going; {
		select {
		case i := <-turn:
			y.kill(i)
			kills++
			time.Sleep(time.Second) // the others have what it held
			y.start(i)
			y.settled()
			back <- true
		case <-over:
			going = false
		}
	}
	if err := cmd.Wait(); err != nil || n != int64(total) || sent != came {
		t.Errorf("%d of %d bytes came back, the same: %t; %v: %s", n, total, sent == came, err, said.String())
	}
	t.Logf("%d bytes there and back, %d kills", n, kills)
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
	// Where nohup(1) began us, ssh does not end a dial by its hangup: it ends by itself, and at once.
	cmd.Env = append(os.Environ(), "CULVERT_HUB_TEST="+y.dir, "GORACE=atexit_sleep_ms=0")
	cmd.WaitDelay = time.Second // nc outlives a hub that it goes through, and waits for its own side
	var said strings.Builder    // by ssh, and by whatever a shell of this machine begins with
	cmd.Stderr = &said
	out, err := cmd.Output()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.begun++; err == nil && strings.HasSuffix(strings.TrimSpace(string(out)), "in") {
		return
	}
	if w.failed == nil {
		w.failed = map[time.Time]string{}
	}
	w.failed[began] = fmt.Sprintf("%s, login %d: %v: %s%s", name, w.begun, err, out, said.String())
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
