package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What was typed is wrong: said at once, before the cluster is asked.
func TestWrongUsage(t *testing.T) {
	check := noTrace(t)
	for _, c := range []struct {
		args string
		says []string
	}{
		{"conect", []string{`"conect"`, `did you mean "connect"`}},
		{"frobnicate", []string{`"frobnicate"`}},
		{"--frobnicate", []string{"--frobnicate"}},
		{"connect --frobnicate", []string{"--frobnicate"}},
		{"connect shop", []string{"connect takes no arguments", `"shop"`}},
		{"connect --include ten", []string{"--include", `"ten"`, "10.20.0.0/16"}},
		{"connect --include 10.0.0.0/33", []string{"--include", `"10.0.0.0/33"`}},
		{"connect --include 0.0.0.0/0", []string{"--include", "0.0.0.0/0", "everything"}},
		{"connect --include ::/0", []string{"--include", "::/0", "everything"}},
		{"connect --include 16.0.0.0/4", []string{"--include", "16.0.0.0/4", "/8"}},
		{"connect --include 127.0.0.0/8", []string{"--include", "127.0.0.0/8", "loopback"}},
		{"connect --exclude web.shop", []string{"--exclude", `"web.shop"`}},
		{"connect --exclude 0.0.0.0/0", []string{"--exclude", "0.0.0.0/0", "everything"}},
		{"connect --include", []string{"--include", "needs an argument"}},
		{"connect --grace 5s", []string{"--grace", "15s or more", "5s"}},
		{"connect --grace -1m", []string{"--grace", "-1m"}},
		{"connect --grace soon", []string{"--grace", `"soon"`}},
		{"connect --way teleport", []string{"--way", "proxy, spdy or websocket", `"teleport"`}},
		{"connect --wire morse", []string{"--wire", "tls", `"morse"`}},
		{"exchange pod/web --to 8080 --method ephemeral --endpoint auto", []string{"--endpoint", "ephemeral"}},
		{"connect --endpoint :7465", []string{"--endpoint", "HOST:PORT", `":7465"`}},
		{"connect --image=", []string{"--image"}},
		{"status -o xml", []string{"--output", `"xml"`, "table, json or yaml"}},
		{"version -o JSON", []string{"--output", `"JSON"`}},
		{"clean -o xml", []string{"--output", `"xml"`}},
		{"clean now", []string{"clean takes no arguments"}},
		{"rbac shop", []string{"rbac takes no arguments"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			refusal{2, c.says, "culvert --help"}.check(t, culvert(nil, strings.Fields(c.args)...))
		})
	}
	check(0)
}

// changed is the environment with a kubeconfig that differs from the admin's.
func changed(t testing.TB, change func(cluster, user map[string]any)) []string {
	t.Helper()
	c := readKubeconfig(t, kubeconfig)
	change(c.part("clusters", "cluster"), c.part("users", "user"))
	return []string{"KUBECONFIG=" + c.write(t, t.TempDir(), "config")}
}

func server(t testing.TB, url string) []string {
	t.Helper()
	return changed(t, func(cluster, _ map[string]any) { cluster["server"] = url })
}

// The cluster is not found, not reached, or does not know who asks.
func TestNoCluster(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) []string {
		return []string{"KUBECONFIG=" + writeFile(t, dir, name, text, 0o600)}
	}
	// Of this address no packet ever comes back.
	const hole = "192.0.2.1"
	t.Cleanup(func() { laptop(t, "iptables", "-w", "-D", "OUTPUT", "-d", hole, "-j", "DROP") })
	laptop(t, "iptables", "-w", "-A", "OUTPUT", "-d", hole, "-j", "DROP")

	expired := func(_, user map[string]any) {
		cert, key := issued(t, time.Now().Add(-time.Hour))
		user["client-certificate-data"], user["client-key-data"] = cert, key
	}
	check := noTrace(t)
	for name, c := range map[string]struct {
		env  []string
		args string
		says []string
		hint string
	}{
		"no such file":        {nil, "--kubeconfig /nowhere/config", []string{"no usable kubeconfig", "/nowhere/config"}, "kubectl config view"},
		"not YAML":            {file("a", "{{{"), "", []string{"no usable kubeconfig", filepath.Join(dir, "a")}, "kubectl config view"},
		"empty":               {file("b", ""), "", []string{"no usable kubeconfig", filepath.Join(dir, "b")}, "kubectl config view"},
		"none":                {[]string{"KUBECONFIG=", "HOME=/nowhere"}, "", []string{"no usable kubeconfig", "/nowhere/.kube/config"}, "kubectl config view"},
		"unknown context":     {nil, "--context staging", []string{`"staging"`, "the kubeconfig has: culvert-e2e"}, "kubectl config get-contexts"},
		"no current context":  {file("c", "apiVersion: v1\nkind: Config\ncontexts:\n- {name: one, context: {cluster: x}}\n"), "", []string{"no context is current", "one"}, "kubectl config get-contexts"},
		"context of nothing":  {file("d", "apiVersion: v1\nkind: Config\ncurrent-context: one\ncontexts:\n- {name: one, context: {cluster: x}}\n"), "", []string{"context one", `"x"`}, "kubectl config view"},
		"unknown namespace":   {nil, "-n nowhere", []string{"no such namespace", `"nowhere"`, "https://172.30.0.11:6443"}, "kubectl get namespaces"},
		"no namespace at all": {nil, "-n Not_One", []string{"no such namespace", `"Not_One"`}, "kubectl get namespaces"},
		"port closed":         {server(t, "https://172.31.0.1:6443"), "", []string{"does not answer", "172.31.0.1:6443", "refused"}, "kubectl cluster-info"},
		"black hole":          {server(t, "https://"+hole+":6443"), "", []string{"does not answer", hole + ":6443"}, "kubectl cluster-info"},
		"unknown host":        {server(t, "https://api.nowhere.example:6443"), "", []string{"does not answer", "api.nowhere.example"}, "kubectl cluster-info"},
		"not TLS":             {server(t, "https://172.31.0.1:80"), "", []string{"172.31.0.1:80"}, "kubectl cluster-info"},
		"not an API server":   {server(t, "http://172.31.0.1:80"), "", []string{"172.31.0.1:80"}, ""},
		"another's certificate": {changed(t, func(c, _ map[string]any) { c["tls-server-name"] = "api.example" }), "",
			[]string{"certificate", "api.example"}, "kubectl cluster-info"},
		"wrong token": {changed(t, func(_, u map[string]any) { clear(u); u["token"] = "wrong" }), "",
			[]string{"does not accept the credentials"}, "kubectl auth whoami"},
		"expired certificate": {changed(t, expired), "", []string{"does not accept the credentials"}, "kubectl auth whoami"},
		"no such plugin": {changed(t, func(_, u map[string]any) {
			clear(u)
			u["exec"] = map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never", "command": "/nowhere/login"}
		}), "", []string{"/nowhere/login"}, "kubectl auth whoami"},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			refusal{1, c.says, c.hint}.check(t, culvert(c.env, append([]string{"connect"}, strings.Fields(c.args)...)...))
			if took := time.Since(start); took > 13*time.Second {
				t.Errorf("said so after %v", took)
			}
		})
	}
	check(0)
}

// issued is a certificate of the cluster's own authority for its admin, good
// until then, and its key, as a kubeconfig has them.
func issued(t testing.TB, until time.Time) (cert, key []byte) {
	t.Helper()
	pki := filepath.Join(root, "e2e/.run/pki/ca")
	ca, err := tls.LoadX509KeyPair(pki+".crt", pki+".key")
	if err != nil {
		t.Fatal(err)
	}
	k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "kubernetes-admin", Organization: []string{"system:masters"}},
		NotBefore: until.Add(-time.Hour), NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, must(x509.ParseCertificate(ca.Certificate[0])), k.Public(), ca.PrivateKey))
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: must(x509.MarshalECPrivateKey(k))})
}

// An image that is not to be had is told by its name, early, and nothing of the
// session is left.
func TestWrongImage(t *testing.T) {
	check := noTrace(t)
	for name, c := range map[string]struct {
		args []string
		says []string
	}{
		"nobody has it":     {[]string{"--image=localhost/none:1"}, []string{"localhost/none:1", "Pull"}},
		"not a name":        {[]string{"--image=Not A Name"}, []string{"Not A Name"}},
		"wrong program":     {[]string{"--image=localhost/pause:1"}, []string{"localhost/pause:1", "does not answer on port 7465"}},
		"wrong pull secret": {[]string{"--image=localhost/none:1", "--image-pull-secret=nowhere"}, []string{"localhost/none:1", "nowhere"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // none comes so far as to change the laptop
			start := time.Now()
			refusal{1, append(c.says, "namespace shop"), ""}.check(t, culvert(nil, append([]string{"connect", "-n", namespace}, c.args...)...))
			if took := time.Since(start); took > 50*time.Second {
				t.Errorf("said so after %v", took)
			}
		})
	}
	t.Cleanup(func() { check(30 * time.Second) }) // after all of them
}

// inPrivate is culvert with mounts that only it sees.
func inPrivate(mounts string, args ...string) *exec.Cmd {
	script := mounts + "\nexec " + culvertBin + ` "$@"`
	return on(laptopHost, append([]string{"unshare", "--mount", "--propagation=private", "sh", "-ec", script, "sh"}, args...)...)
}

// smallEtc mounts a little /etc, with what a program needs of it, at dir on the
// laptop.
func smallEtc(t testing.TB) (dir string) {
	t.Helper()
	dir = "/run/etc-of-test"
	t.Cleanup(func() { laptop(t, "sh", "-c", "umount "+dir+"; rmdir "+dir) })
	laptop(t, "sh", "-ec", "mkdir -p "+dir+"; mount -t tmpfs -o size=64k,mode=755 tmpfs "+dir+`
		cp -a /etc/resolv.conf /etc/hosts /etc/nsswitch.conf /etc/passwd /etc/group `+dir)
	return dir
}

func dumpDir(t testing.TB, dir string) string {
	t.Helper()
	return laptop(t, "sh", "-c", "cd "+dir+"; ls -lai --time-style=full-iso | grep -v ' [.][.]*$'; cat resolv.conf*")
}

// A resolv.conf that cannot be written ends the session with the reason, and
// everything is as before.
func TestResolvConfCannotBeWritten(t *testing.T) {
	for name, c := range map[string]struct {
		spoil string // in the small /etc
		mount string // in culvert's own view of it
		says  []string
	}{
		"full disk":           {"dd if=/dev/zero of=filler bs=1k 2>/dev/null || true", "", []string{"resolv.conf", "no space left on device"}},
		"read-only directory": {"", "mount -o remount,bind,ro /etc", []string{"resolv.conf", "read-only"}},
		"read-only file":      {"", "mount --bind /etc/resolv.conf /etc/resolv.conf; mount -o remount,bind,ro /etc/resolv.conf", []string{"resolv.conf", "read-only"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := smallEtc(t)
			laptop(t, "sh", "-ec", "cd "+dir+"\n"+c.spoil)
			before, check := dumpDir(t, dir), noTrace(t)
			refusal{1, c.says, ""}.check(t, inPrivate("mount --bind "+dir+" /etc\n"+c.mount, "connect", "-n", namespace))
			if d := difference(before, dumpDir(t, dir)); d != "" {
				t.Errorf("/etc changed:\n%s", d)
			}
			check(30 * time.Second)
		})
	}
}

// In a container resolv.conf is a mount: it can be written, not replaced.
func TestResolvConfIsMount(t *testing.T) {
	dir := smallEtc(t)
	before, check := dumpDir(t, dir), noTrace(t)
	s := startAs(t, inPrivate("mount --bind "+dir+"/resolv.conf /etc/resolv.conf", "connect", "-n", namespace))
	s.connected()
	if got := laptop(t, "head", "-1", dir+"/resolv.conf"); !strings.HasPrefix(got, "# written by culvert") {
		t.Errorf("resolv.conf begins %q", got)
	}
	server := theStatus(t).DNS.Server
	if got := laptop(t, "dig", "+short", "@"+server, "web.shop.svc.cluster.local"); got != serviceIP(t, "web") {
		t.Errorf("web.shop is %q", got)
	}
	s.stop()
	check(30 * time.Second)
	same := func(dump string) string { // all but the times, and with them the total
		var kept []string
		for _, line := range strings.Split(dump, "\n") {
			if !strings.HasSuffix(line, " resolv.conf") {
				kept = append(kept, line)
				continue
			}
			f := strings.Fields(line)
			kept = append(kept, strings.Join(append(f[:6:6], f[len(f)-1]), " "))
		}
		return strings.Join(kept, "\n")
	}
	if d := difference(same(before), same(dumpDir(t, dir))); d != "" {
		t.Errorf("the mounted file changed:\n%s", d)
	}
}

// A second session on the same ranges is refused, and the first does not notice.
func TestConnectTwice(t *testing.T) {
	check := noTrace(t)
	s := connect(t)
	first := theStatus(t)
	machine, cluster := dumpLaptop(t), dumpCluster(t)
	refusal{1, []string{"connected already to", "process"}, "culvert disconnect"}.check(t, culvert(nil, "connect", "-n", namespace))
	eventually(t, 30*time.Second, "all as with the first alone", func() error {
		return errors.Join(nothing(difference(machine, dumpLaptop(t))), nothing(difference(withoutRenewal(cluster), withoutRenewal(dumpCluster(t)))))
	})
	if err := reachable("web.shop")(); err != nil {
		t.Error(err)
	}
	if st := theStatus(t); st.Session != first.Session || st.Wire.Reopened > 0 || !s.alive() {
		t.Errorf("the first: %+v", st)
	}
	s.stop()
	check(30 * time.Second)
}

func nothing(difference string) error {
	if difference == "" {
		return nil
	}
	return errors.New(difference)
}

// Who reads culvert's output may go first: of "culvert connect | tee log" tee
// gets the Ctrl-C too.
func TestReaderGoes(t *testing.T) {
	check := noTrace(t)
	r, w := must2(os.Pipe())
	cmd := culvert(nil, "connect", "-n", namespace)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGINT) })
	eventually(t, patience, "a session", func() error {
		if n := len(statuses(t)); n != 1 {
			return fmt.Errorf("%d sessions", n)
		}
		return nil
	})
	_, _ = r.Close(), w.Close()
	_ = cmd.Process.Signal(syscall.SIGINT)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("culvert did not end")
	}
	check(5 * time.Second)
}

func must2[A, B any](a A, b B, err error) (A, B) {
	if err != nil {
		panic(err)
	}
	return a, b
}

// cleaned is what "culvert clean -o json" says.
type cleaned struct {
	Files    []string
	Sessions []struct {
		Namespace, Name, Owner, Why string
		Living, Removed             bool
		Objects                     []string
	}
}

func clean(t testing.TB, args ...string) cleaned {
	t.Helper()
	out := laptop(t, append([]string{culvertBin, "clean", "-n", namespace, "-o", "json"}, args...)...)
	var c cleaned
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		t.Fatalf("culvert clean -o json: %v in %s", err, out)
	}
	return c
}

// Clean removes a session whose process is gone, and whose shadow may not heal;
// it spares one that lives, and a dry run touches nothing.
func TestClean(t *testing.T) {
	check := noTrace(t)
	eventually(t, 2*time.Minute, "the dead of other tests are gone", func() error {
		return nothing(kubectl(t, "get", kinds, "-n", namespace, "-l", sessionLabel, "-o", "name"))
	})
	if c := clean(t); len(c.Files)+len(c.Sessions) > 0 {
		t.Fatalf("of what is not there: %+v", c)
	}
	s := connect(t)
	deadOne := theStatus(t)
	t.Cleanup(func() { try("kubectl", "delete", "lease", "-n", namespace, "culvert-"+deadOne.Session) })
	kubectl(t, "delete", "role", "-n", namespace, "culvert-"+deadOne.Session)
	kill9(t, deadOne.PID)
	s.wait(10 * time.Second)

	s = connect(t)
	living := theStatus(t)
	machine, cluster := dumpLaptop(t), dumpCluster(t)
	for _, dry := range []bool{true, false} {
		var c cleaned
		if dry {
			c = clean(t, "--dry-run")
			if d := difference(machine+withoutRenewal(cluster), dumpLaptop(t)+withoutRenewal(dumpCluster(t))); d != "" {
				t.Errorf("the dry run changed:\n%s", d)
			}
		} else {
			c = clean(t)
		}
		if len(c.Sessions) != 2 || len(c.Files) > 0 {
			t.Fatalf("dry run %v: %+v", dry, c)
		}
		for _, found := range c.Sessions {
			alive := found.Name == living.Session
			if found.Living != alive || found.Removed != (!alive && !dry) || found.Namespace != namespace || found.Owner != "root@"+laptopHost || !slices.Contains(found.Objects, "lease/culvert-"+found.Name) {
				t.Errorf("dry run %v: %+v", dry, found)
			}
		}
	}
	if left := kubectl(t, "get", kinds, "-n", namespace, "-l", "culvert.dev/session="+deadOne.Session, "-o", "name"); left != "" {
		t.Errorf("left of the dead one: %s", left)
	}
	if err := reachable("web.shop")(); err != nil || !s.alive() {
		t.Errorf("the living one: %v", err)
	}
	s.stop()
	check(30 * time.Second)
}

// withoutRenewal leaves out Leases, which change as long as they live.
func withoutRenewal(dump string) string {
	return "\n" + strings.Join(slices.DeleteFunc(strings.Split(dump, "\n"), func(l string) bool { return strings.HasPrefix(l, "Lease/") }), "\n")
}

// clean puts back a resolv.conf that a dead session left, without a cluster.
func TestCleanMachine(t *testing.T) {
	check := noTrace(t)
	s := connect(t, shortGrace)
	session := theStatus(t).Session
	// Both die at once, so that none can put it back.
	laptop(t, "sh", "-c", "kill -9 $(pgrep -f '[c]ulvert privileged') $(pgrep -f '[c]ulvert connect')")
	killed := time.Now()
	s.wait(10 * time.Second)
	var c cleaned
	for _, args := range [][]string{{"--dry-run"}, nil} {
		out, err := culvert([]string{"KUBECONFIG=/nowhere"}, append([]string{"clean", "--local", "-o", "json"}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(out, &c); err != nil || !slices.Equal(c.Files, []string{"/etc/resolv.conf", "/etc/resolv.conf.culvert-for-culvert0"}) {
			t.Errorf("clean %v: %v: %s", args, err, out)
		}
		if head := laptop(t, "head", "-1", "/etc/resolv.conf"); strings.HasPrefix(head, "# written by culvert") != (args != nil) {
			t.Errorf("after clean %v resolv.conf begins %q", args, head)
		}
	}
	goesByItself(t, session, check, killed, 15*time.Second)
}

// keysOf are the paths of all keys in a JSON value, those of a list's first
// element for the list.
func keysOf(v any, path string) []string {
	var keys []string
	switch v := v.(type) {
	case map[string]any:
		for k, below := range v {
			p := strings.TrimPrefix(path+"."+k, ".")
			keys = append(append(keys, p), keysOf(below, p)...)
		}
	case []any:
		if len(v) > 0 {
			keys = keysOf(v[0], path)
		}
	}
	sort.Strings(keys)
	return keys
}

func jsonKeys(t testing.TB, args ...string) []string {
	t.Helper()
	var v any
	out := laptop(t, append([]string{culvertBin}, args...)...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v: %v in %s", args, err, out)
	}
	return keysOf(v, "")
}

// statusKeys is the promise of "status -o json": more may come, none may go.
const statusKeys = `context device device.addresses device.mtu device.name device.offload dns dns.domain dns.mode dns.search dns.server dns.whole
	flows flows.bytesReceived flows.bytesSent flows.failedDials flows.ping flows.tcp flows.udp missing namespace owner pid routes routes.prefix routes.source
	server session shadow shadow.kind shadow.pod since wire wire.reopened wire.since wire.up wire.way`

func TestOutput(t *testing.T) {
	check := noTrace(t)
	t.Run("not connected", func(t *testing.T) {
		for format, want := range map[string][2]string{"table": {"", "not connected\n"}, "json": {"[]", ""}, "yaml": {"[]", ""}} {
			if out, talk, err := try(culvertBin, "status", "-o", format); err != nil || out != want[0] || talk != want[1] {
				t.Errorf("status -o %s: %v, %q, %q, want %q", format, err, out, talk, want)
			}
		}
	})
	t.Run("version", func(t *testing.T) {
		if got := jsonKeys(t, "version", "-o", "json"); !slices.Equal(got, []string{"arch", "go", "os", "version"}) {
			t.Errorf("keys %q", got)
		}
		if out := laptop(t, culvertBin, "version"); !strings.HasPrefix(out, "culvert ") || strings.Contains(out, "\n") {
			t.Errorf("%q", out)
		}
	})
	t.Run("rbac", func(t *testing.T) {
		for _, args := range [][]string{{"-n", namespace}, {"-n", namespace, "--cluster"}} {
			c := on(laptopHost, "kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-")
			c.Stdin = strings.NewReader(rbac(t, args...))
			out, err := c.CombinedOutput()
			if err != nil || strings.Count(string(out), "created (server dry run)") != len(args)-1 || strings.Contains(string(out), "arning") {
				t.Errorf("rbac %v: %v: %s", args, err, out)
			}
		}
		refusal{1, []string{`"a b"`}, "kubectl get namespaces"}.check(t, culvert(nil, "rbac", "-n", "a b"))
	})
	t.Run("completion", func(t *testing.T) {
		for args, want := range map[string][]string{
			"connect --context": {"culvert-e2e"}, "connect -n": {"default", "kube-system", "other", "shop"},
			"connect --way": {"proxy", "spdy", "websocket"}, "status -o": {"json", "table", "yaml"},
		} {
			got := laptop(t, append(append([]string{culvertBin, "__complete"}, strings.Fields(args)...), "")...)
			for _, w := range append(want, ":4") { // and no names of files
				if !slices.Contains(strings.Fields(got), w) {
					t.Errorf("%s: %q, want %s", args, got, w)
				}
			}
		}
		out, talk, err := try("env", "KUBECONFIG="+strings.TrimPrefix(server(t, "https://172.31.0.1:6443")[0], "KUBECONFIG="), culvertBin, "__complete", "connect", "-n", "")
		if err != nil || !strings.HasPrefix(out, ":") {
			t.Errorf("without a cluster: %v, %q, %q", err, out, talk)
		}
		c := on(laptopHost, "bash", "-n")
		c.Stdin = strings.NewReader(laptop(t, culvertBin, "completion", "bash"))
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("completion bash: %v: %s", err, out)
		}
	})
	check(0)
	t.Run("status", func(t *testing.T) {
		s := connect(t)
		got := jsonKeys(t, "status", "-o", "json")
		for _, key := range strings.Fields(statusKeys) {
			if !slices.Contains(got, key) {
				t.Errorf("no %s among %q", key, got)
			}
		}
		table := laptop(t, culvertBin, "status")
		for _, word := range []string{"session", "cluster", "shadow", "wire", "flows", "device", "route", "names"} {
			if !strings.Contains("\n"+table, "\n"+word+" ") {
				t.Errorf("no %s in\n%s", word, table)
			}
		}
		if got := laptop(t, "sh", "-c", culvertBin+" status -o yaml | grep -c '^- '"); got != "1" {
			t.Errorf("%s sessions as YAML, want 1", got)
		}
		s.stop()
		check(30 * time.Second)
	})
}
