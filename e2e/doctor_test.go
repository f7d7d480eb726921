package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// clinic is a namespace of the doctor's own: what other tests leave dying is not there.
const clinic = "clinic"

func openClinic(t *testing.T) {
	newNamespace(t, clinic, "{apiVersion: v1, kind: Namespace, metadata: {name: "+clinic+"}}")
}

// finding is one of what "culvert doctor -o json" says.
type finding struct {
	Step, State, Found, Error, Advice string
	Details                           []string
}

// findings are by their steps.
type findings map[string]finding

// doctor runs "culvert doctor" and checks that its exit code says what it has found.
func doctor(t testing.TB, env []string, args ...string) findings {
	t.Helper()
	together(t)
	c := culvert(env, append([]string{"doctor", "-n", clinic, "-o", "json"}, args...)...)
	var talk lockedBuffer
	c.Stderr = &talk
	out, err := c.Output()
	var all []finding
	if jsonErr := json.Unmarshal(out, &all); jsonErr != nil {
		t.Fatalf("culvert doctor: %v, %v in %s\n%s", err, jsonErr, out, talk.String())
	}
	found, want := findings{}, 0
	for _, f := range all {
		found[f.Step] = f
		if f.State == "failed" {
			want = 1
		}
	}
	if code := exitCode(err); code != want {
		t.Errorf("exit code %d, want %d: %s\n%s", code, want, out, talk.String())
	}
	return found
}

// want wants these states, and all other steps well, or skipped for what these lack.
func (all findings) want(t testing.TB, states map[string]string) {
	t.Helper()
	for step, state := range states {
		if all[step].State != state {
			t.Errorf("%s is %+v, want %s", step, all[step], state)
		}
	}
	for step, f := range all {
		if states[step] == "" && f.State != "ok" {
			t.Errorf("%+v", f)
		}
	}
}

// advised wants one step's advice to begin so, and what is said to be wrong to name parts.
func (all findings) advised(t testing.TB, step, advice string, parts ...string) {
	t.Helper()
	f := all[step]
	if !strings.HasPrefix(f.Advice, advice) {
		t.Errorf("%s advises %q, want %q", step, f.Advice, advice)
	}
	for _, part := range parts {
		if !strings.Contains(f.Error+strings.Join(f.Details, " "), part) {
			t.Errorf("%+v does not name %q", f, part)
		}
	}
}

// follow does what was advised: the advice is a command, and after # what for.
func follow(t testing.TB, advice string) {
	t.Helper()
	advice = strings.ReplaceAll(strings.ReplaceAll(advice, "culvert ", culvertBin+" "), "sudo ", "")
	laptop(t, "sh", "-c", advice)
}

// notHere are the steps that have nothing to look at where no connect runs.
func notHere(more ...string) map[string]string {
	states := map[string]string{"names": "skipped"}
	for i := 0; i < len(more); i += 2 {
		for step := range strings.SplitSeq(more[i], ",") {
			states[step] = more[i+1]
		}
	}
	return states
}

const (
	ofShadow  = "shadow,wire,pods/proxy,port-forward websocket,port-forward spdy,cluster DNS,ClusterIP"
	ofCluster = "API server,clock,rights,routes," + ofShadow
)

func TestF30Doctor(t *testing.T) {
	openClinic(t)
	check := noTrace(t)
	t.Run("all well", func(t *testing.T) {
		found := doctor(t, nil)
		found.want(t, notHere())
		for step, part := range map[string]string{
			"kubeconfig": kubeconfig + ": context culvert-e2e, namespace " + clinic, "API server": "Kubernetes v1.", "root": "culvert is root", "TUN": "made and removed",
			"resolver": "resolv.conf", "wire": "open: tls through pods/proxy", "cluster DNS": "10.96.0.10 answers", "ClusterIP": "10.96.0.1:443 reached", "rights": "exchange",
		} {
			if !strings.Contains(found[step].Found, part) {
				t.Errorf("%+v does not name %q", found[step], part)
			}
		}
		if routes := strings.Join(found["routes"].Details, "\n"); !strings.Contains(routes, "ServiceCIDR kubernetes") || !strings.Contains(routes, "podCIDR") {
			t.Errorf("routes %s", routes)
		}
		check(30 * time.Second)
	})
	t.Run("all well, past the API server", func(t *testing.T) {
		found := doctor(t, nil, "--endpoint", "auto", "--wire", "wireguard")
		found.want(t, notHere())
		if !strings.Contains(found["endpoint"].Found, "wireguard to ") || !strings.Contains(found["MTU"].Found, "bytes") {
			t.Errorf("%+v %+v", found["endpoint"], found["MTU"])
		}
		check(30 * time.Second)
	})
	t.Run("offline", func(t *testing.T) {
		doctor(t, nil, "--offline").want(t, notHere(ofShadow, "skipped"))
		check(0)
	})
	t.Run("for people", func(t *testing.T) {
		out := laptop(t, culvertBin, "doctor", "-n", clinic)
		if strings.Count(out, "✓ ") != 16 || strings.Count(out, "\n- ") != 1 || strings.Contains(out, "✗") {
			t.Error(out)
		}
		check(30 * time.Second)
	})
	t.Run("interrupted", func(t *testing.T) {
		s := start(t, "doctor", "-n", clinic, "-v")
		eventually(t, patience, "the shadow is made", func() error {
			if !strings.Contains(s.talk.String(), "… shadow: ") && s.alive() {
				return fmt.Errorf("said %s", s.talk.String())
			}
			return nil
		})
		s.interrupt()
		if code := s.wait(patience); code != 1 {
			t.Errorf("ended with %d: %s", code, s.talk.String())
		}
		check(30 * time.Second)
	})
}

// Each cause is named at its own step, with advice that helps, and nothing but what
// needs that step is left out.
func TestF30DoctorFinds(t *testing.T) {
	openClinic(t)
	check := noTrace(t)
	t.Run("no kubeconfig", func(t *testing.T) {
		found := doctor(t, nil, "--kubeconfig", "/nowhere/config")
		found.want(t, notHere("kubeconfig", "failed", ofCluster, "skipped"))
		found.advised(t, "kubeconfig", "kubectl config view", "/nowhere/config")
		follow(t, found["kubeconfig"].Advice)
		check(0)
	})
	t.Run("no API server", func(t *testing.T) {
		found := doctor(t, server(t, "https://172.31.0.1:6443"))
		found.want(t, notHere("API server", "failed", strings.TrimPrefix(ofCluster, "API server,"), "skipped"))
		found.advised(t, "API server", "kubectl cluster-info", "172.31.0.1:6443", "refused")
		check(0)
	})
	t.Run("a reader's rights", func(t *testing.T) {
		kubectl(t, "create", "rolebinding", "-n", clinic, "dev-view", "--clusterrole=view", "--user=dev")
		t.Cleanup(func() { kubectl(t, "delete", "rolebinding", "-n", clinic, "dev-view") })
		found := doctor(t, dev)
		found.want(t, notHere("rights", "failed", ofShadow, "skipped", "leftovers", "warning"))
		found.advised(t, "rights", "culvert rbac -n clinic | kubectl apply -f -", "create secrets in namespace clinic", "exchange: ")
		follow(t, found["rights"].Advice)
		t.Cleanup(func() { kubectl(t, "delete", "-n", clinic, "role/culvert-connect", "rolebinding/culvert-connect") })
		kubectl(t, "create", "rolebinding", "-n", clinic, "culvert-connect", "--role=culvert-connect", "--user=dev")
		doctor(t, dev).want(t, notHere("rights", "warning"))
	})
	t.Run("a route in the way", func(t *testing.T) {
		laptop(t, "ip", "route", "add", "10.96.64.0/18", "dev", "eth0")
		t.Cleanup(func() { laptop(t, "ip", "route", "del", "10.96.64.0/18") })
		found := doctor(t, nil, "--conflict", "refuse")
		found.want(t, notHere("routes", "failed"))
		found.advised(t, "routes", "culvert connect -n clinic --exclude 10.96.64.0/18", "10.96.64.0/18 dev eth0", "ServiceCIDR kubernetes")
		doctor(t, nil, "--exclude", "10.96.64.0/18").want(t, notHere())
		connect(t, "-n", clinic, "--exclude", "10.96.64.0/18").stop()
	})
	t.Run("an endpoint that leads nowhere", func(t *testing.T) {
		found := doctor(t, nil, "--endpoint", "172.31.0.1:6443")
		found.want(t, notHere("endpoint", "failed"))
		found.advised(t, "endpoint", "kubectl get services,nodes -o wide -n clinic", "172.31.0.1:6443", "refused")
	})
	t.Run("leftovers", func(t *testing.T) {
		s := connect(t, "-n", clinic)
		kill9(t, theStatus(t).PID)
		s.wait(10 * time.Second)
		found := doctor(t, nil)
		found.want(t, notHere("leftovers", "failed"))
		found.advised(t, "leftovers", "culvert clean -n clinic", "has ended", "deployment/culvert-")
		follow(t, found["leftovers"].Advice)
		doctor(t, nil).want(t, notHere())
	})
	check(30 * time.Second)
}

// Where a session runs the system asks it, until something keeps it from that.
func TestF30DoctorAsksForNames(t *testing.T) {
	openClinic(t)
	check := noTrace(t)
	s := connect(t)
	doctor(t, nil).want(t, nil)
	other := writeFile(t, t.TempDir(), "resolv.conf", "nameserver 172.31.0.1\n", 0o644)
	laptop(t, "mount", "--bind", other, "/etc/resolv.conf")
	t.Cleanup(func() { try("umount", "/etc/resolv.conf") })
	found := doctor(t, nil)
	delete(found, "leftovers") // the session's own, which it does not find now
	found.want(t, map[string]string{"names": "failed"})
	found.advised(t, "names", "sudo umount /etc/resolv.conf", "no such name", theStatus(t).Session)
	follow(t, found["names"].Advice)
	doctor(t, nil).want(t, nil)

	kept := filepath.Join(t.TempDir(), "nsswitch.conf")
	laptop(t, "cp", "/etc/nsswitch.conf", kept)
	t.Cleanup(func() { laptop(t, "cp", kept, "/etc/nsswitch.conf") })
	laptop(t, "sed", "-i", "s/^hosts:.*/hosts: files/", "/etc/nsswitch.conf")
	found = doctor(t, nil)
	found.want(t, map[string]string{"resolver": "failed", "names": "failed"})
	found.advised(t, "names", "sudo sed -i")
	follow(t, found["names"].Advice)
	doctor(t, nil).want(t, nil)
	s.stop()
	check(30 * time.Second)
}

const deny = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: clinic}
spec: {podSelector: {}, policyTypes: [Egress]}
`

// A policy keeps the shadow from the cluster's DNS. This cluster's network enforces
// none, so what another would do is done for it, on the node.
func TestF30DoctorPolicy(t *testing.T) {
	openClinic(t)
	check := noTrace(t)
	t.Run("DNS is shut off", func(t *testing.T) {
		apply(t, deny)
		t.Cleanup(func() { kubectl(t, "delete", "networkpolicy", "-n", clinic, "deny") })
		role := rbac(t, "-n", clinic)
		const policies = "resources: [networkpolicies]\n    verbs: ["
		grant(t, clinic, strings.Replace(role, policies+"create, list]", policies+"list]", 1))
		var found findings
		exclusively(t, func() {
			node := func(do string) {
				for _, protocol := range []string{"udp", "tcp"} {
					args := []string{"iptables", "-w", "-t", "raw", do, "PREROUTING", "-s", "10.244.0.0/16", "-p", protocol, "--dport", "53", "-j", "DROP"}
					if out, err := on("node1", args...).CombinedOutput(); err != nil {
						t.Errorf("%v: %v: %s", args, err, out)
					}
				}
			}
			node("-I")
			defer node("-D")
			found = doctor(t, dev)
		})
		found.want(t, notHere("rights", "warning", "shadow", "warning", "cluster DNS", "failed", "ClusterIP", "skipped"))
		found.advised(t, "shadow", "culvert rbac -n clinic | kubectl apply -f -", "shuts the shadow in")
		found.advised(t, "cluster DNS", "kubectl get networkpolicies -n clinic", "10.96.0.10:53")
		follow(t, found["cluster DNS"].Advice)
		follow(t, found["shadow"].Advice)
		found = doctor(t, dev)
		found.want(t, notHere("rights", "warning"))
		if slices.ContainsFunc(found["rights"].Details, func(line string) bool {
			return strings.Contains(line, "networkpolicies") && strings.HasPrefix(line, "connect")
		}) {
			t.Errorf("%+v", found["rights"])
		}
	})
	check(30 * time.Second)
}
