package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"
)

// inPod runs a command in the client pod of our namespace.
func inPod(t testing.TB, args ...string) string {
	t.Helper()
	return kubectl(t, append([]string{"exec", "-n", namespace, "client", "--"}, args...)...)
}

func serviceIP(t testing.TB, name string) string {
	t.Helper()
	return kubectl(t, "get", "svc", "-n", namespace, name, "-o", "jsonpath={.spec.clusterIP}")
}

// serviceIPs are of both families, as the Service has them.
func serviceIPs(t testing.TB, name string) []string {
	t.Helper()
	return strings.Fields(kubectl(t, "get", "svc", "-n", namespace, name, "-o", "jsonpath={.spec.clusterIPs[*]}"))
}

func podIPs(t testing.TB, label string) []string { return podAddresses(t, label, ".podIP") }

// podIPs6 are the pods' IPv6 addresses: IPv4 is the cluster's first family.
func podIPs6(t testing.TB, label string) []string { return podAddresses(t, label, ".podIPs[1].ip") }

func podAddresses(t testing.TB, label, field string) []string {
	t.Helper()
	return strings.Fields(kubectl(t, "get", "pod", "-n", namespace, "-l", label, "--field-selector=status.phase=Running", "-o", "jsonpath={.items[*].status"+field+"}"))
}

func curl(t testing.TB, url string) string {
	t.Helper()
	return laptop(t, "curl", "-sS", "--max-time", "10", url)
}

// One session, looked at from every side.
func TestConnect(t *testing.T) {
	check := noTrace(t)
	notReached(t)
	s := connect(t)

	t.Run("pod IP", func(t *testing.T) {
		for _, ip := range slices.Concat(podIPs(t, "app=web"), podIPs6(t, "app=web")) {
			if page := curl(t, "http://"+net.JoinHostPort(ip, "8080")+"/"); !strings.Contains(page, `"pod":"web-`) {
				t.Errorf("%s: %s", ip, page)
			}
		}
	})
	t.Run("both families", func(t *testing.T) {
		protocols := []string{"http/1.1", "https h2", "grpc bidi", "banner", "line", "udp"}
		for _, host := range append(serviceIPs(t, "app-dual"), "app-dual", "app-six", "app-dual6.shop.svc.cluster.local") {
			var found map[string]verdict
			out := laptop(t, slices.Concat([]string{kit(t), "-t", "15s", "check", host}, protocols)...)
			if err := json.Unmarshal([]byte(out), &found); err != nil {
				t.Fatalf("%s: %v in %s", host, err, out)
			}
			want(t, found, "original", protocols)
		}
	})
	t.Run("every form of the name", func(t *testing.T) {
		for _, host := range []string{
			serviceIP(t, "web"), "web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "web.shop.svc.cluster.local.", "WEB.Shop",
			"db-0.db", "db-1.db.shop", "db-0.db.shop.svc.cluster.local", "named.sub", "web-alias.shop", "web.other",
		} {
			port := ""
			if strings.HasPrefix(host, "db-") || strings.HasPrefix(host, "named") {
				port = ":8080"
			}
			if page := curl(t, "http://"+host+port+"/form"); !strings.Contains(page, `"path":"/form"`) {
				t.Errorf("%s: %s", host, page)
			}
		}
	})
	t.Run("names as a pod resolves them", func(t *testing.T) {
		for _, name := range []string{"web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "db", "db-0.db", "web.other", "kubernetes.default", "web-alias", "named.sub", "app-dual", "app-six.shop"} {
			want := lines(inPod(t, "kit", "dns", name))
			got := lines(laptop(t, "sh", "-c", "getent ahosts "+name+" | awk '{print $1}' | sort -u"))
			if !slices.Equal(got, want) {
				t.Errorf("%s: the laptop gets %v, a pod %v", name, got, want)
			}
		}
	})
	t.Run("B7 outside as before", func(t *testing.T) {
		for name, want := range map[string]string{"intranet.corp.example": "172.31.0.1", "intranet": "172.31.0.1"} {
			if got := laptop(t, "sh", "-c", "getent ahostsv4 "+name+" | awk '{print $1; exit}'"); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		if got := laptop(t, "dig", "+noall", "+comments", "nothing.example"); !strings.Contains(got, "NXDOMAIN") {
			t.Errorf("a name that does not exist: %s", got)
		}
		if page := curl(t, "http://intranet.corp.example/"); !strings.HasPrefix(page, "outside") {
			t.Errorf("outside: %s", page)
		}
	})
	t.Run("UDP", func(t *testing.T) {
		for _, to := range []string{serviceIP(t, "udp") + ":7", "udp.shop:7", "multi.shop:7"} {
			if got := laptop(t, kit(t), "dial", "udp", to, "hello"); got != "hello" {
				t.Errorf("%s: %q", to, got)
			}
		}
	})
	t.Run("TCP echo", func(t *testing.T) {
		if got := laptop(t, kit(t), "dial", "tcp", "multi.shop:7", "hello"); got != "hello" {
			t.Errorf("%q", got)
		}
	})
	t.Run("ping", func(t *testing.T) {
		laptop(t, "ping", "-c", "2", "-W", "3", podIPs(t, "app=web")[0])
		laptop(t, "ping", "-c", "1", "-W", "3", podIPs6(t, "app=web")[0])
		// An address that no pod has: nobody answers, so nobody may answer here.
		if out, _, err := try("ping", "-c", "1", "-W", "2", "10.244.0.253"); err == nil {
			t.Errorf("an address without a pod answers: %s", out)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, to := range []string{podIPs(t, "app=web")[0] + ":9999", "[" + podIPs6(t, "app=web")[0] + "]:9999", serviceIP(t, "empty") + ":80"} {
			start := time.Now()
			_, _, err := try("curl", "-sS", "--max-time", "10", "http://"+to)
			if code := exitCode(err); code != 7 { // curl(1): failed to connect
				t.Errorf("%s: curl ended with %d, want 7 (refused)", to, code)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s: refused after %v", to, took)
			}
		}
	})
	t.Run("redis and postgres", func(t *testing.T) {
		laptop(t, "redis-cli", "-h", "redis.shop", "set", "fruit", "mango")
		if got := laptop(t, "redis-cli", "-h", "redis.shop", "get", "fruit"); got != "mango" {
			t.Errorf("redis: %q", got)
		}
		if got := laptop(t, "psql", "-h", "pg.shop", "-U", "postgres", "-Atc", "select 6*7"); got != "42" {
			t.Errorf("postgres: %q", got)
		}
	})
	t.Run("13 posts of 20 MiB at once", postMany)
	t.Run("B9 a Service made now", newService)
	t.Run("status", func(t *testing.T) {
		st := theStatus(t)
		if !st.Wire.Up || st.Wire.Way != "pods/proxy" || st.Wire.Kind != "tls" || st.Shadow.Kind != "Deployment" || st.DNS.Mode != "resolv.conf" {
			t.Errorf("%+v", st)
		}
		if !strings.HasPrefix(st.Shadow.Pod, "culvert-"+st.Session) {
			t.Errorf("shadow pod %q of session %s", st.Shadow.Pod, st.Session)
		}
	})
	t.Run("C17 routes", everyRange)

	s.stop()
	check(30 * time.Second)
}

// notReached: without a session the laptop knows no way to pods and Services.
func notReached(t *testing.T) {
	t.Helper()
	for _, ip := range slices.Concat(serviceIPs(t, "app-dual"), podIPs(t, "app=app")[:1], podIPs6(t, "app=app")[:1]) {
		if out, _, err := try("curl", "-sS", "--max-time", "2", "http://"+net.JoinHostPort(ip, "80")); exitCode(err) != 7 {
			t.Errorf("%s is not refused: %v %s", ip, err, out)
		}
	}
}

// everyRange wants the exact ranges of the cluster, of both families, and
// nothing that is only guessed.
func everyRange(t *testing.T) {
	want := map[string]string{} // prefix to source
	for _, p := range strings.Fields(kubectl(t, "get", "servicecidr", "kubernetes", "-o", "jsonpath={.spec.cidrs[*]}")) {
		want[p] = "ServiceCIDR kubernetes"
	}
	nodes := kubectl(t, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name} {.spec.podCIDRs[*]}{"\n"}{end}`)
	for line := range strings.Lines(nodes) {
		fields := strings.Fields(line)
		for _, p := range fields[1:] {
			want[p] = "node " + fields[0] + " podCIDR"
		}
	}
	if len(want) < 4 {
		t.Fatalf("the cluster says only %v", want)
	}
	routes := theStatus(t).Routes
	for p, source := range want {
		p := netip.MustParsePrefix(p)
		if !slices.ContainsFunc(routes, func(r struct{ Prefix, Source string }) bool {
			route := netip.MustParsePrefix(r.Prefix) // of neighbours joined
			return route.Overlaps(p) && route.Bits() <= p.Bits() && strings.Contains(r.Source, source)
		}) {
			t.Errorf("no route to %v by %s: %v", p, source, routes)
		}
	}
	if len(routes) > len(want) || strings.Contains(fmt.Sprint(routes), "observed") {
		t.Errorf("routes %v, the cluster has %v", routes, want)
	}
}

// Where a new device has no IPv6 that part of the cluster is left out, and told.
func TestWithoutIPv6(t *testing.T) {
	const knob = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
	t.Cleanup(func() { laptop(t, "sh", "-c", "echo 0 >"+knob) })
	laptop(t, "sh", "-c", "echo 1 >"+knob)
	check := noTrace(t)
	s := connect(t)
	if said := s.talk.String(); !strings.Contains(said, "! this machine has no IPv6") {
		t.Error(said)
	}
	for _, r := range theStatus(t).Routes {
		if netip.MustParsePrefix(r.Prefix).Addr().Is6() {
			t.Errorf("%+v", r)
		}
	}
	for _, host := range []string{serviceIP(t, "app-dual"), "app-dual.shop"} { // whose other address is refused
		curl(t, "http://"+host+"/")
	}
	s.stop()
	check(30 * time.Second)
}

func lines(text string) []string {
	l := strings.Fields(text)
	sort.Strings(l)
	return slices.Compact(l)
}

// kit is the client program of the sample system, as the laptop can run it.
func kit(t testing.TB) string {
	t.Helper()
	path := filepath.Join(root, "e2e/.run/bin/kit")
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func postMany(t *testing.T) {
	dir := t.TempDir()
	body := make([]byte, 20<<20)
	var wg sync.WaitGroup
	for i := range 13 {
		b := append(slices.Clone(body), make([]byte, 1000+i)...)
		if _, err := rand.Read(b); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			out, talk, err := try("curl", "-sS", "--max-time", "120", "--data-binary", "@"+file, "-o", file+".back", "http://web.shop/echo")
			if err != nil {
				t.Errorf("post %d: %v %s%s", i, err, out, talk)
				return
			}
			back, err := os.ReadFile(file + ".back")
			if err != nil || !bytes.Equal(b, back) {
				t.Errorf("post %d: %d bytes came back as %d others (%v)", i, len(b), len(back), err)
			}
		})
	}
	wg.Wait()
}

// newService is resolved within two seconds of the API server's yes.
func newService(t *testing.T) {
	t.Cleanup(func() { kubectl(t, "delete", "svc", "-n", namespace, "fresh") })
	kubectl(t, "expose", "-n", namespace, "deploy/web", "--name=fresh", "--port=80", "--target-port=8080")
	eventually(t, 2*time.Second, "fresh.shop resolves", func() error {
		_, _, err := try("getent", "hosts", "fresh.shop")
		return err
	})
	eventually(t, 10*time.Second, "fresh.shop answers", func() error {
		_, _, err := try("curl", "-sS", "--max-time", "2", "http://fresh.shop/")
		return err
	})
}
