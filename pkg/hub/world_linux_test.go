package hub

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// world is a net that everybody reaches, with a hub and a client, and two sites behind NAT
// that nobody reaches: a router lets out what is begun inside. The hosts of both sites have
// one address.
const world = `
ip link set lo up
ip link add inet type bridge
ip link set inet up
attach() {
	ip netns add cv-$1
	ip link add $1 type veth peer name eth0 netns cv-$1
	ip link set $1 master inet up
	ip -n cv-$1 addr add 203.0.113.$2/24 dev eth0
	ip -n cv-$1 link set eth0 up
	ip -n cv-$1 link set lo up
}
site() {
	attach $1 $2
	ip netns add cv-$3
	ip link add lan netns cv-$1 type veth peer name eth0 netns cv-$3
	ip -n cv-$1 addr add 192.168.1.1/24 dev lan
	ip -n cv-$1 link set lan up
	ip -n cv-$3 link set lo up
	ip -n cv-$3 addr add 192.168.1.2/24 dev eth0
	ip -n cv-$3 link set eth0 up
	ip -n cv-$3 route add default via 192.168.1.1
	nsenter --net=/run/netns/cv-$1 sh -ec 'echo 1 >/proc/sys/net/ipv4/ip_forward; nft -f -' <<END
table ip nat {
	chain leaves { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }
	chain comes { type filter hook input priority filter; policy accept; iifname eth0 ct state new drop; }
	chain through { type filter hook forward priority filter; policy drop; ct state established,related accept; iifname lan accept; }
}
END
}
attach hub 10
attach client 20
site nat1 31 db-01
site nat2 32 db-02
`

func (y *yard) sh(script string) {
	y.t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	if out, err := cmd.CombinedOutput(); err != nil {
		y.t.Fatalf("%v: %s", err, out)
	}
}

// enter is what is put before a command that is run somewhere in the world.
func enter(where string) []string {
	return []string{"nsenter", "--net=/run/netns/cv-" + where}
}

// in moves a command there.
func in(where string, cmd *exec.Cmd) *exec.Cmd {
	cmd.Args = append(enter(where), append([]string{cmd.Path}, cmd.Args[1:]...)...)
	cmd.Path, cmd.Err = exec.LookPath(cmd.Args[0])
	return cmd
}

// inWorld runs do in a world, if there are programs to make one with.
func inWorld(t *testing.T, tools []string, options map[string]string, do func(t *testing.T, y *yard)) {
	t.Helper()
	for _, name := range []string{"ip", "nft", "nsenter"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip("not here:", err)
		}
	}
	for _, name := range tools { // there is no way to a mirror from inside
		if _, err := exec.LookPath(name); err != nil {
			fetch(t, name)
		}
	}
	resolvertest.InMachine(t, func(t *testing.T) {
		y := bareYard(t, options)
		for _, name := range tools {
			y.tool(name)
		}
		y.sh(world)
		do(t, y)
	})
}

const hubAt = "203.0.113.10:8443"

func (y *yard) hubInWorld() *exec.Cmd {
	return y.background(in("hub", y.program("hub", hubAt)), "listening")
}

func namespace(y *yard, where string) string {
	y.t.Helper()
	out, err := exec.Command(enter(where)[0], append(enter(where)[1:], "readlink", "/proc/self/ns/net")...).Output()
	if err != nil {
		y.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// Two hosts that can only dial out, one by an agent and one by autossh, are reached by name
// at port 22; the hub has one port, and nothing leads to them past it. Their sites may change
// address, and the hub be killed.
func TestNoWayIn(t *testing.T) {
	inWorld(t, []string{"autossh"}, map[string]string{
		"one": `permitlisten="db-01:22"`, "two": `permitlisten="db-02:22",permitlisten="prod:22022"`,
		"ci": `restrict,port-forwarding,permitopen="db-*:22",permitopen="prod:22022"`, "anonymous": `from="203.0.113.20",permitopen="db-02:22"`,
	}, testNoWayIn)
}

func testNoWayIn(t *testing.T, y *yard) {
	y.configure("203.0.113.10", "8443")
	y.write("config", "Host db-* prod\nProxyCommand ssh -F "+y.path("config")+" -i "+y.path("ci")+" -o ConnectTimeout=2 -W %h:%p hub\n"+y.read("config"))
	scan := func() { y.says(in("client", y.program("scan", "203.0.113.10")), "8443") }
	hub := y.hubInWorld()
	scan()
	for _, host := range []string{"db-01", "db-02"} {
		y.serveSSHAt("0.0.0.0:22", enter(host))
	}
	y.background(in("db-01", y.program("agent", hubAt, "one", "db-01", "22")), "offered as db-01")
	for user, port := range map[string]string{"db-02": "22", "prod": "22022"} {
		cmd := exec.Command("autossh", "-M", "0", "-N", "-F", y.path("config"), "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=3",
			"-o", "ConnectTimeout=2", "-i", y.path("two"), "-R", port+":localhost:22", user+"@hub")
		cmd.Env = append(os.Environ(), "AUTOSSH_GATETIME=0", "AUTOSSH_POLL=1")
		y.background(in("db-02", cmd), "")
	}
	where := map[string]string{"db-01": namespace(y, "db-01"), "db-02": namespace(y, "db-02"), "prod": namespace(y, "db-02")}
	login := func(host string) *exec.Cmd {
		args := []string{host, "readlink", "/proc/self/ns/net"}
		if host == "prod" {
			args = append([]string{"-p", "22022"}, args...)
		}
		return in("client", y.ssh(args...))
	}
	reached := func(what string) {
		t.Helper()
		began := time.Now()
		for _, host := range []string{"db-01", "db-02", "prod"} {
			y.await(host+" is reached "+what, func() bool { return prints(5*time.Second, login(host)) == where[host] })
			t.Logf("%s reached %v after %s", host, time.Since(began).Round(time.Millisecond), what)
		}
	}
	reached("the start")
	y.says(in("client", y.ssh("-o", "ProxyCommand=nc -X connect -x "+hubAt+" db-02 22", "-o", "HostKeyAlias=db-02", "-i", y.path("login"), "root@127.0.0.1", "readlink", "/proc/self/ns/net")), where["db-02"])
	scan()

	y.fails(in("client", exec.Command("ip", "route", "get", "192.168.1.2")), "unreachable")
	y.sh("ip -n cv-client route add 192.168.1.2 via 203.0.113.31")
	try := "for a in 192.168.1.2 203.0.113.31 203.0.113.32; do for p in 22 22022; do nc -nz -w 2 $a $p && echo $a:$p & done; done; wait"
	y.says(in("client", exec.Command("sh", "-c", try)), "")
	y.says(in("nat1", exec.Command("sh", "-c", try)), "192.168.1.2:22") // which is there

	y.sh(`for n in 1 2; do
		ip -n cv-nat$n addr del 203.0.113.3$n/24 dev eth0
		ip -n cv-nat$n addr add 203.0.113.4$n/24 dev eth0
	done`)
	reached("their addresses changed")
	_ = hub.Process.Kill()
	_, _ = hub.Process.Wait()
	y.hubInWorld()
	reached("the hub was killed")
	scan()
}

// prints is what a command that has so long prints.
func prints(limit time.Duration, cmd *exec.Cmd) string {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	bounded := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	bounded.Env, bounded.WaitDelay = cmd.Env, time.Second
	out, _ := bounded.Output()
	return strings.TrimSpace(string(out))
}

// A host whose site has no way out but a proxy is attached by it, and says in clear words
// what the proxy is against.
func TestOnlyProxyOut(t *testing.T) {
	inWorld(t, []string{"tinyproxy", "haproxy"}, map[string]string{
		"one": `permitlisten="*:*"`, "anonymous": `from="203.0.113.20",permitopen="*:*"`,
	}, testOnlyProxyOut)
}

func testOnlyProxyOut(t *testing.T, y *yard) {
	y.configure("203.0.113.10", "8443")
	y.sh("nsenter --net=/run/netns/cv-nat1 sh -c 'echo 0 >/proc/sys/net/ipv4/ip_forward'")
	y.sh("cd " + y.dir + "; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=proxy -addext subjectAltName=IP:192.168.1.1 -keyout proxy.key -out proxy.crt 2>/dev/null; cat proxy.key proxy.crt >proxy.pem")
	y.write("tinyproxy.conf", "Port 3128\nListen 192.168.1.1\nTimeout 600\nBasicAuth me s3cret\nConnectPort 8443\n")
	y.write("haproxy.cfg", `defaults
  mode tcp
  timeout connect 2s
  timeout client 1m
  timeout server 1m
listen tls
  bind 192.168.1.1:3129 ssl crt `+y.path("proxy.pem")+`
  server a 192.168.1.1:3128
`)
	y.background(in("nat1", exec.Command("tinyproxy", "-d", "-c", y.path("tinyproxy.conf"))), "")
	y.background(in("nat1", exec.Command("haproxy", "-db", "-f", y.path("haproxy.cfg"))), "")
	y.hubInWorld()
	y.serveSSHAt("0.0.0.0:22", enter("db-01"))
	y.serveSSHAt("0.0.0.0:22", enter("db-02"))
	y.fails(in("db-01", exec.Command("nc", "-nz", "-w", "1", "203.0.113.10", "8443")))
	for _, port := range []string{"3128", "3129"} {
		y.await("proxy", func() bool { return in("db-01", exec.Command("nc", "-nz", "192.168.1.1", port)).Run() == nil })
	}
	const offered = "offered as"
	const plain, secure = "192.168.1.1:3128", "192.168.1.1:3129"
	for _, test := range []struct {
		where, hub, want string
		env              []string
	}{
		{"db-01", hubAt, "it answered 407 Proxy Authentication Required", []string{"HTTPS_PROXY=http://" + plain}},
		{"db-01", hubAt, "it answered 401", []string{"HTTPS_PROXY=http://me:wrong@" + plain}},
		{"db-01", "203.0.113.10:22", "it answered 403", []string{"HTTPS_PROXY=http://me:s3cret@" + plain}},
		{"db-01", "203.0.113.10:8443", offered, []string{"HTTPS_PROXY=http://me:s3cret@" + plain}},
		{"db-01", hubAt, offered, []string{"https_proxy=https://me:s3cret@" + secure, "SSL_CERT_FILE=" + y.path("proxy.crt")}},
		{"db-01", hubAt, "signed by unknown authority", []string{"HTTPS_PROXY=https://me:s3cret@" + secure}},
		{"db-01", "203.0.113.20:8443", "it answered 5", []string{"HTTPS_PROXY=http://me:s3cret@" + plain}},
		{"db-01", hubAt, "connection refused", []string{"HTTPS_PROXY=http://192.168.1.1:3127"}},
		{"db-02", hubAt, offered, []string{"HTTPS_PROXY=http://192.0.2.1:3128", "NO_PROXY=10.0.0.0/8,203.0.113.0/24"}},
	} {
		cmd := in(test.where, y.program("agent", test.hub, "one", test.where, "22"))
		cmd.Env = append(cmd.Env, test.env...)
		agent := y.background(cmd, test.want)
		if test.want == offered {
			y.says(in("client", y.ssh("-o", "ProxyCommand=nc -X connect -x "+hubAt+" %h %p", test.where, "readlink", "/proc/self/ns/net")), namespace(y, test.where))
		}
		_ = syscall.Kill(-agent.Process.Pid, syscall.SIGKILL)
	}
}
