package kube

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const kubeconfigForm = `apiVersion: v1
kind: Config
current-context: %[1]s
clusters: [{name: %[1]s, cluster: {server: %[2]q}}]
users: [{name: %[1]s, user: {token: t}}]
contexts: [{name: %[1]s, context: {cluster: %[1]s, user: %[1]s, namespace: ns-%[1]s}}]
`

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoad(t *testing.T) {
	a := writeFile(t, "a", fmt.Sprintf(kubeconfigForm, "a", "https://192.0.2.1:6443"))
	b := writeFile(t, "b", fmt.Sprintf(kubeconfigForm, "b", "https://192.0.2.2/prefix"))
	lost := writeFile(t, "lost", strings.ReplaceAll(fmt.Sprintf(kubeconfigForm, "lost", "https://192.0.2.2"), "cluster: lost, user", "cluster: none, user"))
	empty := writeFile(t, "empty", "apiVersion: v1\nkind: Config\n")
	broken := writeFile(t, "broken", "{")
	list := a + string(os.PathListSeparator) + b
	tests := []struct {
		name    string
		env     string // KUBECONFIG
		cfg     Config
		err     error
		says    string
		context string
		ns      string
		server  string
	}{
		{name: "by flag", env: b, cfg: Config{Kubeconfig: a}, context: "a", ns: "ns-a", server: "https://192.0.2.1:6443"},
		{name: "by environment", env: b, context: "b", ns: "ns-b", server: "https://192.0.2.2/prefix"},
		{name: "merged", env: list, context: "a", ns: "ns-a", server: "https://192.0.2.1:6443"},
		{name: "merged, other context", env: list, cfg: Config{Context: "b"}, context: "b", ns: "ns-b", server: "https://192.0.2.2/prefix"},
		{name: "namespace", env: a, cfg: Config{Namespace: "shop"}, context: "a", ns: "shop", server: "https://192.0.2.1:6443"},
		{name: "bad namespace", env: a, cfg: Config{Namespace: "a/b"}, err: ErrNamespace, says: "a/b"},
		{name: "unknown context", env: list, cfg: Config{Context: "c"}, err: ErrContext, says: `"c", the kubeconfig has: a, b`},
		{name: "no file", cfg: Config{Kubeconfig: "/nowhere/config"}, err: ErrKubeconfig, says: "/nowhere/config"},
		{name: "none at all", env: "/nowhere/config", err: ErrKubeconfig, says: "/nowhere/config"},
		{name: "empty", env: empty, err: ErrKubeconfig},
		{name: "broken", env: broken, err: ErrKubeconfig},
		{name: "context without cluster", env: lost, err: ErrKubeconfig, says: "context lost"},
	}
	// Neither is used, however inviting: what a pod has, and the default file.
	t.Setenv("KUBERNETES_SERVICE_HOST", "192.0.2.9")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("KUBECONFIG", test.env)
			c, err := Load(test.cfg)
			if !errors.Is(err, test.err) || err != nil && !strings.Contains(err.Error(), test.says) {
				t.Fatalf("err %v", err)
			}
			if err == nil && (c.Context != test.context || c.Namespace != test.ns || strings.TrimSuffix(c.Server, "/") != test.server) {
				t.Errorf("%q %q %q", c.Context, c.Namespace, c.Server)
			}
		})
	}
	t.Setenv("KUBECONFIG", list)
	if names, err := Contexts(""); err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("%q %v", names, err)
	}
}

// apiServer is an API server of TLS and few words; it gives the Cluster to it.
func apiServer(t *testing.T, handler http.HandlerFunc) *Cluster {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	return loadTLS(t, server, server.URL, "")
}

func loadTLS(t *testing.T, server *httptest.Server, address, more string) *Cluster {
	t.Helper()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	text := strings.Replace(fmt.Sprintf(kubeconfigForm, "t", address), "{server:",
		fmt.Sprintf("{certificate-authority: %s, %s server:", writeFile(t, "ca.crt", string(ca)), more), 1)
	c, err := Load(Config{Kubeconfig: writeFile(t, "config", text), Namespace: "dev"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func status(w http.ResponseWriter, code int, reason string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d,"message":"said by the server"}`, reason, code)
}

func TestCheck(t *testing.T) {
	for _, test := range []struct {
		name              string
		version, ns       int
		versionWhy, nsWhy string
		err               error
	}{
		{name: "fine", version: 200, ns: 200},
		{name: "namespace not to be read", version: 200, ns: 403, nsWhy: "Forbidden"},
		{name: "no namespace", version: 200, ns: 404, nsWhy: "NotFound", err: ErrNamespace},
		{name: "no credentials", version: 401, versionWhy: "Unauthorized", err: ErrUnauthorized},
		{name: "nothing allowed", version: 403, versionWhy: "Forbidden", err: ErrForbidden},
		{name: "not ready", version: 503, versionWhy: "ServiceUnavailable", err: ErrUnreachable},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := apiServer(t, func(w http.ResponseWriter, r *http.Request) {
				code, why, text := test.ns, test.nsWhy, `{"kind":"Namespace","apiVersion":"v1","metadata":{"name":"dev"}}`
				if r.URL.Path == "/version" {
					code, why, text = test.version, test.versionWhy, `{"gitVersion":"v1.34.4"}`
				}
				if code != 200 {
					status(w, code, why)
					return
				}
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprint(w, text)
			})
			version, err := c.Check(t.Context())
			if !errors.Is(err, test.err) || err == nil && version != "v1.34.4" {
				t.Errorf("%q %v", version, err)
			}
		})
	}
}

// Refused, silent, and untrusted servers are told within seconds.
func TestCheckUnreachable(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a time-out")
	}
	refused, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts by the kernel's queue
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	untrusted := httptest.NewTLSServer(http.NotFoundHandler())
	defer untrusted.Close()
	for name, address := range map[string]string{
		"refused": "https://" + refused.Addr().String(), "silent": "https://" + silent.Addr().String(),
		"untrusted": untrusted.URL, "no such host": "https://no.such.host.invalid:6443",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Load(Config{Kubeconfig: writeFile(t, "config", fmt.Sprintf(kubeconfigForm, "t", address))})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			begin := time.Now()
			if _, err := c.Check(t.Context()); !errors.Is(err, ErrUnreachable) {
				t.Errorf("%v", err)
			}
			if took := time.Since(begin); took > 2*dialTimeout+2*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func TestServerAddrsC19(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, test := range []struct{ server, proxy, want string }{
		{"https://192.0.2.1:6443", "", "[192.0.2.1]"},
		{"https://[2001:db8::1]:6443", "", "[2001:db8::1]"},
		{"https://192.0.2.1:6443", "http://192.0.2.7:3128", "[192.0.2.1 192.0.2.7]"},
		{"https://api.only.the.proxy.knows.invalid", "http://192.0.2.7:3128", "[192.0.2.7]"},
		{"https://192.0.2.1", "socks5://192.0.2.1:1080", "[192.0.2.1]"},
	} {
		text := fmt.Sprintf(kubeconfigForm, "t", test.server)
		if test.proxy != "" {
			text = strings.Replace(text, "{server:", "{proxy-url: "+`"`+test.proxy+`"`+", server:", 1)
		}
		c, err := Load(Config{Kubeconfig: writeFile(t, "config", text)})
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.ServerAddrs(ctx)
		if err != nil || fmt.Sprint(got) != test.want {
			t.Errorf("%s by %q: %v %v", test.server, test.proxy, got, err)
		}
	}
	c, err := Load(Config{Kubeconfig: writeFile(t, "config", fmt.Sprintf(kubeconfigForm, "t", "https://no.such.host.invalid"))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ServerAddrs(ctx); !errors.Is(err, ErrUnreachable) {
		t.Errorf("%v", err)
	}
	goleak.VerifyNone(t, goleak.IgnoreCurrent())
}
