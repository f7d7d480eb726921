package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// apiRange has the API server, and the laptop's nameserver and proxy.
const apiRange = "172.30.0.0/15"

// What the tunnel itself needs stays outside of a range that has it: the API server, the
// proxy on the way to it, the nameservers.
func TestPinnedC19(t *testing.T) {
	const proxy = "172.31.0.1"
	for name, env := range map[string][]string{"the API server": nil, "a proxy": {"HTTPS_PROXY=http://" + proxy + ":3128"}} {
		t.Run(name, func(t *testing.T) {
			check := noTrace(t)
			before := map[string]string{nodeIP: routeOf(t, nodeIP), proxy: routeOf(t, proxy)}
			s := connectWith(t, env, "-n", namespace, "--include", apiRange)
			for addr, device := range before {
				if got := routeOf(t, addr); got != device {
					t.Errorf("%s goes to %s, before to %s", addr, got, device)
				}
			}
			if got := routeOf(t, "172.30.77.7"); got != "culvert0" {
				t.Errorf("what is included goes to %s", got)
			}
			found(t, "web.shop", "intranet.corp.example", "www.example.com")
			curl(t, urlOf("web", "/"))
			s.stop()
			check(30 * time.Second)
		})
	}
}

// A way to the API server that nobody knows of ends in the range: all is put back at
// once, which is found out within three seconds.
func TestPinnedC19Unseen(t *testing.T) {
	const seen = "172.29.0.1"
	rule := func(do string) error {
		_, talk, err := try("iptables", "-w", "-t", "nat", do, "OUTPUT", "-d", seen, "-p", "tcp", "-j", "DNAT", "--to-destination", nodeIP)
		if err != nil {
			return fmt.Errorf("%w: %s", err, talk)
		}
		return nil
	}
	for _, do := range []string{"-A", "-D", "-A"} { // the first makes the table, which then stays
		if err := rule(do); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = rule("-D") })
	c := readKubeconfig(t, kubeconfig)
	cluster := c.part("clusters", "cluster")
	cluster["server"], cluster["tls-server-name"] = "https://"+seen+":6443", "kubernetes"
	check := noTrace(t)
	s := startAs(t, culvert([]string{"KUBECONFIG=" + c.write(t, t.TempDir(), "config")}, "connect", "-n", namespace, "--include", apiRange))
	if code := s.wait(60 * time.Second); code != 1 || !strings.Contains(s.talk.String(), "with the routes set, the API server was not reached any more") {
		t.Errorf("code %d: %s", code, s.talk.String())
	}
	check(30 * time.Second)
}
