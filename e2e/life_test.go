package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What a laptop goes through that is left connected for a week: CASES 5.6, items 9 and
// 10, and 3 B 8, C 19, D 22 and 23.

// back is within what time a session works again from when it can.
const back = 15 * time.Second

// asker asks for a name outside the cluster, again and again.
type asker struct{ *running }

func asksOutside(t testing.TB) asker {
	t.Helper()
	return asker{startAs(t, on(laptopHost, "sh", "-c", `while :; do
		s=$(date +%s%3N); getent ahostsv4 intranet.corp.example >/dev/null; c=$?
		echo "$c $(($(date +%s%3N) - s)) $s"; sleep 0.2
	done`))}
}

// answered wants that each question was, and soon, since the last time.
func (a asker) answered(during string) {
	a.t.Helper()
	a.interrupt()
	a.wait(5 * time.Second)
	n, slowest := 0, 0
	for line := range strings.Lines(a.talk.String()) {
		var code, took, at int
		if _, err := fmt.Sscan(line, &code, &took, &at); err != nil {
			continue
		}
		if n, slowest = n+1, max(slowest, took); code != 0 || took > 2000 {
			a.t.Errorf("%s: at %v a name outside had %d after %d ms", during, time.UnixMilli(int64(at)).Format(time.TimeOnly), code, took)
		}
	}
	a.t.Logf("%s: %d questions for a name outside, the slowest took %d ms", during, n, slowest)
	if n < 3 {
		a.t.Errorf("%s: only %d questions", during, n)
	}
}

const webPage = `"pod":"web-`

// isBack waits until a page is reached again, and the status says so.
func isBack(t testing.TB, since time.Time, what, url, page string) {
	t.Helper()
	eventually(t, time.Until(since.Add(back)), what+": the cluster again", func() error {
		out, talk, err := try("curl", "-sS", "--max-time", "3", url)
		if err == nil && !strings.Contains(out, page) {
			err = errors.New(out)
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, talk)
		}
		return nil
	})
	t.Logf("%s: the cluster again after %v", what, tenths(time.Since(since)))
	for _, st := range statuses(t) {
		if st.Device.Name != "" && !st.Wire.Up {
			t.Errorf("%s: %+v", what, st.Wire)
		}
	}
}

// atOnce wants that a name of the cluster is found at once.
func atOnce(t testing.TB, name string) {
	t.Helper()
	began := time.Now()
	if err := lookUp(name); err != nil || time.Since(began) > time.Second {
		t.Errorf("%s after %v: %v", name, tenths(time.Since(began)), err)
	}
}

// signalAll signals every process of the sessions: culvert, sudo, the child of root.
func signalAll(t testing.TB, name string) {
	t.Helper()
	for _, s := range sessionPIDs(t) {
		laptop(t, "sh", "-c", fmt.Sprintf("kill -%s %d $(pgrep -P %[2]d)", name, s))
	}
}

func sessionPIDs(t testing.TB) (pids []int) {
	t.Helper()
	for pid := range strings.FieldsSeq(laptop(t, "sh", "-c", "pgrep -f '[c]ulvert connect|[c]ulvert exchange'")) {
		pids = append(pids, must(strconv.Atoi(pid)))
	}
	return pids
}

// away is for how long a lid is closed, or an API server is away.
func away(t testing.TB) time.Duration {
	t.Helper()
	return must(time.ParseDuration(cmp.Or(os.Getenv("CULVERT_E2E_AWAY"), "45s")))
}

// CASES 5.6 item 9, D 23: the lid is closed for longer than the grace times of a connect
// and of an exchange, and for less than that of another exchange.
func TestExchangeD23Sleep(t *testing.T) {
	laptopApp(t, laptopName, 0)
	apply(t, another("app-slept"))
	t.Cleanup(func() { kubectl(t, "delete", "svc", "-n", namespace, "app-slept") })
	check := asBefore(t)
	s := connect(t, "--grace=20s")
	pod := "http://" + podIPs(t, "app=app")[0] + ":8080/"
	held := exchange(t, "svc/app", "--to", "http=8080", fmt.Sprintf("--grace=%v", away(t)+time.Minute))
	released := exchange(t, "svc/app-slept", "--to", "http=8080", "--grace=20s")
	polls := []*poller{startPoll(t, "http://"+serviceIP(t, "app")+"/"), startPoll(t, "http://"+serviceIP(t, "app-slept")+"/")}
	for _, p := range polls {
		if err := p.steadily(laptopName, time.Now(), 20*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	signalAll(t, "STOP")
	closed := time.Now()
	for _, p := range polls {
		if err := p.steadily("original", closed.Add(failOpen), 20*time.Second); err != nil {
			t.Errorf("while the laptop sleeps: %v", err)
		}
	}
	time.Sleep(time.Until(closed.Add(away(t))))
	signalAll(t, "CONT")
	woke := time.Now()
	atOnce(t, at("app"))
	outside := asksOutside(t)
	isBack(t, woke, "after a sleep", pod, "original")
	for i, p := range polls {
		if err := p.steadily(laptopName, woke, time.Until(woke.Add(back))); err != nil {
			t.Errorf("exchange %d after a sleep: %v", i, err)
		}
	}
	outside.answered("after a sleep")
	s.says("the shadow is gone, making another")
	released.says("the router is gone, looking for another")
	for _, x := range []*running{held, released} {
		if strings.Count(x.talk.String(), exchangedLine) < 2 {
			t.Errorf("it is not said that it's exchanged again:\n%s", x.talk.String())
		}
		x.stop()
	}
	s.stop()
	check(60 * time.Second)
}

// A death of the shadow, or of what leads to it.
type shadowDeath struct {
	way string
	do  func(t testing.TB, st status) // returns when it can be made again
}

// CASES 5.6 item 10, D 22: whatever ends the shadow, there is another one soon.
func TestLife10Shadow(t *testing.T) {
	for _, do := range []string{"-A", "-D"} { // the first rule makes the table, which then stays
		laptop(t, "iptables", "-w", do, "OUTPUT", "-p", "tcp", "--dport", "1", "-j", "DROP")
	}
	check := noTrace(t)
	s := connect(t)
	deaths := []shadowDeath{
		{"evicted", func(t testing.TB, st status) {
			if err := evict(namespace, st.Shadow.Pod); err != nil {
				t.Fatal(err)
			}
		}},
		{"deleted by force", func(t testing.TB, st status) {
			kubectl(t, "delete", "pod", "-n", namespace, st.Shadow.Pod, "--force", "--grace-period=0")
		}},
		{"killed for want of memory", outOfMemory},
		{"gone while nothing was heard", goneUnheard},
		{"its node drained", func(t testing.TB, st status) {
			drain(t, nodeOf(t, st.Shadow.Pod), sessionLabel+"="+st.Session)
		}},
	}
	for _, d := range deaths {
		t.Run(d.way, func(t *testing.T) {
			before := theStatus(t)
			outside := asksOutside(t)
			d.do(t, before)
			at := time.Now()
			atOnce(t, "web."+namespace)
			eventually(t, back, "another wire", func() error {
				if w := theStatus(t).Wire; !w.Up || w.Reopened == before.Wire.Reopened {
					return fmt.Errorf("%+v", w)
				}
				return nil
			})
			isBack(t, at, d.way, urlOf("web", "/"), webPage)
			outside.answered(d.way)
		})
	}
	s.stop()
	check(60 * time.Second)
}

func nodeOf(t testing.TB, pod string) string {
	t.Helper()
	return kubectl(t, "get", "pod", "-n", namespace, pod, "-o", "jsonpath={.spec.nodeName}")
}

// drain takes a node's pods of that label away, and lets others in again.
func drain(t testing.TB, node, label string) {
	t.Helper()
	t.Cleanup(func() { kubectl(t, "uncordon", node) })
	kubectl(t, "drain", node, "--pod-selector="+label, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")
	kubectl(t, "uncordon", node)
}

// outOfMemory has the kernel kill the shadow: another process, which is not to be killed
// first, takes what is left of the memory that the shadow may have.
func outOfMemory(t testing.TB, st status) {
	t.Helper()
	text := kubectl(t, "get", "pod", "-n", namespace, st.Shadow.Pod, "-o", "jsonpath={.spec.nodeName} {.status.containerStatuses[0].containerID}")
	node, container, _ := strings.Cut(text, " containerd://")
	pid, err := taskOf(node, container)
	if err != nil {
		t.Fatal(err)
	}
	out, err := on(node, "sh", "-ec", `
		group=$(sed -n 's/^0:://p; s/^[0-9]*:memory://p' /proc/$1/cgroup | head -1)
		for dir in /sys/fs/cgroup/memory$group /sys/fs/cgroup$group; do
			for file in memory.limit_in_bytes memory.max; do [ ! -e $dir/$file ] || { limit=$(cat $dir/$file); break 2; }; done
		done
		own=$(awk '/^RssAnon/ {print $2 * 1024}' /proc/$1/status)
		echo 1000 >/proc/$1/oom_score_adj
		(echo 0 >$dir/cgroup.procs; head -c $((limit - own / 2)) /dev/zero | tail -c $limit >/dev/null) &
		for i in $(seq 100); do [ -e /proc/$1/exe ] || break; sleep 0.1; done
		kill $(cat $dir/cgroup.procs) 2>/dev/null || true; wait; [ ! -e /proc/$1/exe ]`, "sh", pid).CombinedOutput()
	if err != nil {
		t.Fatalf("it lives: %v: %s", err, out)
	}
}

// goneUnheard is what a laptop finds that has slept for longer than the grace time, with
// its clock: the shadow has ended, and nothing tells of it. All that was open is lost,
// as behind a router that has forgotten it.
func goneUnheard(t testing.TB, st status) {
	t.Helper()
	ports := strings.Fields(laptop(t, "sh", "-c", "ss -Htn state established dport = :6443 | sed 's/.*:\\([0-9]*\\) .*:6443.*/\\1/'"))
	for _, port := range ports {
		for _, rule := range [][]string{{"OUTPUT", "--sport"}, {"INPUT", "--dport"}} {
			rule := []string{rule[0], "-p", "tcp", rule[1], port, "-j", "DROP"}
			laptop(t, append([]string{"iptables", "-w", "-A"}, rule...)...)
			t.Cleanup(func() { try(append([]string{"iptables", "-w", "-D"}, rule...)...) })
		}
	}
	if _, err := nodeKubectl("delete", "lease", "-n", namespace, "culvert-"+st.Session); err != nil {
		t.Fatal(err)
	}
}

// CASES 5.6 item 10, B 8: the API server is away for long.
func TestLife10B8APIServerGone(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	outside := asksOutside(t)
	heal := cutAPIServer(t)
	gone := time.Now()
	eventually(t, 5*time.Second, "the status says so", func() error {
		if w := theStatus(t).Wire; w.Up {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
	for time.Since(gone) < away(t) {
		atOnce(t, "web."+namespace+".svc.cluster.local")
		if theStatus(t).Wire.Up {
			t.Error("it is said to be up")
		}
		time.Sleep(5 * time.Second)
	}
	s.says("the wire is down, opening it again")
	heal()
	isBack(t, time.Now(), fmt.Sprintf("without the API server for %v", away(t)), urlOf("web", "/"), webPage)
	outside.answered("without the API server")
	kubectl(t, "create", "service", "clusterip", "-n", namespace, "afterwards", "--tcp=80")
	eventually(t, back, "a Service made afterwards resolves", func() error { return lookUp(at("afterwards")) })
	kubectl(t, "delete", "svc", "-n", namespace, "afterwards")
	s.stop()
	check(60 * time.Second)
}

// CASES 3 C 19: a VPN comes up that takes the way to the API server, and leads nowhere.
func TestLifeC19VPN(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	vpn(t)
	outside := asksOutside(t)
	laptop(t, "ip", "route", "add", nodeIP+"/32", "dev", "vpn")
	eventually(t, 10*time.Second, "the status says so", func() error {
		if w := theStatus(t).Wire; w.Up {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
	atOnce(t, at("web"))
	time.Sleep(15 * time.Second)
	laptop(t, "ip", "link", "del", "vpn")
	isBack(t, time.Now(), "after a VPN", urlOf("web", "/"), webPage)
	outside.answered("with a VPN")
	s.stop()
	check(30 * time.Second)
}

// hostIP is ip(8) in the network of one of the cluster's hosts.
func hostIP(t testing.TB, host string, commands ...string) {
	t.Helper()
	for _, c := range commands {
		if out, err := exec.Command("ip", append([]string{"-n", "culvert-" + host}, strings.Fields(c)...)...).CombinedOutput(); err != nil {
			t.Fatalf("ip -n %s %s: %v: %s", host, c, err, out)
		}
	}
}

// A wifi is another network that the laptop may be in, with a nameserver of its own.
type wifi struct{ t testing.TB }

const hotelIP = "172.31.9.1"

// joins leaves the one network, and is in the other after a gap.
func (w wifi) joins(gap time.Duration) (since time.Time) {
	w.t.Helper()
	hostIP(w.t, laptopHost, "link set eth0 down")
	time.Sleep(gap)
	hostIP(w.t, "router", "link add hotel type veth peer name wlan0 netns culvert-"+laptopHost, "addr add "+hotelIP+"/24 dev hotel", "link set hotel up")
	hostIP(w.t, laptopHost, "addr add 172.31.9.2/24 dev wlan0", "link set wlan0 up", "route add default via "+hotelIP)
	w.dhcp(hotelIP)
	return time.Now()
}

// returns is the way back, where nothing was announced.
func (w wifi) returns(gap time.Duration) (since time.Time) {
	w.t.Helper()
	_ = exec.Command("ip", "-n", "culvert-router", "link", "del", "hotel").Run()
	time.Sleep(gap)
	n := map[string]string{"laptop": "0", "laptop2": "1"}[laptopHost]
	hostIP(w.t, laptopHost, "link set eth0 up", "addr replace fd00:31:"+n+"::2/64 dev eth0 nodad", "route replace default via 172.31."+n+".1", "-6 route replace default via fd00:31:"+n+"::1")
	w.dhcp("172.31.0.1")
	return time.Now()
}

// dhcp writes resolv.conf, as its client does.
func (w wifi) dhcp(nameserver string) {
	w.t.Helper()
	laptop(w.t, "sh", "-c", "printf 'nameserver "+nameserver+"\\nsearch corp.example\\noptions timeout:1\\n' >/etc/resolv.conf")
}

// CASES 5.6 item 9, D 22: from one network to another, at once and after a while, with
// every kind of wire: WireGuard past the API server for Services, TLS through it for pods,
// and ssh for another network.
func TestLife9D22WiFi(t *testing.T) {
	bastions(t)
	check := noTrace(t)
	w := wifi{t}
	s := connect(t, "--endpoint=auto", "--wire=wireguard", "--exclude=10.244.0.0/16,fd00:10:244::/56")
	eventually(t, 60*time.Second, "the wire goes past the API server", wireGuarded(t))
	pods := connect(t, "-n", "other", "--exclude=10.96.0.0/16,fd00:10:96::/112")
	far := via(t, "bastion", "172.30.0.0/29")
	urls := map[string]string{"a Service": urlOf("web", "/"), "a pod": "http://" + podIPs(t, "app=web")[0] + ":8080/", "behind ssh": "http://172.30.0.1/"}
	t.Cleanup(func() { w.returns(0) })
	for _, move := range []struct {
		what string
		do   func(time.Duration) time.Time
		gap  time.Duration
	}{{"to another network", w.joins, 0}, {"back, after 20 s", w.returns, 20 * time.Second}} {
		since := move.do(move.gap)
		for what, url := range urls {
			eventually(t, time.Until(since.Add(back)), move.what+": "+what, func() error {
				out, talk, err := try("curl", "-sS", "--max-time", "2", url)
				if err != nil {
					return fmt.Errorf("%w: %s%s", err, out, talk)
				}
				return nil
			})
			t.Logf("%s: %s after %v", move.what, what, tenths(time.Since(since)))
		}
		if err := lookUp("intranet.corp.example", at("web")); err != nil {
			t.Errorf("%s: %v", move.what, err)
		}
		for _, st := range statuses(t) {
			if !st.Wire.Up {
				t.Errorf("%s: %+v", move.what, st.Wire)
			}
		}
	}
	for _, s := range []*running{far, pods, s} {
		s.stop()
	}
	noSSH(t)
	check(30 * time.Second)
}

func wireGuarded(t testing.TB) func() error {
	return func() error {
		for _, st := range statuses(t) {
			if st.Wire.Kind == "wireguard" && st.Wire.Up {
				return nil
			}
		}
		return fmt.Errorf("%+v", statuses(t))
	}
}

// Routes that something else removes, as a network manager may, are back.
func TestLifeRoutesFlushed(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	laptop(t, "ip", "route", "flush", "dev", "culvert0")
	eventually(t, 5*time.Second, "the routes are back", reachable(at("web")))
	s.stop()
	check(30 * time.Second)
}

// A credential runs out while we run: the plugin gives the next, and nobody hears of it.
// Once there is none that is accepted it is said; what is open goes on.
func TestLifeCredentials(t *testing.T) {
	grant(t, namespace, rbac(t, "-n", namespace))
	t.Cleanup(func() { kubectl(t, "delete", "-n", namespace, "sa/lives", "rolebinding/lives") })
	kubectl(t, "create", "sa", "-n", namespace, "lives")
	kubectl(t, "create", "rolebinding", "-n", namespace, "lives", "--role=culvert-connect", "--serviceaccount="+namespace+":lives")
	token := func(name string) string {
		apply(t, fmt.Sprintf(here("{apiVersion: v1, kind: Secret, type: kubernetes.io/service-account-token, metadata: {name: %s, namespace: shop, annotations: {kubernetes.io/service-account.name: lives}}}"), name))
		var out string
		eventually(t, 20*time.Second, "a token", func() error {
			out = kubectl(t, "get", "secret", "-n", namespace, name, "-o", "go-template={{with .data.token}}{{. | base64decode}}{{end}}")
			if out == "" {
				return errors.New("none yet")
			}
			return nil
		})
		return out
	}
	revoke := func(name string) { kubectl(t, "delete", "secret", "-n", namespace, name) }
	dir := openDir(t)
	hand := func(token string, lasts time.Duration) {
		status := map[string]string{"token": token, "expirationTimestamp": time.Now().Add(lasts).UTC().Format(time.RFC3339)}
		next := writeFile(t, dir, "next.json", credential(t, status), 0o644)
		if err := os.Rename(next, filepath.Join(dir, "credential.json")); err != nil {
			t.Fatal(err)
		}
	}
	tokens := map[string]string{}
	for _, name := range []string{"lives-1", "lives-2", "lives-3"} {
		tokens[name] = token(name)
	}
	t.Cleanup(func() { try("kubectl", "delete", "secret", "-n", namespace, "lives-1", "lives-2", "lives-3") })
	env := plugin(t, dir, "", true)
	hand(tokens["lives-1"], 10*time.Second)
	s := connectWith(t, env, "-n", namespace)
	hand(tokens["lives-2"], time.Hour)
	time.Sleep(10 * time.Second)
	revoke("lives-1")
	kubectl(t, "delete", "pod", "-n", namespace, theStatus(t).Shadow.Pod, "--now")
	isBack(t, time.Now(), "with the next token", urlOf("web", "/"), webPage)
	if talk := s.talk.String(); strings.Contains(talk, "accept") {
		t.Errorf("what is nobody's concern is said:\n%s", talk)
	}

	revoke("lives-2")
	s.says("does not accept the credentials")
	if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web: %s", page)
	}
	if missing := strings.Join(theStatus(t).Missing, "\n"); !strings.Contains(missing, "does not accept the credentials") {
		t.Errorf("status: %s", missing)
	}
	hand(tokens["lives-3"], time.Hour)
	s.says("accepts the credentials again")
	if missing := strings.Join(theStatus(t).Missing, "\n"); strings.Contains(missing, "credentials") {
		t.Errorf("status: %s", missing)
	}
	s.stop()
}

// CASES 3 B 15, C 20: the API server has an address of this very machine, and what
// the cluster sends to addresses that nobody has comes here. None of it goes in circles.
func TestLifeB15C20LocalCluster(t *testing.T) {
	loop := []string{"route", "add", "10.244.64.0/18", "via", "172.31.0.2"}
	if laptopHost != "laptop" {
		loop[len(loop)-1] = "172.31.1.2"
	}
	local := `iptables -w -t nat %[1]s OUTPUT -d 127.0.0.1 -p tcp --dport 16443 -j DNAT --to ` + apiServer + `
		iptables -w -t nat %[1]s POSTROUTING -s 127.0.0.1 -o eth0 -j MASQUERADE
		sysctl -qw net.ipv4.conf.eth0.route_localnet=%[2]d net.ipv4.conf.eth0.forwarding=%[2]d net.ipv4.conf.default.forwarding=%[2]d`
	through := []string{"FORWARD", "-s", "10.244.0.0/16", "-o", laptopHost, "-j", "ACCEPT"}
	router := func(command ...string) {
		if out, err := on("router", command...).CombinedOutput(); err != nil {
			t.Errorf("%q: %v: %s", command, err, out)
		}
	}
	t.Cleanup(func() {
		try("sh", "-c", fmt.Sprintf(local, "-D", 0))
		loop[1] = "del"
		router(append([]string{"ip"}, loop...)...)
		router(append([]string{"iptables", "-w", "-D"}, through...)...)
	})
	laptop(t, "sh", "-ec", fmt.Sprintf(local, "-A", 1))
	router(append([]string{"ip"}, loop...)...)
	router(append([]string{"iptables", "-w", "-I"}, through...)...)
	check := noTrace(t)
	env := changed(t, func(cluster, _ map[string]any) {
		cluster["server"], cluster["tls-server-name"] = "https://127.0.0.1:16443", nodeIP
	})
	s := connectWith(t, env, "-n", namespace, "--include=10.244.64.0/18")
	if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web: %s", page)
	}
	packets := func() int {
		return must(strconv.Atoi(laptop(t, "cat", "/sys/class/net/culvert0/statistics/tx_packets")))
	}
	before := packets()
	if _, _, err := try("curl", "-sS", "--max-time", "5", "http://10.244.77.1"); err == nil {
		t.Error("somebody answers where there is nobody")
	}
	if n := packets() - before; n > 100 {
		t.Errorf("one connection became %d packets", n)
	}
	s.stop()
	check(30 * time.Second)
}
