package e2e

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The wire goes past the API server where there is such a way, comes back when that
// is lost, and nothing is left of it.
func TestEndpoint(t *testing.T) {
	for wire, network := range map[string]string{"auto": "tcp", "wireguard": "udp"} {
		t.Run(wire, func(t *testing.T) { pastTheAPIServer(t, wire, network) })
	}
}

func pastTheAPIServer(t *testing.T, wire, network string) {
	for _, do := range []string{"-A", "-D"} { // the first rule makes the table, which then stays
		laptop(t, "iptables", "-w", do, "OUTPUT", "-p", "tcp", "--dport", "1", "-j", "DROP")
	}
	check := noTrace(t)
	s := connect(t, "-v", "--endpoint", "auto", "--wire", wire)
	endpoint := func() error {
		if w := theStatus(t).Wire; !w.Up || !strings.HasPrefix(w.Way, "endpoint ") || (w.Kind == "wireguard") != (network == "udp") {
			return fmt.Errorf("%+v", w)
		}
		return nil
	}
	eventually(t, 60*time.Second, "the wire goes past the API server", endpoint)
	if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web.shop: %s", page)
	}
	postMany(t)
	s.says("the wire goes past the API server now")
	_, port, _ := strings.Cut(theStatus(t).Wire.Way, ":")
	rule := []string{"OUTPUT", "-p", network, "--dport", port, "-j", "DROP"}
	laptop(t, append([]string{"iptables", "-w", "-A"}, rule...)...)
	cut := time.Now()
	t.Cleanup(func() { _, _, _ = try(append([]string{"iptables", "-w", "-D"}, rule...)...) })
	if page := curl(t, "http://web.shop/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web.shop: %s", page)
	}
	if took := time.Since(cut); took > 8*time.Second {
		t.Errorf("a request took %v when the direct way was lost", took)
	}
	if w := theStatus(t).Wire; w.Way != "pods/proxy" || w.Kind != "tls" {
		t.Errorf("%+v", w)
	}
	laptop(t, append([]string{"iptables", "-w", "-D"}, rule...)...)
	eventually(t, 150*time.Second, "the wire goes past the API server again", endpoint)
	keepsSecrets(t, s)
	s.stop()
	check(30 * time.Second)
}

// keepsSecrets looks for the shadow's private key in all that is told: by culvert, by the
// shadow, and by the cluster to who may not read Secrets.
func keepsSecrets(t *testing.T, s *running) {
	t.Helper()
	name := "culvert-" + theStatus(t).Session
	key, err := base64.StdEncoding.DecodeString(kubectl(t, "get", "-n", namespace, "secret", name, "-o", `jsonpath={.data.host_key}`))
	if err != nil || len(key) == 0 {
		t.Fatalf("the key: %d bytes, %v", len(key), err)
	}
	told := map[string]string{
		"culvert":     s.talk.String(),
		"its status":  laptop(t, culvertBin, "status", "-o", "json"),
		"the shadow":  kubectl(t, "logs", "-n", namespace, "deployment/"+name),
		"the cluster": kubectl(t, "get", "-n", namespace, "configmap,lease,deployment,replicaset,pod,service,event", "-o", "yaml"),
	}
	for line := range strings.Lines(string(key)) {
		line = strings.TrimSpace(line)
		for who, text := range told {
			if len(line) > 20 && !strings.HasPrefix(line, "-----") && strings.Contains(text, line) {
				t.Errorf("%s tells of the private key", who)
			}
		}
	}
}

// What an exchange brings comes past the API server, too, and no request is lost when
// the wire moves there.
func TestExchangeEndpoint(t *testing.T) {
	for _, wire := range []string{"tls", "wireguard"} {
		t.Run(wire, func(t *testing.T) {
			laptopApp(t, laptopName, 0)
			check := asBefore(t)
			o := under(t, [][]string{{"-c", "2"}}, "http://"+serviceIP(t, "app")+"/report", func() {
				s := exchange(t, "svc/app", "--to", "http=8080", "--endpoint", "auto", "--wire", wire)
				eventually(t, 60*time.Second, "the wire goes past the API server", func() error {
					if w := theExchange(t, "app").Wire; !strings.HasPrefix(w.Way, "endpoint ") || w.Kind != wire {
						return fmt.Errorf("%+v", w)
					}
					return nil
				})
				time.Sleep(2 * time.Second) // some laps of the load
				s.stop()
			})[0]
			if o.Failures > 0 || o.By[laptopName] == 0 || o.By["original"] == 0 {
				t.Errorf("%d lost of %d: %v; by %v", o.Failures, o.Failures+o.Requests, o.Errors, o.By)
			}
			check(30 * time.Second)
		})
	}
}

// A stock client, which knows nothing but what is printed, joins from another machine.
func TestWireGuardClient(t *testing.T) {
	exclusively(t, func() { // its machine is that of the other half
		check := noTrace(t)
		s := connect(t, "--print-wg-config")
		s.says("configuration of a WireGuard client printed")
		joinByWireGuard(t, configIn(t, s.talk.String()))
		s.stop()
		check(30 * time.Second)
	})
}

// configIn is what wg-quick reads, less the DNS that needs a resolvconf.
func configIn(t *testing.T, text string) string {
	t.Helper()
	_, config, found := strings.Cut(text, "[Interface]")
	if !found {
		t.Fatalf("no configuration: %s", text)
	}
	var lines []string
	for line := range strings.Lines("[Interface]" + config) {
		if name, _, ok := strings.Cut(line, " = "); strings.HasPrefix(line, "[") || ok && name != "DNS" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

func joinByWireGuard(t *testing.T, config string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "culvert.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	other := func(args ...string) string {
		t.Helper()
		c := on("phone", args...)
		c.Env = append(c.Env, "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go")
		out, err := c.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s\n%s", strings.Join(args, " "), err, out, config)
		}
		return string(out)
	}
	other("wg-quick", "up", file)
	defer other("wg-quick", "down", file)
	web := strings.TrimSpace(other("dig", "+short", "+time=5", "@"+kubectl(t, "get", "-n", "kube-system", "service", "kube-dns", "-o", "jsonpath={.spec.clusterIP}"), at("web")+".svc.cluster.local"))
	if page := other("curl", "-sS", "-m", "10", "http://"+web+"/"); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web at %s: %s", web, page)
	}
}

// The shadow is reached by a port of its node's without a Service, and by a load
// balancer, whose maker the test is: kube-proxy leads what comes for its address.
func TestEndpointKinds(t *testing.T) {
	kubectl(t, "create", "namespace", "edge") // whose pods may have ports of the node
	t.Cleanup(func() { kubectl(t, "delete", "namespace", "edge") })
	rule := []string{"FORWARD", "-p", "tcp", "-m", "multiport", "--dports", "7465,20000:29999", "-j", "ACCEPT"}
	router := func(do string) {
		if out, err := on("router", append([]string{"iptables", "-w", do}, rule...)...).CombinedOutput(); err != nil {
			t.Errorf("iptables %s: %v: %s", do, err, out)
		}
	}
	router("-I")
	t.Cleanup(func() { router("-D") })
	t.Run("hostport", func(t *testing.T) { byEndpoint(t, "hostport", "edge", func() {}) })
	t.Run("loadbalancer", func(t *testing.T) {
		byEndpoint(t, "loadbalancer", namespace, func() {
			service := kubectl(t, "get", "-n", namespace, "service", "-o", "name", "-l", "culvert.dev/session="+theStatus(t).Session)
			ip := kubectl(t, "get", "node", "node1", "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
			ip, _, _ = strings.Cut(ip, " ")
			kubectl(t, "patch", "-n", namespace, service, "--subresource=status", "-p",
				fmt.Sprintf(`{"status":{"loadBalancer":{"ingress":[{"ip":%q}]}}}`, ip))
		})
	})
}

func byEndpoint(t *testing.T, endpoint, in string, publish func()) {
	check := noTrace(t)
	s := connect(t, "--endpoint", endpoint, "-n", in)
	eventually(t, patience, "something was published", func() error {
		if w := theStatus(t).Wire; w.NotDirect == "" && !strings.HasPrefix(w.Way, "endpoint") {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
	publish()
	eventually(t, patience, "the wire goes past the API server", func() error {
		if w := theStatus(t).Wire; !strings.HasPrefix(w.Way, "endpoint") {
			return fmt.Errorf("%+v", w)
		}
		return nil
	})
	if page := curl(t, urlOf("web", "/")); !strings.Contains(page, `"pod":"web-`) {
		t.Errorf("web: %s", page)
	}
	s.stop()
	check(30 * time.Second)
}
