package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// dev is the environment of a developer whom the cluster gives no rights at
// first.
var dev = []string{"KUBECONFIG=" + filepath.Join(root, "e2e/.run/kubeconfig-dev")}

const (
	devUID     = "1000"
	shortGrace = "--grace=15s"
)

// culvert is a command on the laptop with a little more environment.
func culvert(env []string, args ...string) *exec.Cmd {
	c := on(laptopHost, append([]string{culvertBin}, args...)...)
	c.Env = append(c.Env, env...)
	return c
}

// culvertAs is the same, run by a user of the laptop.
func culvertAs(uid string, env []string, args ...string) *exec.Cmd {
	c := clusterCommand(append([]string{"exec", "--uid", uid, laptopHost, "--", culvertBin}, args...)...)
	c.Env = append(append(os.Environ(), "CULVERT_IMAGE="+image), env...)
	return c
}

// connectWith connects in some environment.
func connectWith(t testing.TB, env []string, args ...string) *running {
	t.Helper()
	s := startAs(t, culvert(env, append([]string{"connect"}, args...)...))
	s.connected()
	return s
}

// talkOf are the lines that culvert said with a mark before them.
func talkOf(text, mark string) []string {
	var found []string
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), mark); ok {
			found = append(found, rest)
		}
	}
	return found
}

// refusal is how culvert is to fail.
type refusal struct {
	code int
	says []string // each is in the one error line
	hint string   // begins the hint; none where empty
}

// check runs cmd, which fails as the refusal says: one error line, at most one
// hint, and nothing that was not meant for a person.
func (r refusal) check(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	var talk lockedBuffer
	cmd.Stdout, cmd.Stderr = &talk, &talk
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Signal(syscall.SIGINT) })
	err := cmd.Wait()
	late.Stop()
	text := talk.String()
	if code := exitCode(err); code != r.code {
		t.Errorf("exit code %d, want %d\n%s", code, r.code, text)
	}
	lines, hints := talkOf(text, "culvert: error: "), talkOf(text, "culvert: hint: ")
	if len(lines) != 1 {
		t.Fatalf("%d error lines, want 1\n%s", len(lines), text)
	}
	for _, part := range r.says {
		if !strings.Contains(lines[0], part) {
			t.Errorf("the error does not name %q\n%s", part, text)
		}
	}
	switch {
	case r.hint == "" && len(hints) > 0, r.hint != "" && (len(hints) != 1 || !strings.HasPrefix(hints[0], r.hint)):
		t.Errorf("hints %q, want %q\n%s", hints, r.hint, text)
	}
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		if mark, _, _ := strings.Cut(line, " "); !slices.Contains([]string{"✓", "✗", "!", "…", "", "culvert:", "sudo:"}, mark) {
			t.Errorf("a line that is not culvert's: %q\n%s", line, text)
		}
	}
}

// rbac is what culvert prints for whoever may grant it.
func rbac(t testing.TB, args ...string) string {
	t.Helper()
	return laptop(t, append([]string{culvertBin, "rbac"}, args...)...)
}

// grant applies a Role named culvert-connect and binds it to dev.
func grant(t testing.TB, ns, roles string) {
	t.Helper()
	apply(t, roles)
	t.Cleanup(func() { kubectl(t, "delete", "-n", ns, "role/culvert-connect", "rolebinding/culvert-connect") })
	kubectl(t, "create", "rolebinding", "-n", ns, "culvert-connect", "--role=culvert-connect", "--user=dev")
}

// without cuts rules out of a Role; each must be there.
func without(t testing.TB, role string, rules ...string) string {
	t.Helper()
	for _, rule := range rules {
		if !strings.Contains(role, rule) {
			t.Fatalf("culvert rbac does not print %q:\n%s", rule, role)
		}
		role = strings.Replace(role, rule, "", 1)
	}
	return role
}

// The rules of the two ways to the shadow.
const (
	proxyRule   = "  - apiGroups: [\"\"]\n    resources: [pods/proxy]\n    verbs: [get]\n"
	forwardRule = "  - apiGroups: [\"\"]\n    resources: [pods/portforward]\n    verbs: [create, get]\n"
	spdyRule    = "  - apiGroups: [\"\"]\n    resources: [pods/portforward]\n    verbs: [create]\n"
)

// A developer with the Role that culvert prints, and nothing else: all of the
// namespace by address and by name, names elsewhere, and a line for each thing
// that would be better with more.
func TestF29NamespacedRole(t *testing.T) {
	grant(t, namespace, rbac(t, "-n", namespace))
	check := noTrace(t)
	s := connectWith(t, dev, "-n", namespace)

	forms := []string{serviceIP(t, "web"), "web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local"}
	for _, ip := range slices.Concat(podIPs(t, "app=web"), podIPs6(t, "app=web")) {
		forms = append(forms, net.JoinHostPort(ip, "8080"))
	}
	for _, host := range forms {
		if page := curl(t, "http://"+host+"/"); !strings.Contains(page, `"pod":"web-`) {
			t.Errorf("%s: %s", host, page)
		}
	}
	for _, host := range append(serviceIPs(t, "app-dual"), "app-six") {
		if out := laptop(t, kit(t), "check", host, "line", "udp"); strings.Count(out, `"original"`) != 2 {
			t.Errorf("%s: %s", host, out)
		}
	}
	for _, name := range []string{"db", "db-0.db", "named.sub", "web-alias", "web.other", "web.other.svc.cluster.local", "kubernetes.default", "app-dual", "app-six"} {
		want := lines(inPod(t, "kit", "dns", name))
		got := lines(laptop(t, "sh", "-c", "getent ahosts "+name+" | awk '{print $1}' | sort -u"))
		if !slices.Equal(got, want) {
			t.Errorf("%s: the laptop gets %v, a pod %v", name, got, want)
		}
	}
	if got := laptop(t, kit(t), "dial", "udp", "udp.shop:7", "hello"); got != "hello" {
		t.Errorf("UDP: %q", got)
	}

	st, said := theStatus(t), talkOf(s.talk.String(), "! ")
	want := []string{"names in other namespaces are asked of the cluster's DNS", "address ranges are observed, not read"}
	if len(said) != len(want) || !slices.Equal(said, st.Missing) {
		t.Errorf("said %q, status says %q, want a line each for %q", said, st.Missing, want)
	}
	for i, line := range said {
		if !strings.HasPrefix(line, "you may not list ") || !strings.Contains(line, want[i]) {
			t.Errorf("line %d is %q, want %q", i, line, want[i])
		}
	}
	if st.Shadow.Kind != "Deployment" || !slices.Equal(st.DNS.Whole, []string{namespace}) {
		t.Errorf("%+v", st)
	}
	s.stop()
	check(30 * time.Second)
}

// With the ClusterRole too, nothing is less good than it could be.
func TestF29ClusterRole(t *testing.T) {
	grant(t, namespace, rbac(t, "-n", namespace, "--cluster"))
	t.Cleanup(func() { kubectl(t, "delete", "clusterrole/culvert-connect", "clusterrolebinding/culvert-connect") })
	kubectl(t, "create", "clusterrolebinding", "culvert-connect", "--clusterrole=culvert-connect", "--user=dev")
	check := noTrace(t)
	s := connectWith(t, dev, "-n", namespace)
	if page := curl(t, "http://web.other/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web.other: %s", page)
	}
	st := theStatus(t)
	if said := talkOf(s.talk.String(), "! "); len(said)+len(st.Missing) > 0 {
		t.Errorf("said %q, status says %q, want nothing", said, st.Missing)
	}
	if !slices.Equal(st.DNS.Whole, []string{"*"}) {
		t.Errorf("watched namespaces %q, want all", st.DNS.Whole)
	}
	var sources []string
	for _, r := range st.Routes {
		sources = append(sources, r.Source)
	}
	if all := strings.Join(sources, ", "); !strings.Contains(all, "ServiceCIDR") || !strings.Contains(all, "podCIDR") || strings.Contains(all, "observed") {
		t.Errorf("routes are known from %s", all)
	}
	s.stop()
	check(30 * time.Second)
}

// The usual developer, who may not create roles: a shadow without rights goes
// by itself too.
func TestF29EditRole(t *testing.T) {
	var session string
	var killed time.Time
	check := noTrace(t)
	t.Run("killed", func(t *testing.T) {
		t.Cleanup(func() { kubectl(t, "delete", "rolebinding", "-n", namespace, "dev-edit") })
		kubectl(t, "create", "rolebinding", "-n", namespace, "dev-edit", "--clusterrole=edit", "--user=dev")
		s := connectWith(t, dev, "-n", namespace, shortGrace)
		if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
			t.Errorf("web.shop: %s", page)
		}
		st := theStatus(t)
		if st.Shadow.Kind != "Job" || !strings.Contains(strings.Join(st.Missing, "\n"), "the shadow is a Job without rights of its own") {
			t.Errorf("%+v", st)
		}
		if made := kubectl(t, "get", "sa,role,rolebinding", "-n", namespace, "-l", sessionLabel+"="+st.Session, "-o", "name"); made != "" {
			t.Errorf("made %s", made)
		}
		kill9(t, st.PID)
		killed, session = time.Now(), st.Session
		s.wait(10 * time.Second)
	})
	if session != "" {
		goesByItself(t, session, check, killed, 15*time.Second)
	}
}

func TestF29NoRights(t *testing.T) {
	check := noTrace(t)
	refusal{3, []string{
		"not permitted", "create secrets in namespace shop", "list pods in namespace shop", "get pods/proxy in namespace shop", "create deployments.apps in namespace shop",
	}, "culvert rbac -n shop | kubectl apply -f -"}.check(t, culvert(dev, "connect", "-n", namespace))
	check(0)
}

// One way to the shadow is enough for either wire, and status tells which.
func TestF30OneWayOnly(t *testing.T) {
	all := rbac(t, "-n", namespace)
	for _, c := range []struct{ way, role, wire string }{
		{"pods/proxy", without(t, all, forwardRule), "ssh"},
		{"port-forward websocket", without(t, all, proxyRule), "ssh"},
		{"port-forward spdy", strings.Replace(without(t, all, proxyRule), forwardRule, spdyRule, 1), "tls"},
	} {
		t.Run(c.way, func(t *testing.T) {
			grant(t, namespace, c.role)
			check := noTrace(t)
			s := connectWith(t, dev, "-n", namespace, "--wire", c.wire)
			if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
				t.Errorf("web.shop: %s", page)
			}
			if st := theStatus(t); st.Wire.Way != c.way || st.Wire.Kind != c.wire {
				t.Errorf("%+v, want %s through %s", st.Wire, c.wire, c.way)
			}
			s.stop()
			check(30 * time.Second)
		})
	}
	t.Run("none", func(t *testing.T) {
		grant(t, namespace, without(t, all, proxyRule, forwardRule))
		check := noTrace(t)
		refusal{3, []string{"get pods/proxy", "portforward"}, "culvert rbac"}.check(t, culvert(dev, "connect", "-n", namespace))
		check(0)
	})
}

// newNamespace applies a manifest that makes namespace ns, and has noTrace look
// at it too.
func newNamespace(t testing.TB, ns, manifest string) {
	t.Helper()
	apply(t, manifest)
	before := watched
	t.Cleanup(func() {
		watched = before
		kubectl(t, "delete", "namespace", ns)
	})
	watched = append(slices.Clone(watched), ns)
	eventually(t, 30*time.Second, "what every namespace has", func() error {
		_, _, err := try("kubectl", "get", "-n", ns, "serviceaccount/default", "configmap/kube-root-ca.crt")
		return err
	})
}

// strict is a namespace as a careful admin makes it.
const strict = `
apiVersion: v1
kind: Namespace
metadata: {name: strict, labels: {pod-security.kubernetes.io/enforce: restricted, pod-security.kubernetes.io/enforce-version: latest}}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: all, namespace: strict}
spec:
  hard:
    requests.cpu: 100m
    requests.memory: 64Mi
    limits.cpu: 400m
    limits.memory: 96Mi
    pods: "1"
    count/secrets: "1"
    count/deployments.apps: "1"
    count/leases.coordination.k8s.io: "1"
    count/roles.rbac.authorization.k8s.io: "2"
---
apiVersion: v1
kind: LimitRange
metadata: {name: all, namespace: strict}
spec:
  limits:
    - type: Container
      min: {cpu: 50m, memory: 40Mi}
      max: {cpu: 300m, memory: 80Mi}
      default: {cpu: 200m, memory: 64Mi}
      defaultRequest: {cpu: 60m, memory: 48Mi}
      maxLimitRequestRatio: {cpu: "4"}
    - type: Pod
      max: {cpu: 500m, memory: 90Mi}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: strict}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
`

func TestStrictNamespace(t *testing.T) {
	newNamespace(t, "strict", strict)
	grant(t, "strict", rbac(t, "-n", "strict"))
	quotaKnown(t, "strict")
	t.Run("fits in", func(t *testing.T) {
		check := noTrace(t)
		// With these rights only addresses that are seen are known: there is no
		// Service here, so the range is named, as the notice says.
		s := connectWith(t, dev, "-n", "strict", "--include=10.96.0.0/16")
		if page := curl(t, "http://web.shop.svc.cluster.local/"); !strings.Contains(page, `"pod":"web-`) {
			t.Errorf("web.shop: %s", page)
		}
		name := "culvert-" + theStatus(t).Session
		policy := kubectl(t, "get", "networkpolicy", "-n", "strict", name, "-o", "json")
		for _, part := range []string{`"port": 7465`, `"egress": [`, `"culvert.dev/session"`} {
			if !strings.Contains(policy, part) {
				t.Errorf("the policy that opens the shadow does not say %s:\n%s", part, policy)
			}
		}
		s.stop()
		check(30 * time.Second)
	})
	for what, full := range map[string]string{
		"no room for the pod":    `{"pods":"0"}`,
		"no memory left":         `{"limits.memory":"10Mi"}`,
		"no room for the Secret": `{"count/secrets":"0"}`,
	} {
		t.Run(what, func(t *testing.T) {
			kubectl(t, "patch", "quota", "-n", "strict", "all", "--type=merge", "-p", `{"spec":{"hard":`+full+`}}`)
			t.Cleanup(func() { apply(t, strict); quotaKnown(t, "strict") })
			quotaKnown(t, "strict")
			check := noTrace(t)
			start := time.Now()
			refusal{1, []string{"exceeded quota: all", "namespace strict"}, ""}.check(t, culvert(dev, "connect", "-n", "strict"))
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("said so after %v", took)
			}
			check(30 * time.Second)
		})
	}
}

// quotaKnown waits until what is allowed is what is enforced.
func quotaKnown(t testing.TB, ns string) {
	t.Helper()
	eventually(t, 30*time.Second, "the quota is in force", func() error {
		var q struct {
			Spec   struct{ Hard map[string]string }
			Status struct{ Hard, Used map[string]string }
		}
		out := kubectl(t, "get", "quota", "-n", ns, "all", "-o", "json")
		if err := json.Unmarshal([]byte(out), &q); err != nil {
			return err
		}
		if fmt.Sprint(q.Spec.Hard) != fmt.Sprint(q.Status.Hard) || len(q.Status.Used) < len(q.Spec.Hard) {
			return errors.New(out)
		}
		return nil
	})
}

// A kubeConfig is a kubeconfig to be changed.
type kubeConfig map[string]any

func readKubeconfig(t testing.TB, path string) kubeConfig {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var c kubeConfig
	if err := yaml.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// part is what the first of a list has under its name: "clusters", "cluster".
func (c kubeConfig) part(list, name string) map[string]any {
	return c[list].([]any)[0].(map[string]any)[name].(map[string]any)
}

// write gives it to all users, and returns its path.
func (c kubeConfig) write(t testing.TB, dir, name string) string {
	t.Helper()
	b, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, dir, name, string(b), 0o644)
}

func writeFile(t testing.TB, dir, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := errors.Join(os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
	return path
}

// openDir is a directory that every user of the laptop may look and write into.
func openDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o777), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// plugin is a credential plugin that notes who runs it, and does not let root in
// unless told to. It returns the environment with its kubeconfig.
func plugin(t testing.TB, dir, credential string, rootToo bool) (env []string) {
	t.Helper()
	script := "#!/bin/sh\nid -u >>" + dir + "/uids\n"
	if !rootToo {
		script += "[ $(id -u) != 0 ] || exit 7\n"
	}
	script += "cat " + writeFile(t, dir, "credential.json", credential, 0o644) + "\n"
	c := readKubeconfig(t, strings.TrimPrefix(dev[0], "KUBECONFIG="))
	c["users"].([]any)[0].(map[string]any)["user"] = map[string]any{"exec": map[string]any{
		"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never",
		"command": writeFile(t, dir, "login", script, 0o755),
	}}
	writeFile(t, dir, "uids", "", 0o666)
	return []string{"KUBECONFIG=" + c.write(t, dir, "config")}
}

// credential is what a plugin prints.
func credential(t testing.TB, status map[string]string) string {
	t.Helper()
	b, err := json.Marshal(map[string]any{
		"kind": "ExecCredential", "apiVersion": "client.authentication.k8s.io/v1", "spec": map[string]any{"interactive": false}, "status": status,
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func certificate(t testing.TB) string {
	t.Helper()
	pem := func(name string) string { return string(must(os.ReadFile(filepath.Join(root, "e2e/.run/pki", name)))) }
	return credential(t, map[string]string{"clientCertificateData": pem("dev.crt"), "clientKeyData": pem("dev.key")})
}

// uids tells who ran the plugin.
func uids(t testing.TB, dir string) []string {
	t.Helper()
	return lines(string(must(os.ReadFile(filepath.Join(dir, "uids")))))
}

// passwordless lets dev run culvert's child as root, through sudo, for a while. It has a
// terminal of its own there, as is Debian's default.
func passwordless(t testing.TB) {
	t.Helper()
	t.Cleanup(func() { laptop(t, "rm", "-f", "/etc/sudoers.d/culvert") })
	laptop(t, "sh", "-c", `
		grep -q ^dev: /etc/shadow || echo 'dev:*:20000:0:99999:7:::' >>/etc/shadow
		{ echo 'Defaults use_pty'; echo 'dev ALL=(root) NOPASSWD: `+culvertBin+` privileged'; } >/etc/sudoers.d/culvert; chmod 440 /etc/sudoers.d/culvert`)
}

// Who logs in by a credential plugin: as an ordinary user, with sudo for the
// child alone, so that the plugin is never run by root.
func TestF28ExecPlugin(t *testing.T) {
	grant(t, namespace, rbac(t, "-n", namespace))
	t.Run("certificate, as a user", func(t *testing.T) {
		dir := openDir(t)
		env := plugin(t, dir, certificate(t), false)
		passwordless(t)
		check := noTrace(t)
		s := startAs(t, culvertAs(devUID, env, "connect", "-n", namespace))
		s.connected()
		if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
			t.Errorf("web.shop: %s", page)
		}
		rootOnlyTheChild(t)
		own, err := culvertAs(devUID, env, "status").Output()
		if err != nil || !strings.Contains(string(own), "namespace shop") || !strings.Contains(string(own), "through pods/proxy") {
			t.Errorf("the user's own status: %v: %s", err, own)
		}
		s.stop()
		check(30 * time.Second)
		if got := uids(t, dir); !slices.Equal(got, []string{devUID}) {
			t.Errorf("the plugin was run by %v, want only %s", got, devUID)
		}
	})
	t.Run("token, by port-forward", func(t *testing.T) {
		dir := openDir(t)
		t.Cleanup(func() { kubectl(t, "delete", "-n", namespace, "sa/login", "rolebinding/login") })
		kubectl(t, "create", "sa", "-n", namespace, "login")
		kubectl(t, "create", "rolebinding", "-n", namespace, "login", "--role=culvert-connect", "--serviceaccount=shop:login")
		token := kubectl(t, "create", "token", "-n", namespace, "login", "--duration=10m")
		env := plugin(t, dir, credential(t, map[string]string{"token": token}), true)
		check := noTrace(t)
		s := connectWith(t, env, "-n", namespace, "--way=websocket")
		if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
			t.Errorf("web.shop: %s", page)
		}
		s.stop()
		check(30 * time.Second)
	})
	t.Run("refuses", func(t *testing.T) {
		env := plugin(t, openDir(t), certificate(t), false)
		check := noTrace(t)
		refusal{1, []string{"does not accept the credentials", "login", "exit code 7"}, "kubectl auth whoami"}.check(t, culvert(env, "connect", "-n", namespace))
		check(0)
	})
	t.Run("no sudo", func(t *testing.T) {
		env := plugin(t, openDir(t), certificate(t), false)
		// What sudo itself keeps of those it refuses.
		t.Cleanup(func() { laptop(t, "rm", "-rf", "/run/sudo") })
		_ = clusterCommand("exec", "--uid", devUID, laptopHost, "--", "sudo", "-n", "true").Run()
		check := noTrace(t)
		refusal{3, []string{"root is needed"}, "sudo -v"}.check(t, culvertAs(devUID, env, "connect", "-n", namespace))
		check(0)
	})
}

// A binary that was given the two capabilities needs no sudo: pods and Services are reached,
// and names where culvert's own server is asked. The resolver is root's.
func TestF28Capabilities(t *testing.T) {
	grant(t, namespace, rbac(t, "-n", namespace))
	dir := openDir(t)
	env := plugin(t, dir, certificate(t), false)
	self := filepath.Join(dir, "culvert")
	laptop(t, "sh", "-ec", "cp "+culvertBin+" "+self+"; setcap cap_net_admin,cap_net_bind_service+ep "+self)
	check := noTrace(t)
	resolvConf := laptop(t, "cat", "/etc/resolv.conf")
	c := culvertAs(devUID, env, "connect", "-n", namespace)
	c.Args[slices.Index(c.Args, culvertBin)] = self
	s := startAs(t, c)
	s.connected()
	s.says("without root this machine's resolver can't be told of names")
	ip := serviceIP(t, "web")
	if page := curl(t, "http://"+ip+"/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web: %s", page)
	}
	if got := laptop(t, "dig", "+short", "@"+theStatus(t).DNS.Server, "web.shop.svc.cluster.local"); got != ip {
		t.Errorf("web is %q, want %s", got, ip)
	}
	if table := laptop(t, culvertBin, "status"); !strings.Contains(table, "of which the resolver was not told") {
		t.Error(table)
	}
	if now := laptop(t, "cat", "/etc/resolv.conf"); now != resolvConf {
		t.Errorf("resolv.conf: %s", now)
	}
	s.stop()
	check(30 * time.Second)
}

// rootOnlyTheChild looks at every process of culvert.
func rootOnlyTheChild(t testing.TB) {
	t.Helper()
	children := 0
	for line := range strings.Lines(laptop(t, "ps", "-eo", "ruid=,args=")) {
		uid, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch args = strings.TrimSpace(args); {
		case strings.HasPrefix(args, culvertBin+" privileged"):
			children++
			if uid != "0" {
				t.Errorf("the child runs as %s", uid)
			}
		case strings.HasPrefix(args, culvertBin+" connect") && uid != devUID:
			t.Errorf("culvert itself runs as %s", uid)
		}
	}
	if children != 1 {
		t.Errorf("%d children of root, want 1", children)
	}
}

// The API server is known by a name that only the proxy can resolve.
func TestF30HTTPSProxy(t *testing.T) {
	const host, proxy = "api.behind.example", "http://172.31.0.1:3128"
	router := func(script string) {
		t.Helper()
		if out, err := on("router", "sh", "-c", script).CombinedOutput(); err != nil {
			t.Fatalf("router: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { router("cp /run/hosts.before /etc/hosts; rm /run/hosts.before") })
	router("cp /etc/hosts /run/hosts.before; echo 172.30.0.11 " + host + " >>/etc/hosts")
	eventually(t, 20*time.Second, "the proxy knows the name", func() error {
		_, talk, err := try("curl", "-sSk", "--max-time", "3", "-x", proxy, "https://"+host+":6443/version")
		if err != nil {
			return errors.New(talk)
		}
		return nil
	})
	config := func(more map[string]any) []string {
		c := readKubeconfig(t, kubeconfig)
		cluster := c.part("clusters", "cluster")
		cluster["server"], cluster["tls-server-name"] = "https://"+host+":6443", "kubernetes"
		for k, v := range more {
			cluster[k] = v
		}
		return []string{"KUBECONFIG=" + c.write(t, t.TempDir(), "config")}
	}
	plain := config(nil)
	check := noTrace(t)
	refusal{1, []string{"does not answer", host}, "kubectl cluster-info"}.check(t, culvert(plain, "connect", "-n", namespace))
	check(0)
	for what, try := range map[string]struct {
		env []string
		way string
	}{
		"HTTPS_PROXY":            {append(plain, "HTTPS_PROXY="+proxy), "pods/proxy"},
		"HTTPS_PROXY, websocket": {append(plain, "HTTPS_PROXY="+proxy), "port-forward websocket"},
		"proxy-url, spdy":        {config(map[string]any{"proxy-url": proxy}), "port-forward spdy"},
		"proxy-url":              {config(map[string]any{"proxy-url": proxy}), "pods/proxy"},
	} {
		t.Run(what, func(t *testing.T) {
			words := strings.Split(strings.TrimPrefix(try.way, "pods/"), " ")
			check := noTrace(t)
			s := connectWith(t, try.env, "-n", namespace, "--way="+words[len(words)-1])
			if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
				t.Errorf("web.shop: %s", page)
			}
			if st := theStatus(t); st.Wire.Way != try.way {
				t.Errorf("way %q, want %q", st.Wire.Way, try.way)
			}
			s.stop()
			check(30 * time.Second)
		})
	}
}

// Several files, of which one does not exist, are one kubeconfig; flags go
// before what it says.
func TestKubeconfigs(t *testing.T) {
	dir := t.TempDir()
	keys, contexts := readKubeconfig(t, kubeconfig), kubeConfig{"apiVersion": "v1", "kind": "Config", "current-context": "one"}
	delete(keys, "contexts")
	delete(keys, "current-context")
	context := func(name, ns string) any {
		return map[string]any{"name": name, "context": map[string]any{"cluster": "culvert-e2e", "user": "admin", "namespace": ns}}
	}
	contexts["contexts"] = []any{context("one", "kube-public"), context("two", namespace)}
	env := []string{"KUBECONFIG=" + strings.Join([]string{contexts.write(t, dir, "contexts"), filepath.Join(dir, "none"), keys.write(t, dir, "keys")}, ":")}

	for want, args := range map[string][]string{
		"kube-public": nil, namespace: {"--context", "two"}, "other": {"--context", "two", "-n", "other"},
	} {
		out, err := culvert(env, append([]string{"rbac"}, args...)...).Output()
		if err != nil || !strings.Contains(string(out), "\n  namespace: "+want+"\n") {
			t.Errorf("rbac %v: %v: not of namespace %s:\n%s", args, err, want, out)
		}
	}
	check := noTrace(t)
	s := connectWith(t, env, "--context", "two", "-n", "other")
	want := inPod(t, "kit", "dns", "web.other")
	if got := laptop(t, "sh", "-c", "getent ahostsv4 web | awk '{print $1; exit}'"); got != want {
		t.Errorf("web is %s, want %s, as in namespace other", got, want)
	}
	if out := laptop(t, culvertBin, "status"); !strings.Contains(out, "two, namespace other, https://172.30.0.11:6443") {
		t.Errorf("status:\n%s", out)
	}
	s.stop()
	check(30 * time.Second)
}

// routeOf is the device that packets to an address leave by.
func routeOf(t testing.TB, addr string) string {
	t.Helper()
	_, rest, _ := strings.Cut(laptop(t, "ip", "-o", "route", "get", addr), " dev ")
	device, _, _ := strings.Cut(rest, " ")
	return device
}

// A network of this machine lies in the cluster's range: nothing is done until
// the person says who is to have it, and the hint says how.
func TestConflictC16Refused(t *testing.T) {
	var taken netip.Prefix // 256 addresses that no Service has
	used := kubectl(t, "get", "svc", "-A", "-o", "jsonpath={.items[*].spec.clusterIP}")
	for i := 255; !taken.IsValid(); i-- {
		if p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96, byte(i), 0}), 24); !strings.Contains(used, strings.TrimSuffix(p.Addr().String(), "0")) {
			taken = p
		}
	}
	inside := taken.Addr().Next().Next().String()
	t.Cleanup(func() { try("ip", "link", "del", "clash") })
	laptop(t, "sh", "-c", "ip link add clash type veth peer name clash-peer && ip link set clash addrgenmode none && ip link set clash-peer addrgenmode none && ip addr add "+taken.Addr().Next().String()+"/24 dev clash && ip link set clash up && ip link set clash-peer up")
	eventually(t, 5*time.Second, "the network is up", func() error {
		_, _, err := try("sh", "-c", "ip link show clash | grep -q 'state UP' && ip link show clash-peer | grep -q 'state UP'")
		return err
	})
	check := noTrace(t)

	hint := "culvert connect -n " + namespace + " --conflict refuse --exclude " + taken.String()
	refusal{1, []string{"10.96.0.0/16 (ServiceCIDR kubernetes)", taken.String() + " dev clash"}, hint}.check(t, culvert(nil, "connect", "-n", namespace, "--conflict", "refuse"))
	check(0)

	s := connectWith(t, nil, strings.Fields(hint)[2:]...)
	if got := routeOf(t, inside); got != "clash" {
		t.Errorf("%s goes to %s", inside, got)
	}
	if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web.shop: %s", page)
	}
	s.stop()
	check(30 * time.Second)
}

// What is included goes through the cluster, except the API server, which the
// tunnel itself leads to; what is excluded does not.
func TestIncludeExcludeC16(t *testing.T) {
	check := noTrace(t)
	excluded := serviceIP(t, "redis")
	s := connectWith(t, nil, "-n", namespace, "--include=172.30.0.0/24,192.0.2.7", "--exclude="+excluded)
	for addr, want := range map[string]string{
		"172.30.0.1": "culvert0", "192.0.2.7": "culvert0", serviceIP(t, "web"): "culvert0", "172.30.0.11": "eth0", excluded: "eth0", "192.0.2.8": "eth0",
	} {
		if got := routeOf(t, addr); got != want {
			t.Errorf("%s goes to %s, want %s", addr, got, want)
		}
	}
	if page := curl(t, "http://172.30.0.1/"); !strings.HasPrefix(page, "outside") {
		t.Errorf("172.30.0.1: %s", page)
	}
	for _, r := range theStatus(t).Routes {
		if p := netip.MustParsePrefix(r.Prefix); p.Contains(netip.MustParseAddr("172.30.0.1")) && r.Source != "--include" {
			t.Errorf("%+v", r)
		}
	}
	s.stop()
	check(30 * time.Second)
}
