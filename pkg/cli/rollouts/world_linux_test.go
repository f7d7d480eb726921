package rollouts_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// world has a hub that everybody reaches, hosts behind a router that only lets out what is begun
// inside, and a runner of CI that has a route to the hub and no other.
const world = `
ip link set lo up
ip link add inet type bridge
ip link set inet up
place() {
	ip netns add cv-$1
	ip -n cv-$1 link set lo up
}
attach() {
	place $1
	ip link add $1 type veth peer name eth0 netns cv-$1
	ip link set $1 master $2 up
	ip -n cv-$1 addr add $3 dev eth0
	ip -n cv-$1 link set eth0 up
}
attach hub inet 203.0.113.10/24
attach runner inet 203.0.113.20/32
ip -n cv-runner route add 203.0.113.10 dev eth0
attach nat inet 203.0.113.31/24
ip link add site type bridge
ip addr add 192.168.1.2/24 dev site
ip link set site up
ip link add lan netns cv-nat type veth peer name natlan
ip link set natlan master site up
ip -n cv-nat addr add 192.168.1.1/24 dev lan
ip -n cv-nat link set lan up
for n in 1 2 3 4; do
	attach web-0$n site 192.168.1.1$n/24
	ip -n cv-web-0$n route add default via 192.168.1.1
done
nsenter --net=/run/netns/cv-nat sh -ec 'echo 1 >/proc/sys/net/ipv4/ip_forward; nft -f -' <<END
table ip nat {
	chain leaves { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }
	chain comes { type filter hook input priority filter; policy accept; iifname eth0 ct state new drop; }
	chain through { type filter hook forward priority filter; policy drop; ct state established,related accept; iifname lan accept; }
}
END
echo 203.0.113.10 hub.example >>/etc/hosts
echo deploy:*:60001:60001::/:/bin/sh >>/etc/passwd
echo runner:*:60002:60002::$1:/bin/sh >>/etc/passwd
mkdir -p /run/sshd
`

const runner = 60002 // its uid

// inWorld runs the test in a world of its own, with a yard that has nothing running yet, and
// nginx.
func inWorld(t *testing.T, do func(t *testing.T, y *yard, nginx string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("namespaces need root")
	}
	for _, name := range []string{"ip", "nft", "nsenter", "setpriv", "git"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip("not here:", err)
		}
	}
	nginx := debians(t, "nginx", "usr/sbin/nginx")
	resolvertest.InMachine(t, func(t *testing.T) {
		y := newYard(t)
		y.open()
		y.shell(world, y.path("runner"))
		do(t, y, nginx)
	})
}

// debians is a program of a Debian package, which is unpacked where it is not installed.
func debians(t *testing.T, pkg, path string) string {
	t.Helper()
	if found, err := exec.LookPath("/" + path); err == nil {
		return found
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("not here:", pkg)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := resolvertest.Unpack(t.Context(), filepath.Join(cache, "culvert-e2e"), pkg)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, path)
}

// open lets other users into the yard, whose secrets have modes of their own.
func (y *yard) open() {
	y.t.Helper()
	for _, dir := range []string{filepath.Dir(y.dir), y.dir, filepath.Dir(y.culvert)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			y.t.Fatal(err)
		}
	}
}

// shell runs a script as root, with $1 and so on, and returns what it printed.
func (y *yard) shell(script string, args ...string) string {
	y.t.Helper()
	cmd := exec.CommandContext(y.t.Context(), "sh", append([]string{"-ec", script, "sh"}, args...)...)
	cmd.Dir, cmd.WaitDelay = y.dir, time.Second
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		y.t.Fatalf("%s: %v: %s%s", script, err, out, said.String())
	}
	return strings.TrimSpace(string(out))
}

// in is a command that is run somewhere in the world; "" is in its middle.
func in(where, name string, args ...string) *exec.Cmd {
	if where == "" {
		return exec.Command(name, args...)
	}
	return exec.Command("nsenter", append([]string{"--net=/run/netns/cv-" + where, name}, args...)...)
}

// inside does something on a thread that is there. A socket stays where it was made.
func inside(t *testing.T, where string, do func() error) error {
	t.Helper()
	to, err := os.Open("/run/netns/cv-" + where)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with it
		if err := unix.Setns(int(to.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter %s: %w", where, err)
			return
		}
		done <- do()
	}()
	return <-done
}

// dials tries an address from there.
func dials(t *testing.T, where, address string) error {
	t.Helper()
	return inside(t, where, func() error {
		c, err := net.DialTimeout("tcp", address, soon)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// lend has an address of this place be there, too, until the test ends.
func lend(t *testing.T, where, address string) {
	t.Helper()
	var l net.Listener
	if err := inside(t, where, func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = relay.Forward(ctx, l, &channel.Host{}, "tcp", address)
	}()
	t.Cleanup(func() {
		end()
		<-over
	})
}
