package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// What a laptop reaches by SSH alone: the router is its bastion, and a node behind that
// is one, too.
const (
	bastionIP = "172.31.0.1"
	nodeIP    = "172.30.0.11"
	nodeRange = "172.30.0.0/24"
	apiServer = nodeIP + ":6443"
	sshHome   = "/run/home/dev/.ssh" // of the laptop's ordinary user
	sshPort   = "2222"
)

// A bastion is a stock OpenSSH server on one of the cluster's machines.
type bastion struct {
	t    testing.TB
	host string
	dir  string // with its key
	cmd  *exec.Cmd
}

// bastions makes servers on the router and the first node, and lets dev in, who has
// them as "bastion" and "node" in a configuration of the usual kind.
func bastions(t testing.TB) (router, node *bastion) {
	t.Helper()
	together(t)
	for _, tool := range []string{"/usr/sbin/sshd", "ssh", "ssh-keygen"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatal(err)
		}
	}
	passwordless(t)
	t.Cleanup(func() { laptop(t, "rm", "-rf", sshHome) })
	laptop(t, "sh", "-c", "rm -rf "+sshHome+"; mkdir -m 700 "+sshHome+"; ssh-keygen -q -t ed25519 -N '' -f "+sshHome+"/id_ed25519")
	key := laptop(t, "cat", sshHome+"/id_ed25519.pub")
	router, node = newBastion(t, "router", key), newBastion(t, "node1", key)
	write(t, "known_hosts", router.known(bastionIP)+node.known(nodeIP))
	write(t, "config", "Host bastion\n  HostName "+bastionIP+"\n  Port "+sshPort+"\n  User root\n"+
		"Host node\n  HostName "+nodeIP+"\n  Port "+sshPort+"\n  User root\n  ProxyJump bastion\n")
	return router, node
}

// write writes a file of dev's ~/.ssh.
func write(t testing.TB, name, text string) {
	t.Helper()
	c := on(laptopHost, "sh", "-c", "cat >"+sshHome+"/"+name+"; chmod 600 "+sshHome+"/*; chown -R 1000:1000 "+sshHome)
	c.Stdin = strings.NewReader(text)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("write %s: %v: %s", name, err, out)
	}
}

func newBastion(t testing.TB, host, authorized string) *bastion {
	t.Helper()
	b := &bastion{t: t, host: host, dir: t.TempDir()}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(b.dir, "key")).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	for name, text := range map[string]string{
		"authorized": authorized,
		"config": strings.NewReplacer("DIR", b.dir, "PORT", sshPort).Replace(`
			Port PORT
			HostKey DIR/key
			AuthorizedKeysFile DIR/authorized
			PidFile none
			UsePAM no
			StrictModes no
			PasswordAuthentication no
			KbdInteractiveAuthentication no
			PermitRootLogin prohibit-password`),
	} {
		if err := os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.up()
	t.Cleanup(b.down)
	return b
}

func (b *bastion) known(ip string) string {
	b.t.Helper()
	return fmt.Sprintf("[%s]:%s %s", ip, sshPort, must(os.ReadFile(filepath.Join(b.dir, "key.pub"))))
}

func (b *bastion) up() {
	b.t.Helper()
	b.cmd = on(b.host, "sh", "-c", "mkdir -p -m 755 /run/sshd; exec /usr/sbin/sshd -D -e -f "+b.dir+"/config")
	lines := must(b.cmd.StderrPipe())
	if err := b.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	in := bufio.NewScanner(lines)
	for in.Scan() && !strings.HasPrefix(in.Text(), "Server listening") {
	}
	go func() {
		for in.Scan() {
		}
	}()
}

// down ends the server with the connections it has.
func (b *bastion) down() {
	if b.cmd.ProcessState == nil {
		b.cut()
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
	}
}

// cut breaks its connections off.
func (b *bastion) cut() {
	_ = on(b.host, "ss", "-K", "sport", "=", ":"+sshPort).Run()
	_ = on(b.host, "sh", "-c", "for p in $(ss -Htnp sport = :"+sshPort+" | grep -o 'pid=[0-9]*' | cut -d= -f2); do kill -9 $p; done").Run()
}

// via connects as dev.
func via(t testing.TB, args ...string) *running {
	t.Helper()
	s := startAs(t, culvertAs(devUID, nil, append([]string{"connect", "--via"}, args...)...))
	s.connected()
	return s
}

// noSSH: of the ssh that culvert started nothing is left.
func noSSH(t testing.TB) {
	t.Helper()
	eventually(t, 10*time.Second, "no ssh", func() error {
		if out, _, err := try("sh", "-c", "ps -eo args= | grep '[c]ulvert-ssh-'; ls -d \"$TMPDIR\"/culvert-* 2>/dev/null; true"); err != nil || out != "" {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
}

// health asks the API server for what anybody may know, and tells whether it answered.
func health() error {
	if out, talk, err := try("curl", "-skS", "--max-time", "10", "https://"+apiServer+"/livez"); err != nil || out == "" {
		return fmt.Errorf("%w: %s%s", err, out, talk)
	}
	return nil
}

// kubelet is what the laptop reaches by way of the bastion alone.
func kubelet() error {
	if out, talk, err := try("curl", "-skS", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code}", "https://"+nodeIP+":10250/pods"); err != nil || out != "401" {
		return fmt.Errorf("%w: %s%s", err, out, talk)
	}
	return nil
}

func TestVia(t *testing.T) {
	router, _ := bastions(t)
	check := noTrace(t)
	if kubelet() == nil {
		t.Fatal("the laptop reaches the kubelet")
	}
	hiddenDNS(t)
	s := via(t, "bastion", nodeRange, "--dns", "127.0.0.1:5353", "--dns-zone", "hidden.example")

	t.Run("the ranges", func(t *testing.T) {
		if err := kubelet(); err != nil {
			t.Error(err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		began := time.Now()
		if _, _, err := try("curl", "-sS", "--max-time", "10", "http://"+nodeIP+":9"); exitCode(err) != 7 || time.Since(began) > 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
	t.Run("UDP", func(t *testing.T) {
		began := time.Now()
		if out, _, err := try(kit(t), "dial", "udp", nodeIP+":7", "hello"); err == nil || time.Since(began) > 3*time.Second {
			t.Errorf("%s %v after %v", out, err, time.Since(began))
		}
	})
	t.Run("names", func(t *testing.T) {
		for name, want := range map[string]string{"web.hidden.example": "172.30.0.7", "web": "172.30.0.7", "intranet.corp.example": "172.31.0.1"} {
			if got := laptop(t, "sh", "-c", "getent ahostsv4 "+name+" | awk '{print $1; exit}'"); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		if got := laptop(t, "dig", "+short", "-x", "172.30.0.7"); got != "web.hidden.example." {
			t.Errorf("172.30.0.7 is %q", got)
		}
	})
	t.Run("status", func(t *testing.T) {
		st := theStatus(t)
		if !st.Wire.Up || st.Wire.Kind != "ssh" || st.Wire.Way != "bastion" || st.Wire.RTT == "" || len(st.Routes) != 1 {
			t.Errorf("%+v", st)
		}
		if table := laptop(t, culvertBin, "status"); !strings.Contains(table, "asked of 127.0.0.1:5353: hidden.example") {
			t.Error(table)
		}
	})
	t.Run("server away and back", func(t *testing.T) {
		router.down()
		time.Sleep(2 * time.Second)
		router.up()
		eventually(t, patience, "the ranges again", kubelet)
		if st := theStatus(t); st.Wire.Reopened == 0 {
			t.Errorf("%+v", st)
		}
	})

	s.stop()
	noSSH(t)
	check(10 * time.Second)
}

// hiddenDNS is a server that is asked on the router's own loopback.
func hiddenDNS(t testing.TB) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"Corefile": ".:5353 {\n file " + dir + "/hidden hidden.example\n file " + dir + "/reverse 30.172.in-addr.arpa\n}\n",
		"hidden":   "$ORIGIN hidden.example.\n@ 5 IN SOA ns a 1 5 5 5 5\n@ 5 IN NS ns\nweb 5 IN A 172.30.0.7\n",
		"reverse":  "$ORIGIN 30.172.in-addr.arpa.\n@ 5 IN SOA ns.hidden.example. a 1 5 5 5 5\n@ 5 IN NS ns.hidden.example.\n7.0 5 IN PTR web.hidden.example.\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := on("router", filepath.Join(root, "e2e/.run/bin/coredns"), "-conf", filepath.Join(dir, "Corefile"))
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	eventually(t, patience, "a DNS server", func() error {
		out, err := on("router", "dig", "+short", "+tcp", "-p", "5353", "@127.0.0.1", "web.hidden.example").CombinedOutput()
		if strings.TrimSpace(string(out)) != "172.30.0.7" {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// By way of the bastion to a node, and from there into the cluster; with an agent for
// the key.
func TestViaJump(t *testing.T) {
	bastions(t)
	check := noTrace(t)
	ip := serviceIP(t, "web")
	agent := clusterCommand("exec", "--uid", devUID, laptopHost, "--", "ssh-agent", "-D", "-a", sshHome+"/agent")
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Process.Kill(); _ = agent.Wait() })
	eventually(t, patience, "the key in an agent", func() error {
		out, err := clusterCommand("exec", "--uid", devUID, laptopHost, "--", "env", "SSH_AUTH_SOCK="+sshHome+"/agent", "ssh-add", sshHome+"/id_ed25519").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	laptop(t, "rm", sshHome+"/id_ed25519")
	s := startAs(t, culvertAs(devUID, []string{"SSH_AUTH_SOCK=" + sshHome + "/agent"}, "connect", "--via", "node", "10.96.0.0/16"))
	s.connected()
	if page := curl(t, "http://"+ip+"/"); !strings.Contains(page, `"pod":"web-`) {
		t.Error(page)
	}
	s.stop()
	noSSH(t)
	check(10 * time.Second)
}

// Whom ssh does not let in, or does not trust, is told so, and nothing is changed.
func TestViaRefused(t *testing.T) {
	router, node := bastions(t)
	check := noTrace(t)
	write(t, "known_hosts", node.known(bastionIP))
	refusal{1, []string{"Host key verification failed"}, ""}.check(t, culvertAs(devUID, nil, "connect", "--via", "bastion", nodeRange))
	write(t, "known_hosts", router.known(bastionIP))
	if err := os.WriteFile(filepath.Join(router.dir, "authorized"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refusal{1, []string{"Permission denied (publickey)"}, ""}.check(t, culvertAs(devUID, nil, "connect", "--via", "bastion", nodeRange))
	noSSH(t)
	check(10 * time.Second)

	// The same while it runs ends it: who tries again and again is locked out.
	authorized := must(os.ReadFile(filepath.Join(node.dir, "authorized")))
	if err := os.WriteFile(filepath.Join(router.dir, "authorized"), authorized, 0o600); err != nil {
		t.Fatal(err)
	}
	s := via(t, "bastion", nodeRange)
	if err := os.WriteFile(filepath.Join(router.dir, "authorized"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	router.cut()
	if code := s.wait(patience); code != 1 || !strings.Contains(s.talk.String(), "Permission denied (publickey)") {
		t.Errorf("culvert ended with %d\n%s", code, s.talk.String())
	}
	noSSH(t)
	check(10 * time.Second)
}

// In the background it needs neither the terminal nor who began it: the connection is
// opened again, and ended from anywhere.
func TestViaBackground(t *testing.T) {
	router, _ := bastions(t)
	env := []string{"XDG_STATE_HOME=" + openDir(t)}
	check := noTrace(t)
	background := []string{"connect", "-d", "--via", "bastion", nodeRange}
	c := culvertAs(devUID, env, background...)
	c.Args = slices.Insert(c.Args, slices.Index(c.Args, culvertBin), "setsid", "--ctty")
	s, keys := typeAs(t, c)
	t.Cleanup(func() { _ = culvertAs(devUID, env, "disconnect").Run() })
	if code := s.wait(patience); code != 0 {
		t.Fatalf("%d, %s", code, s.talk.String())
	}
	s.says("culvert disconnect puts everything back")
	keys.Close() // the terminal is gone
	if err := kubelet(); err != nil {
		t.Error(err)
	}
	out, err := culvertAs(devUID, env, background...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "connected to bastion already") {
		t.Errorf("once more: %v, %s", err, out)
	}
	router.cut()
	eventually(t, patience, "the ranges again", kubelet)
	if out, err := culvertAs(devUID, env, "disconnect").CombinedOutput(); err != nil || !strings.Contains(string(out), "✓ disconnected from bastion") {
		t.Errorf("disconnect: %v, %s", err, out)
	}
	noSSH(t)
	check(10 * time.Second)
}

func TestViaKilled(t *testing.T) {
	bastions(t)
	check := noTrace(t)
	via(t, "bastion", nodeRange)
	kill9(t, theStatus(t).PID)
	noSSH(t)
	check(20 * time.Second)
}

// The API server is behind the bastion: connect and expose reach it there, and put back
// by the same way.
func TestSSH(t *testing.T) {
	router, _ := bastions(t)
	t.Cleanup(func() { kubectl(t, "delete", "rolebinding", "-n", namespace, "dev-ssh") })
	kubectl(t, "create", "rolebinding", "-n", namespace, "dev-ssh", "--clusterrole=edit", "--user=dev")
	check := noTrace(t)
	rule := "FORWARD -i " + laptopHost + " -d " + nodeIP + " -p tcp --dport 6443 -j REJECT"
	iptables := func(do string) error {
		return on("router", append([]string{"iptables", "-w", do}, strings.Fields(rule)...)...).Run()
	}
	t.Cleanup(func() { _ = iptables("-D") })
	if err := iptables("-I"); err != nil {
		t.Fatal(err)
	}
	if health() == nil {
		t.Fatal("the laptop reaches the API server")
	}

	s := startAs(t, culvertAs(devUID, nil, "connect", "-n", namespace, "--ssh", "bastion"))
	s.connected()
	if page := curl(t, urlOf("web", "/ssh")); !strings.Contains(page, `"pod":"web-`) {
		t.Error(page)
	}
	router.cut()
	eventually(t, patience, "the Service again", func() error {
		out, talk, err := try("curl", "-sS", "--max-time", "10", urlOf("web", "/ssh"))
		if err == nil && !strings.Contains(out, `"pod":"web-`) {
			err = errors.New(out)
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, talk)
		}
		return nil
	})
	x := startAs(t, culvertAs(devUID, nil, "expose", "-n", namespace, "8080", "--as", "through", "--ssh", "bastion"))
	x.says(exposedLine)
	x.stop()
	s.stop()
	noSSH(t)
	if err := iptables("-D"); err != nil {
		t.Fatal(err)
	}
	check(30 * time.Second)
}
